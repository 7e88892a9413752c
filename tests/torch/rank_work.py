"""What the processes of the torch tests do. Only torch, numpy, moetuner and what is as light."""

import contextlib
import io
import os
import runpy
from datetime import timedelta
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from placements import random_slots
from torch.utils.checkpoint import checkpoint
from waiting import Waiting

import moetuner as mt
from moetuner.torch import ExpertParallelMoE, GroupedExperts, RoutingCounters, swiglu


def example(rank, path):
    """Give what an example prints that joins and leaves on its own."""
    said = io.StringIO()
    with (
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        contextlib.redirect_stdout(said),
    ):
        runpy.run_path(path, run_name="__main__")
    return said.getvalue().splitlines()


def joined(store, rank, ranks, work, arguments):
    """Join the group, call, leave."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    limit = timedelta(seconds=30)
    where = f"file://{store}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=limit)
    try:
        return work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def in_slots(weights, slots):
    """Weights of the experts in slots [S]; nonsense in empty slots, which nobody may read."""
    which = torch.tensor(slots)
    out = weights[which.clamp(min=0)].clone()
    out[which < 0] = float("nan")
    return out


def single(hidden, index, weights, up, down, activation):
    """Compute the layer in one process, expert by expert."""
    out = torch.zeros_like(hidden)
    for expert in range(len(up)):
        token, k = (index == expert).nonzero(as_tuple=True)
        inner = activation(hidden[token] @ up[expert].T) @ down[expert].T
        out.index_add_(0, token, inner * weights[token, k, None])
    return out


class Case:
    """A random layer, placement and batch; all ranks draw the same from the same seed."""

    def __init__(self, seed, ranks, *, exact):
        rng = np.random.default_rng(seed)
        self.experts = int(rng.integers(2, 17))
        self.top_k = int(rng.integers(1, min(self.experts, 6) + 1))
        self.hidden, inner = int(rng.integers(1, 9)), int(rng.integers(1, 9))
        spare = int(rng.integers(0, 3))
        slots = random_slots(rng, 2, ranks, self.experts, spare)
        self.placement = mt.Placement(slots, num_experts=self.experts)
        self.node = [None, 1, 2, ranks][int(rng.integers(0, 4))]
        self.split = ["even", "nearest"][int(rng.integers(0, 2))]
        self.layer = int(rng.integers(0, 2))
        # Some ranks may have no tokens, or all of them.
        self.home = np.sort(rng.choice(rng.permutation(ranks)[: rng.integers(1, ranks + 1)], 24))
        tokens = len(self.home)
        scores = rng.gumbel(size=(tokens, self.experts))
        self.index = torch.from_numpy(np.argsort(-scores, axis=1)[:, : self.top_k].copy())
        up = 2 * inner
        if exact:
            draw = {
                "x": rng.integers(-2, 3, (tokens, self.hidden)),
                "w": rng.integers(0, 9, (tokens, self.top_k)) / 8,
                "up": rng.integers(-1, 2, (self.experts, inner, self.hidden)),
                "down": rng.integers(-1, 2, (self.experts, self.hidden, inner)),
            }
            self.activation = torch.relu
        else:
            draw = {
                "x": rng.normal(size=(tokens, self.hidden)),
                "w": rng.dirichlet(np.ones(self.top_k), tokens),
                "up": rng.normal(size=(self.experts, up, self.hidden)) / self.hidden**0.5,
                "down": rng.normal(size=(self.experts, self.hidden, inner)) / inner**0.5,
            }
            self.activation = swiglu
        self.x, self.w, self.up, self.down = (
            torch.from_numpy(array).float() for array in draw.values()
        )

    def expected(self):
        """Compute in one process."""
        return single(self.x, self.index, self.w, self.up, self.down, self.activation)

    def distributed(self, rank):
        """Make the layer of this rank."""
        slots = self.placement.slots[self.layer, rank]
        experts = GroupedExperts(
            in_slots(self.up, slots), in_slots(self.down, slots), self.activation
        ).requires_grad_(False)
        return ExpertParallelMoE(
            experts,
            self.placement,
            self.layer,
            devices_per_node=self.node,
            split=self.split,
        )

    def mine(self, rank):
        """Positions of the tokens of this rank."""
        return torch.from_numpy(np.flatnonzero(self.home == rank))

    def run(self, layer, rank):
        """One forward pass of this rank's tokens."""
        at = self.mine(rank)
        return layer(self.x[at], self.index[at], self.w[at], first_token=at)

    def rows(self):
        """Rows that the evaluation predicts [D,D]."""
        ids = self.index.numpy()[:, None].repeat(2, axis=1)
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=self.experts)
        predicted = mt.dispatch_rows(
            self.placement,
            trace,
            self.home,
            split=self.split,
            devices_per_node=self.node,
        )
        return predicted[self.layer]


