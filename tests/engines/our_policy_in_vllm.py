"""A plugin of pytest that puts our policy where vLLM's tests import theirs.

Where our policy fails it lets vLLM's decide, which would hide that it does; so every failure is
said, with its test, in the file that `FAILURES` names.
"""

import logging
import os
from pathlib import Path

from vllm.distributed.eplb.policy import default

from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log
from moetuner.plugins.settings import Settings
from moetuner.plugins.vllm import make_policy_class


class Watched(Log):
    """A log that says which test a warning is of."""

    def warn(self, text, rank=0):
        with Path(os.environ["FAILURES"]).open("a") as file:
            test = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split()[0]
            print(test, text, file=file)
        super().warn(text, rank)


default.DefaultEplbPolicy = make_policy_class(
    default.DefaultEplbPolicy,
    Balancer(Settings(rebalance=True), Watched(logging.getLogger("moetuner"))),
)
