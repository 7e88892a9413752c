"""Checks of ExpertParallelMoE and of summed counters, which processes run. Only light imports."""

import contextlib
import io
import itertools
import os
import runpy
import traceback
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from placements import random_slots
from torch.utils.checkpoint import checkpoint
from waiting import waiting

import moetuner as mt
from moetuner.torch import ExpertParallelMoE, GroupedExperts, RoutingCounters, swiglu


def join(store, rank, ranks, work, arguments):
    """Join the process group of so many ranks, and return what the work returns there."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    limit = timedelta(hours=1)
    where = f"file://{store}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=limit)
    try:
        return work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def run_checks(rank, modules, folder):
    """Run all checks of modules for so many ranks; raise the first error, with its check's name.

    The other ranks are ended then: they may wait for this one.
    """
    checks = [import_module(name).CHECKS[dist.get_world_size()] for name in modules]
    for check in itertools.chain.from_iterable(checks):
        arguments = (rank, folder)[: check.__code__.co_argcount]
        try:
            check(*arguments)
        except Exception:
            raise AssertionError(f"{check.__name__}: {traceback.format_exc()}") from None
        dist.barrier()


def on(*ranks):
    """Make a function one of its module's checks, for these numbers of ranks."""

    def register(check):
        checks = check.__globals__.setdefault("CHECKS", {})
        for number in ranks:
            checks.setdefault(number, []).append(check)
        return check

    return register


def message(kind, call, *arguments, **named):
    """Return the text of the error that a call must raise."""
    try:
        call(*arguments, **named)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind}")


def in_slots(weights, slots):
    """Return the weights of the experts in slots [S]; NaN in empty slots, which nobody may read."""
    which = torch.tensor(slots)
    out = weights[which.clamp(min=0)].clone()
    out[which < 0] = float("nan")
    return out


def run_alone(hidden, index, weights, up, down, activation):
    """Compute a layer in one process, expert by expert."""
    out = torch.zeros_like(hidden)
    for expert in range(len(up)):
        token, k = (index == expert).nonzero(as_tuple=True)
        inner = activation(hidden[token] @ up[expert].T) @ down[expert].T
        out.index_add_(0, token, inner * weights[token, k, None])
    return out


class Case:
    """A random layer, placement and batch; all ranks draw the same from the same seed."""

    def __init__(self, seed, *, exact=True):
        ranks = dist.get_world_size()
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

        def draw(*size):
            numbers = rng.integers(-2, 3, size) if exact else rng.normal(size=size) / 2
            return torch.from_numpy(numbers).float()

        self.x, self.w = draw(tokens, self.hidden), draw(tokens, self.top_k).abs()
        up, self.activation = (inner, torch.relu) if exact else (2 * inner, swiglu)
        self.up = draw(self.experts, up, self.hidden)
        self.down = draw(self.experts, self.hidden, inner)

    def expected(self):
        """Compute the output of one process."""
        return run_alone(self.x, self.index, self.w, self.up, self.down, self.activation)

    def distributed(self, rank):
        """Make the layer of a rank."""
        slots = self.placement.slots[self.layer, rank]
        weights = (in_slots(of, slots) for of in (self.up, self.down))
        experts = GroupedExperts(*weights, self.activation).requires_grad_(False)
        options = {"devices_per_node": self.node, "split": self.split}
        return ExpertParallelMoE(experts, self.placement, self.layer, **options)

    def tokens_of(self, rank):
        """Return the tokens at home on a rank."""
        return torch.from_numpy(np.flatnonzero(self.home == rank))

    def run(self, layer, rank, **options):
        """Run the tokens of a rank through its layer."""
        at = self.tokens_of(rank)
        return layer(self.x[at], self.index[at], self.w[at], **({"first_token": at} | options))

    def is_right(self, layer, rank):
        """Return whether a pass in exact arithmetic is that of one process."""
        return torch.equal(self.run(layer, rank), self.expected()[self.tokens_of(rank)])

    def rows(self):
        """Return the rows that the evaluation predicts [D,D]."""
        ids = self.index.numpy()[:, None].repeat(2, axis=1)
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=self.experts)
        options = {"devices_per_node": self.node, "split": self.split}
        return mt.dispatch_rows(self.placement, trace, self.home, **options)[self.layer]