def decoding(rank, batch, steps):
    """Take small steps: whether the rows are those predicted, and which copies of one they use."""
    ranks = dist.get_world_size()
    slots = np.array([[[0, rank + 1] for rank in range(ranks)]])
    placement = mt.Placement(slots, num_experts=ranks + 1)
    experts = GroupedExperts(torch.zeros(2, 2, 1), torch.zeros(2, 1, 1)).requires_grad_(False)
    layer = ExpertParallelMoE(experts, placement, 0)
    index = torch.zeros(batch, 1, dtype=torch.int64)
    for _ in range(steps):
        layer(torch.ones(batch, 1), index, torch.ones(batch, 1))
    tokens = steps * ranks * batch
    trace = mt.RoutingTrace.from_arrays(np.zeros((tokens, 1, 1), int), num_experts=ranks + 1)
    home = np.arange(tokens) // batch % ranks
    rows = mt.dispatch_rows(placement, trace, home)[0]
    return layer.traffic.rows_sent.tolist() == rows[rank].tolist(), rows.tolist()


def recomputed(rank):
    """Whether a layer that is checkpointed gives the gradients of one that is not."""
    case = Case(3, dist.get_world_size(), exact=False)
    gradients = []
    for again in (False, True):
        layer, at = case.distributed(rank).requires_grad_(True), case.mine(rank)
        with torch.no_grad():  # what is served in between moves positions on
            layer(case.x[at], case.index[at], case.w[at])
        x = case.x[at].requires_grad_(True)

        def run(x, layer=layer, at=at):
            return layer(x, case.index[at], case.w[at])

        out = checkpoint(run, x, use_reentrant=False) if again else run(x)
        out.square().sum().backward()
        gradients.append(x.grad)
    return torch.equal(*gradients)


def waits(rank, node):
    """Give the calls of a pass in which host and device wait, but for those of the experts."""
    case = Case(7, dist.get_world_size(), exact=True)
    case.node = node
    layer, at = case.distributed(rank), case.mine(rank)
    forward = layer.experts.forward
    with Waiting() as waiting:

        def uncounted(*arguments):
            before = len(waiting.names)
            out = forward(*arguments)
            del waiting.names[before:]
            return out

        layer.experts.forward = uncounted
        layer(case.x[at], case.index[at], case.w[at], first_token=at)
    return waiting.names


def switched(rank):
    """Whether tables stay where they are when the placement changes, and what a pass gives."""
    case = Case(7, dist.get_world_size(), exact=True)
    layer, at = case.distributed(rank), case.mine(rank)
    routes = layer.routes
    tensors = [name for name, value in vars(routes).items() if isinstance(value, torch.Tensor)]
    before = {name: getattr(routes, name).data_ptr() for name in tensors}
    case.placement = mt.Placement(
        np.roll(case.placement.slots, 1, axis=1), num_experts=case.experts
    )
    other = case.distributed(rank)
    for name, weight in layer.experts.weights().items():
        weight.copy_(other.experts.weights()[name])
    layer.switch(case.placement)
    after = {name: getattr(layer.routes, name).data_ptr() for name in tensors}
    return len(tensors), before == after, torch.equal(case.run(layer, rank), case.expected()[at])


