"""Run an MoE layer on several processes by a placement, and rebalance it while it runs.

torchrun --nproc-per-node 4 examples/expert_parallel.py
"""

import os

import numpy as np
import torch
import torch.distributed as dist

import moetuner as mt
from moetuner.evaluation.rows import dispatch_rows
from moetuner.torch import ExpertParallelMoE, GroupedExperts, Rebalancer

EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 16, 2, 32, 64, 512


class PerToken:
    """A device takes so many microseconds per token; see moetuner.CostModel for real ones."""

    def compute_us(self, tokens, active=None):
        """Give the time of devices for their tokens."""
        return 5.0 * np.asarray(tokens)


def routed(step: int) -> torch.Tensor:
    """Experts of all tokens [T,K]; what is popular changes at step 10."""
    rng = np.random.default_rng(step)
    popular = np.roll(np.linspace(2, 0, EXPERTS), 5 * (step // 10))
    scores = rng.gumbel(size=(TOKENS, EXPERTS)) + popular
    return torch.from_numpy(np.argsort(-scores, axis=1)[:, :TOP_K].copy())


def main() -> None:
    """Place, run, compare the counted rows with the predicted ones, rebalance, run on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    # What was routed yesterday, placed for today. Every rank solves alike.
    trace = mt.RoutingTrace.from_arrays(routed(0)[:, None].numpy(), num_experts=EXPERTS)
    placement = mt.solve(mt.Problem(trace, mt.Topology(ranks)), "lpt").placement

    # The experts of this rank's slots, out of weights that every rank could load.
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / INNER**0.5
    mine = torch.tensor(placement.slots[0, rank]).long()
    experts = GroupedExperts(up[mine], down[mine]).requires_grad_(False)
    layer = ExpertParallelMoE(experts, placement, 0)
    # Five steps of few tokens are noisy counts: what gains less than a tenth may be chance.
    rebalancer = Rebalancer([layer], PerToken(), steps_ahead=100_000, decay=0.5, dead_zone=0.1)

    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    part = torch.arange(TOKENS).tensor_split(ranks)[rank]
    for step in range(20):
        index = routed(step)
        weights = torch.full((len(part), TOP_K), 1 / TOP_K)
        layer(x[part], index[part], weights, first_token=int(part[0]))
        if step == 0:
            sent = int(layer.traffic.rows_sent.sum())
            predicted = int(dispatch_rows(placement, trace, "blocks")[0, rank].sum())
            print(f"rank {rank}: {sent} rows sent, {predicted} predicted", flush=True)
        if step % 5 == 4:
            # A running engine counts with RoutingCounters and sums over ranks.
            counts = np.bincount(index.numpy().ravel(), minlength=EXPERTS)
            rebalancer.observe(counts[None], steps=1)
            decision = rebalancer.step()
            if rank == 0:
                print(f"step {step}: {decision.reason}, {decision.experts_moved} experts")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