def check_case(rank, case, tolerance):
    """Compare a case with one process, with a second run, and with the predicted traffic."""
    layer = case.distributed(rank)
    once, twice = case.run(layer, rank), case.run(layer, rank)
    assert torch.equal(once, twice)
    if len(once):
        assert (once - case.expected()[case.tokens_of(rank)]).abs().max() < tolerance
    rows, traffic, row = 2 * case.rows(), layer.traffic, case.hidden * 4
    counts = {"rows": 1, "dispatch_bytes": row + 8 * case.top_k}
    for name, size in counts.items():
        assert np.array_equal(getattr(traffic, f"{name}_sent"), size * rows[rank])
        assert np.array_equal(getattr(traffic, f"{name}_received"), size * rows[:, rank])
    assert np.array_equal(traffic.combine_bytes_received, row * rows[rank])
    assert np.array_equal(traffic.combine_bytes_sent, row * rows[:, rank])


@on(2, 4, 8)
def test_exact_arithmetic_is_exact(rank):
    """Random placements, batches, nodes and rules: every index is right, and every byte counted."""
    for seed in range(20 if dist.get_world_size() == 4 else 8):
        check_case(rank, Case(seed), 1e-9)


@on(4)
def test_ordinary_arithmetic_differs_by_rounding(rank):
    """Within 1e-6 of one process in float32, the same bits in two runs; bfloat16 as it allows."""
    for seed in range(1000, 1012):
        check_case(rank, Case(seed, exact=False), 1e-6)
    case, half = Case(11, exact=False), Case(11, exact=False)
    for name in ("x", "up", "down"):
        setattr(half, name, getattr(case, name).bfloat16())
        setattr(case, name, getattr(half, name).float())
    out, expected, at = (
        half.run(half.distributed(rank), rank),
        case.expected(),
        case.tokens_of(rank),
    )
    assert out.dtype == torch.bfloat16
    assert not len(at) or (out - expected[at]).abs().max() < 0.02 * expected.abs().max()


@on(4)
def test_gradients_reach_every_rank(rank):
    """Gradients are those of one process, whoever needs them and whoever gets no rows."""
    last = dist.get_world_size() - 1
    for node, learns in itertools.product((None, 2), ("all", "experts", "last", "tokens")):
        case = Case(3, exact=False)
        case.node = node
        if learns != "all":  # one expert without copies has all tokens
            chosen = np.flatnonzero(case.placement.replicas[case.layer] == 1)[0]
            case.index, case.w = torch.full_like(case.index[:, :1], int(chosen)), case.w[:, :1]
        layer, at = case.distributed(rank), case.tokens_of(rank)
        layer.requires_grad_(learns in ("all", "experts") or (learns == "last" and rank == last))
        tensors = (case.x, case.w, case.up, case.down)
        x, w, up, down = (tensor.clone().requires_grad_(True) for tensor in tensors)
        run_alone(x, case.index, w, up, down, swiglu).square().sum().backward()
        need = learns == "all" or (learns == "tokens" and rank == 0)
        own = [of.detach()[at].requires_grad_(need) for of in (x, w)]
        layer(own[0], case.index[at], own[1], first_token=at).square().sum().backward()
        pairs = [(mine, whole.grad[at]) for mine, whole in zip(own, (x, w), strict=True)]
        slots = torch.from_numpy(case.placement.slots[case.layer, rank].copy()).long()
        for weight, whole in zip(layer.experts.weights().values(), (up, down), strict=True):
            if learns != "all":
                right = whole.grad[slots.clamp(min=0)]
                right[slots < 0] = 0
                pairs.append((weight, right))
                continue
            # Copies of an expert have a part of its gradient each.
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            total = torch.zeros_like(whole)
            total.index_add_(0, slots[slots >= 0], gradient[slots >= 0])
            dist.all_reduce(total)
            assert torch.allclose(total, whole.grad, rtol=0, atol=1e-5)
        for mine, right in pairs:
            right = right if mine.requires_grad else torch.zeros_like(right)
            gradient = torch.zeros_like(right) if mine.grad is None else mine.grad
            assert torch.allclose(gradient, right, rtol=1e-4, atol=1e-5), (node, learns)