def autocast(rank):
    """Bytes on the wire and bytes counted, where experts give bfloat16 for float32."""
    case = Case(7, dist.get_world_size(), exact=True)
    layer, at = case.distributed(rank), case.mine(rank)
    wire, original = [], dist.all_to_all_single

    def listen(out, rows, received=None, sent=None, **named):
        if sent is not None:
            away = sum(count for peer, count in enumerate(sent) if peer != rank)
            wire.append(away * rows[:1].numel() * rows.element_size())
        return original(out, rows, received, sent, **named)

    with (
        mock.patch.object(dist, "all_to_all_single", listen),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = layer(case.x[at], case.index[at], case.w[at], first_token=at)
    counted = layer.traffic.dispatch_bytes_sent.sum() + layer.traffic.combine_bytes_sent.sum()
    return sum(wire) == counted, bool(torch.isfinite(out).all()), out.dtype == case.x.dtype


def configurations(rank, seeds, exact):
    """Give the seeds where one process, a second run or the predicted traffic differ."""
    wrong = []
    for seed in seeds:
        case = Case(seed, dist.get_world_size(), exact=exact)
        layer = case.distributed(rank)
        once, twice = case.run(layer, rank), case.run(layer, rank)
        expected = case.expected()[case.mine(rank)]
        difference = (once - expected).abs().max().item() if len(once) else 0.0
        rows, traffic = 2 * case.rows(), layer.traffic
        row = case.hidden * 4
        counted = (
            np.array_equal(traffic.rows_sent, rows[rank])
            and np.array_equal(traffic.rows_received, rows[:, rank])
            and np.array_equal(traffic.dispatch_bytes_sent, rows[rank] * (row + 8 * case.top_k))
            and np.array_equal(traffic.combine_bytes_received, rows[rank] * row)
            and np.array_equal(traffic.combine_bytes_sent, rows[:, rank] * row)
        )
        if not (difference < (1e-9 if exact else 1e-6) and torch.equal(once, twice) and counted):
            wrong.append((seed, difference))
    return wrong


def sizes(case):
    """Give the arguments of a forward pass of three tokens."""
    return case.x[:3], case.index[:3], case.w[:3]


def bad_input(rank, fault):
    """Give rank 1 a wrong input; all ranks must raise, and the next step must work."""
    case = Case(7, dist.get_world_size(), exact=True)
    layer = case.distributed(rank)
    given = (case.x[:3], case.index[:3], case.w[:3], 0)
    if rank == 1:
        given = FAULTS[fault](*given)
    try:
        layer(*given[:3], first_token=given[3])
    except (ValueError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = "no error"
    at = case.mine(rank)
    return message, torch.equal(case.run(layer, rank), case.expected()[at])


FAULTS = {
    "nan": lambda x, index, w, first: (x, index, w * float("nan"), first),
    "expert": lambda x, index, w, first: (x, index + 1000, w, first),
    "negative": lambda x, index, w, first: (x, index - 1000, w, first),
    "shape": lambda x, index, w, first: (x, index[:2], w, first),
    "flat": lambda x, index, w, first: (x[0], index, w, first),
    "dtype": lambda x, index, w, first: (x.double(), index, w, first),
    "swapped": lambda x, index, w, first: (x, w, index, first),
    "top_k": lambda x, index, w, first: (x, index.repeat(1, 2), w.repeat(1, 2), first),
    "position": lambda x, index, w, _: (x, index, w, torch.zeros(2, dtype=torch.int64)),
    "device": lambda x, index, w, first: (x.to("meta"), index, w, first),
}


def other_placement(rank):
    """Give what is said where rank 1 believes in other slots."""
    case = Case(7, dist.get_world_size(), exact=True)
    if rank == 1:
        slots = case.placement.slots[:, :, ::-1]
        case.placement = mt.Placement(slots, num_experts=case.experts)
    try:
        case.run(case.distributed(rank), rank)
    except RuntimeError as error:
        return str(error)
    return "no error"


def two_ranks(rank):
    """Give what wrong inputs of rank 1 say, what does not fit, and if tables stay in place."""
    said = {fault: bad_input(rank, fault) for fault in FAULTS}
    return said, no_fit(rank), switched(rank)


def four_ranks(rank):
    """Give what the layer computes and counts in all kinds of cases."""
    return {
        "exact": configurations(rank, range(200), True),
        "rounded": configurations(rank, range(1000, 1030), False),
        "half": half(rank),
        "gradients": [gradients(rank, node) for node in (None, 2)],
        "other placement": other_placement(rank),
        "decoding": [decoding(rank, *sizes) for sizes in ((1, 60), (3, 20))],
        "recomputed": recomputed(rank),
        "autocast": autocast(rank),
        "waits": [waits(rank, node) for node in (None, 2)],
    }


def no_fit(rank):
    """Placements for other numbers of devices, layers and slots; no exchange takes place."""
    case = Case(7, dist.get_world_size(), exact=True)
    weight = torch.zeros(case.placement.slots_per_device, 2, 2)
    wrong = mt.Placement(np.zeros((1, 3, 1), dtype=int))
    messages = []
    for slots, placement, layer, options in [
        (weight, wrong, 0, {}),
        (weight, case.placement, 5, {}),
        (torch.zeros(99, 2, 2), case.placement, 0, {}),
        (weight, case.placement, 0, {"devices_per_node": 3}),
        (weight, case.placement, 0, {"split": "best"}),
    ]:
        try:
            ExpertParallelMoE(GroupedExperts(slots, slots), placement, layer, **options)
        except ValueError as error:
            messages.append(str(error))
    return messages


def gradients(rank, node):
    """Give the largest differences of all gradients to one process."""
    case = Case(3, dist.get_world_size(), exact=False)
    case.node = node
    layer = case.distributed(rank).requires_grad_(True)
    names = ("x", "w", "up", "down")
    whole = {name: getattr(case, name).clone().requires_grad_(True) for name in names}
    expected = single(
        *(whole[n] if n != "i" else case.index for n in ("x", "i", *names[1:])), swiglu
    )
    expected.square().sum().backward()
    at = case.mine(rank)
    x, w = case.x[at].requires_grad_(True), case.w[at].requires_grad_(True)
    layer(x, case.index[at], w, first_token=at).square().sum().backward()
    differences = [
        (mine.grad - all_of.grad[at]).abs().max().item() if len(at) else 0.0
        for mine, all_of in ((x, whole["x"]), (w, whole["w"]))
    ]
    # Copies of an expert have a part of its gradient each.
    for name, weight in layer.experts.weights().items():
        total = torch.zeros_like(whole[name])
        slots = torch.from_numpy(case.placement.slots[case.layer, rank].copy()).long()
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        total.index_add_(0, slots[slots >= 0], gradient[slots >= 0])
        dist.all_reduce(total)
        differences.append((total - whole[name].grad).abs().max().item())
    return differences


def half(rank):
    """Give the relative difference in bfloat16."""
    case = Case(11, dist.get_world_size(), exact=False)
    for name in ("x", "up", "down"):
        setattr(case, name, getattr(case, name).bfloat16())
    layer = case.distributed(rank)
    out, at = case.run(layer, rank), case.mine(rank)
    assert out.dtype == torch.bfloat16
    for name in ("x", "up", "down"):
        setattr(case, name, getattr(case, name).float())
    expected = case.expected()
    return ((out - expected[at]).abs().max() / expected.abs().max()).item() if len(at) else 0.0


def grouped(rank):
    """Give the largest difference of the grouped product to one product per slot."""
    generator = torch.Generator().manual_seed(0)
    up, down = (
        torch.randn(4, 32, 16, generator=generator),
        torch.randn(4, 16, 16, generator=generator),
    )
    experts = GroupedExperts(up.bfloat16(), down.bfloat16()).requires_grad_(False)
    rows = torch.randn(9, 16, generator=generator).bfloat16()
    counts = torch.tensor([3, 0, 5, 1])
    assert experts._can_group(rows)
    assert not experts._can_group(rows[:0])
    expected = experts(rows, counts)
    difference = (experts._grouped(rows, counts) - expected).abs().max()
    return (difference / expected.abs().max()).item()


def summed(rank, ids):
    """Sum counters of different sizes, then of tokens of this rank: what is said and counted."""
    said = "no error"
    try:
        RoutingCounters(3 - rank % 2, 8, 2).all_reduce()
    except ValueError as error:
        said = str(error)
    counters = RoutingCounters(3, 8, 2, window=10)
    counters.update(torch.from_numpy(ids[rank]))
    total = counters.all_reduce().statistics()
    own = int(counters.statistics().total_load.sum())
    return said, own, total.fingerprint, total.windows, total.window
