"""A plugin of pytest that puts our policy where vLLM's tests import theirs.

Where our policy fails it lets vLLM's decide, which would hide that it does; so every failure is
said, with its test, in the file that `FAILURES` names.
"""

import logging
import os
from pathlib import Path

from vllm.distributed.eplb.policy import default

from moetuner.plugins.policy import Policy, Settings
from moetuner.plugins.vllm import policy_class


class Watched(Policy):
    """Our policy, which says where it failed."""

    def failed(self, instead, error):
        with Path(os.environ["FAILURES"]).open("a") as file:
            print(os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split()[0], error, file=file)
        super().failed(instead, error)


default.DefaultEplbPolicy = policy_class(
    default.DefaultEplbPolicy, Watched(Settings(rebalance=True), logging.getLogger("moetuner"))
)