@on(4)
def test_recomputation_finds_the_same_copies(rank):
    """Activation checkpointing runs a layer again in the backward pass: no position has moved."""
    case = Case(3, exact=False)
    gradients = []
    for again in (False, True):
        layer, at = case.distributed(rank).requires_grad_(True), case.tokens_of(rank)
        with torch.no_grad():  # what is served in between moves positions on
            case.run(layer, rank, first_token=None)
        x = case.x[at].requires_grad_(True)

        def run(x, layer=layer, at=at):
            return layer(x, case.index[at], case.w[at])

        out = checkpoint(run, x, use_reentrant=False) if again else run(x)
        out.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@on(4)
def test_small_steps_use_all_copies_as_predicted(rank):
    """Positions run on: every copy gets its share, and the prediction has each row."""
    ranks = dist.get_world_size()
    placement = mt.Placement([[[0, rank + 1] for rank in range(ranks)]], num_experts=ranks + 1)
    for batch, steps in ((1, 60), (3, 20)):
        experts = GroupedExperts(torch.zeros(2, 2, 1), torch.zeros(2, 1, 1)).requires_grad_(False)
        layer = ExpertParallelMoE(experts, placement, 0)
        for _ in range(steps):
            layer(torch.ones(batch, 1), torch.zeros(batch, 1).long(), torch.ones(batch, 1))
        tokens = steps * ranks * batch
        ids = np.zeros((tokens, 1, 1), int)
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=ranks + 1)
        rows = mt.dispatch_rows(placement, trace, np.arange(tokens) // batch % ranks)[0]
        assert layer.traffic.rows_sent.tolist() == rows[rank].tolist()
        arrived = rows.sum(axis=0)
        assert np.abs(arrived - arrived.mean()).max() < 4 * arrived.mean() ** 0.5


@on(4)
def test_the_host_waits_once_for_an_exchange(rank):
    """Only the numbers of rows are read from the device, once per hop, and what experts ask."""
    for node, waits in ((None, 1), (2, 2)):
        case = Case(7)
        case.node = node
        layer = case.distributed(rank)
        forward = layer.experts.forward
        with waiting() as names:

            def uncounted(*arguments, forward=forward, names=names):
                before = len(names)
                out = forward(*arguments)
                del names[before:]
                return out

            layer.experts.forward = uncounted
            case.run(layer, rank)
        assert names == ["tolist"] * waits


@on(4)
def test_bytes_under_autocast_are_those_of_the_wire(rank):
    """Results go back in the type of the tokens, on every rank, and are counted so."""
    case = Case(7)
    with torch.autocast("cpu", torch.bfloat16):
        check_case(rank, case, 0.02 * case.expected().abs().max())
        assert case.run(case.distributed(rank), rank).dtype == case.x.dtype


FAULTS = (
    # What rank 1 gives, what it says itself, and what the others say.
    (lambda x, i, w, p: (x, i, w * float("nan"), p), "rank 1: top_k_weights must be finite", ""),
    (lambda x, i, w, p: (x, i + 1000, w, p), "rank 1: top_k_index must be experts of the pl", ""),
    (lambda x, i, w, p: (x, i - 1000, w, p), "rank 1: top_k_index must be experts of the pl", ""),
    (lambda x, i, w, p: (x, i[:2], w, p), "must be [T,H], [T,K] and [T,K], got", "do not fit"),
    (lambda x, i, w, p: (x[0], i, w, p), "must be [T,H], [T,K] and [T,K], got", "do not fit"),
    (lambda x, i, w, p: (x.double(), i, w, p), "must be torch.float32 like the", "do not fit"),
    (lambda x, i, w, p: (x, w, i, p), "top_k_index must be integers and top_k", "do not fit"),
    (lambda x, i, w, p: (x, i.repeat(1, 2), w.repeat(1, 2), p), "rows of another size or", ""),
    (lambda x, i, w, p: (x, i, w, torch.zeros(2).long()), "first_token must be an", "do not fit"),
    (lambda x, i, w, p: (x.to("meta"), i, w, p), "must be on cpu like the experts", "do not fit"),
)


@on(2)
def test_a_fault_on_one_rank_is_an_error_on_all(rank):
    """Nobody waits for a rank that has refused its input, and the next step works."""
    for fault, own, others in FAULTS:
        case = Case(7)
        layer = case.distributed(rank)
        given = (case.x[:3], case.index[:3], case.w[:3], 0)
        *given, first = fault(*given) if rank == 1 else given
        error = message((ValueError, RuntimeError), layer, *given, first_token=first)
        assert (own if rank == 1 else others or own) in error, error
        assert case.is_right(layer, rank)


@on(4)
def test_ranks_with_other_placements_do_not_exchange(rank):
    """The fingerprints differ, so nothing is sent."""
    case = Case(7)
    if rank == 1:
        slots = case.placement.slots[:, :, ::-1]
        case.placement = mt.Placement(slots, num_experts=case.experts)
    error = message(RuntimeError, case.run, case.distributed(rank), rank)
    others = "[0, 2, 3]" if rank == 1 else "[1]"
    assert f"ranks {others} have other placements than rank {rank}: nothing was sent" in error


@on(2)
def test_what_does_not_fit_is_refused_at_once(rank):
    """Devices, layers, slots, nodes and rules that cannot be; no exchange takes place."""
    placement, weight = Case(7).placement, torch.zeros(Case(7).placement.slots_per_device, 2, 2)
    devices = mt.Placement(np.zeros((1, 3, 1), dtype=int))
    for slots, given, layer, options, text in (
        (weight, devices, 0, {}, "placement must have 2 devices, the ranks of the group, got 3"),
        (weight, placement, 5, {}, "layer must be from 0 to 1, got 5"),
        (weight[:1], placement, 0, {}, "up must have the placement's 9 slots, got [1, 2, 2]"),
        (weight, placement, 0, {"devices_per_node": 3}, "must divide the devices (2), got 3"),
        (weight, placement, 0, {"split": "best"}, "split must be one of even, nearest, got 'best'"),
    ):
        experts = GroupedExperts(slots, slots)
        error = message(ValueError, ExpertParallelMoE, experts, given, layer, **options)
        assert text in error, error


@on(1)
def test_grouped_products_are_those_of_the_slots():
    """What CUDA runs, as far as the CPU has it as well."""
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 32, 16), (4, 16, 16), (9, 16)
    up, down, rows = (torch.randn(*size, generator=generator).bfloat16() for size in sizes)
    experts = GroupedExperts(up, down).requires_grad_(False)
    counts = torch.tensor([3, 0, 5, 1])
    assert experts._can_group(rows)
    assert not experts._can_group(rows[:0])
    expected = experts(rows, counts)
    difference = (experts._grouped(rows, counts) - expected).abs().max()
    assert difference < 0.02 * expected.abs().max()


