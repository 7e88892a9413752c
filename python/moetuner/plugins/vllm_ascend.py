"""vllm-ascend's entry point: replaces its balancer's policies if the environment asks for it.

Its first model runner has a balancer of its own; the second runs vLLM's, which ``plugins.vllm``
serves where the policy named default decides. The policies were tested with 0.26.0rc1, outside the
engine.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log, quote_error
from moetuner.plugins.settings import Settings
from moetuner.plugins.tensors import find_process_rank, read_array
from moetuner.solver.rebalancing import slowest

LOG = Log(logging.getLogger("vllm.moetuner"))


def register() -> None:
    """Replace all policy types by ours; do nothing without ``MOETUNER_`` variables."""
    try:
        settings = Settings.from_environment()
    except ValueError:
        return  # vLLM's entry point has warned of it
    try:
        if settings is not None and importlib.util.find_spec("vllm_ascend") is not None:
            replace_policies(settings)
    except Exception as error:
        # Another version: vLLM would not start if this were raised.
        LOG.warn(f"vllm-ascend keeps its own policies: {error!r}")


def replace_policies(settings: Settings) -> None:
    """Put our policy around those of vllm-ascend, only once."""
    from vllm_ascend.eplb.core.policy.policy_factory import PolicyFactory

    theirs = PolicyFactory.generate_policy
    if hasattr(theirs, "moetuner"):
        return
    balancer = Balancer(settings, LOG)

    def generate_policy(*arguments: Any, **named: Any) -> AscendPolicy:
        return AscendPolicy(theirs(*arguments, **named), balancer, find_process_rank())

    generate_policy.moetuner = True  # type: ignore[attr-defined]
    PolicyFactory.generate_policy = staticmethod(generate_policy)


class AscendPolicy:
    """A policy of vllm-ascend that decides by ours, and by ``theirs`` if ours fails.

    It can be pickled, as it may run in another process than the one that makes it. Every rank calls
    it there, with the same loads, in a process without a rank; so ``rank`` is that of the process
    that makes it, and rank 0 alone records, and logs at INFO.
    """

    def __init__(self, theirs: Any, balancer: Balancer, rank: int = 0) -> None:
        self.theirs, self.balancer, self.rank = theirs, balancer, rank

    def rebalance_experts(self, current_expert_table: Any, expert_workload: Any) -> Any:
        """Return whether the table changes, layers by falling gain, and the table [L,D,S].

        It takes experts [L,D,S] and the load of every slot [L,D,S], or [W,L,D,S] in windows.
        """
        try:
            slots = read_array(current_expert_table)
            windows = count_loads(slots, read_array(expert_workload))
        except Exception as error:
            self.balancer.log.warn(f"vllm-ascend's own policy decides: {quote_error(error)}")
            return self.theirs.rebalance_experts(current_expert_table, expert_workload)
        self.balancer.record(windows, self.rank)
        layers, ranks, width = slots.shape
        # This runs in a process beside each rank, which is in no group of torch's: ranks are given
        # the same loads and decide alike, but cannot compare what they read.
        sizes, running = (ranks * width, None, 1, ranks), slots.reshape(layers, -1)
        full = self.balancer.decide(windows, *sizes, running, rank=self.rank, sparse=None)
        if full is None:
            return self.theirs.rebalance_experts(current_expert_table, expert_workload)
        placed = full.reshape(slots.shape)
        gain = slowest(windows, slots) - slowest(windows, placed)
        order = np.argsort(-gain, kind="stable")
        return int((placed != slots).any()), order, placed.tolist()


def count_loads(slots: NDArray[np.integer[Any]], workload: NDArray[Any]) -> NDArray[np.float64]:
    """Add up the loads of slots [..., L,D,S] by their experts: windows [W,L,E]."""
    layers, largest = len(slots), int(slots.max())
    if largest >= slots[0].size:
        raise ValueError(
            f"current_expert_table must hold experts below the {slots[0].size} slots of a layer, "
            f"got {largest}"
        )
    windows = workload.reshape(-1, layers, slots[0].size)
    experts = slots.reshape(1, layers, -1)
    load = np.zeros((len(windows), layers, largest + 1))
    window, layer = np.arange(len(windows))[:, None, None], np.arange(layers)[None, :, None]
    np.add.at(load, (window, layer, experts), np.maximum(windows, 0) * (experts >= 0))
    return load