TOKENS = (35, 20, 0)  # the last rank has none, the first more windows than the others


@on(3)
def test_counters_are_summed_over_ranks(rank):
    """Every rank gets the sum, window by window; who counts otherwise is an error on all ranks."""
    alike = message(ValueError, RoutingCounters(3 - rank % 2, 8, 2).all_reduce)
    assert alike == "ranks must count alike, got layers from 2 to 3"
    ids = [np.random.default_rng(n).random((n, 3, 8)).argsort(2)[:, :, :2] for n in TOKENS]
    traces = [mt.RoutingTrace.from_arrays(of, num_experts=8) for of in ids]
    parts = [mt.RoutingStatistics.from_trace(trace, window=10) for trace in traces]
    load = np.zeros((4, 3, 8), dtype=np.uint64)
    for part in parts:
        load[: part.windows] += part.window_load
    pairs = (sum(part.transitions for part in parts), sum(part.coactivation for part in parts))
    counters = RoutingCounters(3, 8, 2, window=10)
    counters.update(torch.from_numpy(ids[rank]))
    total = counters.all_reduce().statistics()
    assert total.fingerprint == mt.RoutingStatistics(load, *pairs).fingerprint
    assert (total.windows, total.window) == (4, 30)
    assert counters.statistics().total_load.sum() == TOKENS[rank] * 3 * 2


@on(4)
def test_the_example_predicts_and_moves(rank):
    """It counts what it predicts, and moves experts when the traffic changes."""
    text = io.StringIO()
    own = {"init_process_group": mock.DEFAULT, "destroy_process_group": mock.DEFAULT}
    with mock.patch.multiple(dist, **own), contextlib.redirect_stdout(text):
        example = Path(__file__).parents[2] / "examples" / "expert_parallel.py"
        runpy.run_path(str(example), run_name="__main__")
    counts, *decisions = text.getvalue().splitlines()
    sent, predicted = counts.removeprefix(f"rank {rank}: ").split(" rows sent, ")
    assert predicted == f"{sent} predicted"
    if rank == 0:
        moved = ["the move pays" in line for line in decisions]
        assert len(moved) == 4
        assert any(moved[2:])
        assert not all(moved)
