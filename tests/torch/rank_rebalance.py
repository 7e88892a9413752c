"""Checks of the Rebalancer, which processes run: a move happens everywhere or nowhere."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from placements import random_slots
from rank_layer import in_slots, message, on, run_alone

import moetuner as mt
from moetuner.plugins import consensus
from moetuner.solver.rebalancing import rebalance
from moetuner.torch import ExpertParallelMoE, GroupedExperts, MoveError, Rebalancer, swiglu
from moetuner.torch.parallel.agreement import Agreement
from moetuner.torch.parallel.migrate import Spares

LAYERS, EXPERTS, HIDDEN, INNER, TOP_K = 3, 8, 6, 5, 2
# Ranks that are there are waited for as long as it takes.
PATIENCE = 3600.0
# Not so for weights of a rank that is away, which do not come.
SHORT = 0.5
# Nor for a store that stands still.
SOON = 0.2


class Absence:
    """A record of which ranks are away in which step, and the clock of those that wait for them.

    Time stands still until somebody is away and all others have posted: then it is over. So nobody
    gives up on a rank that is only slow, as on a busy machine, and nobody waits in vain.
    """

    def __init__(self, rank):
        self.rank, self.ranks = rank, dist.get_world_size()
        self.store = dist.distributed_c10d._get_default_store()
        self.step, self.is_over, self.asked = 0, False, None

    @contextlib.contextmanager
    def watched(self):
        """Let this rank wait by this clock."""

        def agree(store, key, rank, size, **more):
            self.is_over = False
            if store.check([consensus.verdict_key(key)]):
                # The others are past this question, and wait in vain for an answer to the next.
                self.begin(self.step)
            self.asked = lambda others: store.check(
                [consensus.list_keys(key, size)[of] for of in others]
            )
            return consensus.agree(store, key, rank, size, **more)

        with (
            mock.patch.object(consensus, "time", self),
            mock.patch("moetuner.torch.parallel.agreement.agree", agree),
        ):
            yield

    def monotonic(self):
        return 1e9 if self.is_over else 0.0

    def sleep(self, seconds):
        time.sleep(seconds)
        away = [of for of in range(self.ranks) if self._is(f"away/{self.step}/{of}")]
        others = [of for of in range(self.ranks) if of not in away]
        # Rank 0 judges; only where it is away do the others.
        if away and self.rank in (0, *((self.rank,) if 0 in away else ())):
            self.is_over = self.asked(others)

    def begin(self, step):
        """Note that this rank is away in a step."""
        self.store.set(f"away/{step}/{self.rank}", "")

    def end(self):
        """Wait until all others have given up in this step."""
        others = [of for of in range(self.ranks) if of != self.rank]
        while not all(self._is(f"gave up/{self.step}/{of}") for of in others):
            time.sleep(0.01)

    def give_up(self):
        """Note that this rank waits no more in this step."""
        self.store.set(f"gave up/{self.step}/{self.rank}", "")

    def _is(self, key):
        return self.store.check([key])


def linear(token_us):
    """Make a cost model of so many microseconds per token."""
    return SimpleNamespace(compute_us=lambda tokens, _active: token_us * np.asarray(tokens))


class Model:
    """A stack of MoE layers under traffic that changes; all ranks draw the same."""

    def __init__(self, rank, *, exact=True, **options):
        self.rank, self.ranks = rank, dist.get_world_size()
        self.rng = rng = np.random.default_rng(5)
        self.activation, up = (torch.relu, INNER) if exact else (swiglu, 2 * INNER)
        shapes = {"up": (LAYERS, EXPERTS, up, HIDDEN), "down": (LAYERS, EXPERTS, HIDDEN, INNER)}
        self.weights = {
            name: torch.from_numpy(
                rng.integers(-1, 2, of) if exact else rng.normal(size=of) / HIDDEN**0.5
            ).float()
            for name, of in shapes.items()
        }
        slots = random_slots(rng, LAYERS, self.ranks, EXPERTS, 1)
        self.start = mt.Placement(slots, num_experts=EXPERTS)
        self.layers = [self.layer(number) for number in range(LAYERS)]
        # So many steps that it does not matter how long a busy machine takes to decide.
        defaults = {"cost_model": linear(10.0), "steps_ahead": 10**9, "timeout": PATIENCE}
        self.rebalancer = Rebalancer(self.layers, **(defaults | options))
        self.favourites = np.zeros((LAYERS, EXPERTS))
        self.load = np.zeros((LAYERS, EXPERTS), dtype=np.int64)

    def layer(self, number):
        """Make a layer as it is at the start."""
        slots = self.start.slots[number, self.rank]
        up, down = (in_slots(self.weights[name][number], slots) for name in ("up", "down"))
        experts = GroupedExperts(up, down, self.activation).requires_grad_(False)
        return ExpertParallelMoE(experts, self.start, number)

    def shift(self):
        """Let the traffic have other favourites."""
        self.favourites = 2 * self.rng.normal(size=(LAYERS, EXPERTS))

    def choose(self, number):
        """Draw the experts [12,K] of a layer's tokens, and count them."""
        scores = self.rng.gumbel(size=(12, EXPERTS)) + self.favourites[number]
        index = np.argsort(-scores, axis=1)[:, :TOP_K].copy()
        self.load[number] += np.bincount(index.ravel(), minlength=EXPERTS)
        return torch.from_numpy(index)

    def step(self):
        """Run 12 tokens through every layer; return the largest difference to one process."""
        worst = 0.0
        at = slice(self.rank * 12 // self.ranks, (self.rank + 1) * 12 // self.ranks)
        for number, layer in enumerate(self.layers):
            index = self.choose(number)
            x = torch.from_numpy(self.rng.integers(-2, 3, (12, HIDDEN))).float()
            w = torch.from_numpy(self.rng.integers(0, 9, (12, TOP_K)) / 8).float()
            up, down = (self.weights[name][number] for name in ("up", "down"))
            expected = run_alone(x, index, w, up, down, self.activation)[at]
            out = layer(x[at], index[at], w[at], first_token=at.start)
            worst = max(worst, (out - expected).abs().max().item())
        return worst

    def observe(self, steps=10):
        """Tell the rebalancer what was counted in so many steps."""
        self.rebalancer.observe(self.load, steps=steps)
        self.load[:] = 0

    def unbalance(self):
        """Shift the traffic, and observe ten steps of it, for which no layer has to run."""
        self.shift()
        for number in [*range(LAYERS)] * 10:
            self.choose(number)
        self.observe()

    def tables(self):
        """Return the addresses of the tables of all layers."""
        values = [value for layer in self.layers for value in vars(layer).values()]
        return [value.data_ptr() for value in values if isinstance(value, torch.Tensor)]

    def unchanged(self):
        """Return whether placement and weights are those of the start."""
        return all(
            layer.placement == self.start and torch.equal(mine.nan_to_num(7), other.nan_to_num(7))
            for number, layer in enumerate(self.layers)
            for mine, other in zip(
                layer.experts.parameters(), self.layer(number).experts.parameters(), strict=True
            )
        )


@on(4)
def test_rebalancing_does_not_change_outputs(rank):
    """Under changing traffic equal to one process; tables stay, where CUDA graphs look for them."""
    for exact, steps in ((True, 40), (False, 20)):
        model = Model(rank, exact=exact, decay=0.3, dead_zone=0.15)
        worst, moved, tables = 0.0, [], model.tables()
        for step in range(steps):
            if step % 10 == 0:
                model.shift()
            worst = max(worst, model.step())
            if step % 5 == 4:
                model.observe(steps=5)
                moved.append(model.rebalancer.step().moved)
        assert worst < (1e-300 if exact else 1e-5)
        assert not exact or 2 <= sum(moved) < len(moved)
        assert len(tables) == 3 * LAYERS
        assert model.tables() == tables
        ranks = [None] * model.ranks
        dist.all_gather_object(ranks, moved)
        assert ranks == [moved] * model.ranks


def lost_rank(rank, how):
    """Kill rank 2, or let it hang or raise, in the middle of a move; return a rank's error."""
    model, absence = Model(rank), Absence(rank)
    model.unbalance()
    fill, calls = Spares.fill, []

    def broken(self, group, timeout):
        calls.append(self)
        if rank == 2 and len(calls) == 2:
            if how == "raises":
                raise ValueError("broken")
            absence.begin(0)
            if how == "killed":
                os._exit(3)
            absence.end()
        fill(self, group, SHORT if rank != 2 and len(calls) == 2 else timeout)

    with absence.watched(), mock.patch.object(Spares, "fill", broken):
        error = message(MoveError, model.rebalancer.step)
    absence.give_up()
    return error, model.unchanged()


def fault(name, absence=None):
    """Make this rank fail, or be late, at a phase of a move."""
    broken = ValueError("broken")
    fill, put = Spares.fill, Spares.put

    def late(self, *arguments):
        absence.begin(absence.step)
        absence.end()
        fill(self, *arguments)  # which meets what the others have begun

    def in_vain(self, group, timeout):
        fill(self, group, SHORT)

    def half_filled(self, *arguments):
        self.weights = dict(reversed(self.weights.items())) | {"down": None}
        fill(self, *arguments)

    def half_put(self, weights):
        put(self, dict(list(weights.items())[:1]))

    where = "moetuner.torch.parallel"
    return {
        "memory": lambda: mock.patch(f"{where}.migrate.free_bytes", return_value=0),
        "solver": lambda: mock.patch(f"{where}.rebalance.rebalance", side_effect=broken),
        "judge": lambda: mock.patch.object(Rebalancer, "_move_us", side_effect=broken),
        "half a fill": lambda: mock.patch.object(Spares, "fill", half_filled),
        "late fill": lambda: mock.patch.object(Spares, "fill", late),
        "late fill of another": lambda: mock.patch.object(Spares, "fill", in_vain),
        "put": lambda: mock.patch.object(Spares, "put", side_effect=broken),
        "half a put": lambda: mock.patch.object(Spares, "put", half_put),
    }.get(name, contextlib.nullcontext)()


FAILURES = {
    "solver": "ranks [1] failed at the next placement: broken; the old placement stays in force",
    "judge": "ranks [1] failed at what a move brings",
    "half a fill": "ranks [1] failed at the weights of layer 0",
    "put": "ranks [1] failed at the new weights in their slots",
    "half a put": "ranks [1] failed at the new weights in their slots",
    "counts": "do not agree with rank",
}


@on(3)
def test_a_rank_that_fails_or_differs(rank):
    """Nobody moves, all raise; then the old placement works, and so does the next move."""
    for how, text in FAILURES.items():
        model = Model(rank)
        model.unbalance()
        if how == "counts":
            model.rebalancer._halves[0, 0, 0] += rank == 1
        with fault(how if rank == 1 else "none"):
            error = message(MoveError, model.rebalancer.step)
        assert text in error
        assert "the old placement stays in force" in error
        assert "unusable" not in error
        assert model.unchanged()
        assert model.step() == 0.0
        if how == "counts":
            assert not model.rebalancer.load.any()
            model.unbalance()
        assert model.rebalancer.step().moved
        assert model.step() == 0.0


SERVE = """
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""


@contextlib.contextmanager
def served_store(rank):
    """Serve a store in a process of rank 0; return a client, and a function that signals it."""
    server, ports = None, [None]
    if rank == 0:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        server = subprocess.Popen([sys.executable, "-c", SERVE], **pipes)
        ports = [int(server.stdout.readline())]
    dist.broadcast_object_list(ports)

    def send(number):
        dist.barrier()
        if server is not None:
            server.send_signal(number)
        dist.barrier()

    yield dist.TCPStore("127.0.0.1", ports[0], is_master=False, wait_for_workers=False), send
    dist.barrier()
    if server is not None:
        server.kill()
        server.wait()


@on(2)
def test_a_store_that_stands_still_ends_a_step(rank):
    """At its beginning and at an exchange; once the store goes on, so do moves."""
    model = Model(rank)
    model.unbalance()
    agreement = model.rebalancer._agreement
    with served_store(rank) as (store, send):
        agreement._store, agreement.answer = store, PATIENCE
        begin = agreement.begin

        def stop_and_begin():
            send(signal.SIGSTOP)
            agreement.answer = SOON
            begin()

        def begin_and_stop():
            begin()
            send(signal.SIGSTOP)
            agreement.answer = SOON

        for phase in ("begin", "exchange"):
            agreement.begin = stop_and_begin if phase == "begin" else begin_and_stop
            error = message(MoveError, model.rebalancer.step)
            assert f"the store did not answer within {SOON} s; the old placement stays" in error
            assert model.unchanged()
            send(signal.SIGCONT)
            agreement.begin, agreement.answer = begin, PATIENCE
        assert model.rebalancer.step().moved
        assert model.step() == 0.0


def faulty(rank, faults):
    """Take steps with faults (name, rank), four without after each; return the outcomes."""
    model, absence = Model(rank), Absence(rank)
    steps = []
    for name, where in [step for at in faults for step in (at, *[("none", 0)] * 4)]:
        absence.step = len(steps)
        model.shift()
        right = model.step() == 0.0
        for number in range(LAYERS):
            model.choose(number)
        name = name if where == rank else f"{name} of another"
        load, model.load = model.load, np.zeros_like(model.load)
        with contextlib.suppress(ValueError):
            if name != "unobserved":
                wrong = {"miscounted": 1, "not a number": float("nan")}.get(name, 0)
                model.rebalancer.observe(load + wrong, steps=2)
        if name == "late":
            absence.begin(absence.step)
            absence.end()
        outcome = "skipped"
        if name == "skipped":
            absence.begin(absence.step)
        else:
            with absence.watched(), fault(name, absence):
                try:
                    decision = model.rebalancer.step()
                    outcome = f"{decision.moved} {decision.reason}"
                except MoveError:
                    outcome = "MoveError"
        absence.give_up()
        steps.append((outcome, model.rebalancer.placement.slots.tobytes(), right))
    model.unbalance()
    return steps, model.rebalancer.step().moved and model.step() == 0.0


def slow(self, about, value, *arguments, exchange=Agreement.exchange):
    """Exchange values, where rank 1 says that it took long to decide."""
    if about == "what a move brings" and dist.get_rank() == 1:
        value[3] = 1e18
    return exchange(self, about, value, *arguments)


def unpriced(*arguments, min_gain, **more):
    """Rebalance as a solver that does not know the price of a move."""
    return rebalance(*arguments, min_gain=0.0, **more)


def eager(*arguments, dead_zone, **more):
    """Rebalance as a solver that does not know the dead zone."""
    return rebalance(*arguments, dead_zone=0.0, **more)


def by_rank(name, *values):
    """Return a patch that makes a function return another value on every rank."""
    where = f"moetuner.torch.parallel.{name}"
    return lambda: mock.patch(where, return_value=values[dist.get_rank()])


CHEAP = {"steps_ahead": 1, "cost_model": linear(1e-9)}
REBALANCE = "moetuner.torch.parallel.rebalance.rebalance"
FREE, MOVE_US = "migrate.free_bytes", "rebalance.Rebalancer._move_us"
LIMITS = {
    # What a decision says under some options or troubles, for one traffic.
    "pays": ({}, None, "the move pays"),
    "unpriced": (CHEAP, lambda: mock.patch(REBALANCE, unpriced), "longer than it brings in"),
    "priced": (CHEAP, None, "balanced"),
    "small": ({"dead_zone": 0.9}, None, "balanced: no placement gains more than the dead zone"),
    "eager": (
        {"dead_zone": 0.9},
        lambda: mock.patch(REBALANCE, eager),
        "the gain is within the dead zone",
    ),
    "budget": ({"move_budget": 2}, None, ""),
    "none": ({"move_budget": 0}, None, "balanced"),
    "slow": (
        {},
        lambda: mock.patch.object(Agreement, "exchange", slow),
        "longer than it brings",
    ),
    "other prices": ({}, by_rank(MOVE_US, 0.0, 1e30), "longer than it brings in"),
    "no answer": ({"cost_model": linear(float("nan"))}, None, "balanced"),
    "no memory": ({}, by_rank(FREE, 0, 0), "a device has no memory"),
    "little memory": ({}, by_rank(FREE, 1 << 40, 2 * 2 * HIDDEN * INNER * 4), ""),
}


@on(2)
def test_moves_are_made_where_they_pay(rank):
    """Gain against cost, the dead zone, the budget, memory and the slowest or dearest rank."""
    for name, (options, trouble, reason) in LIMITS.items():
        model = Model(rank, **options)
        model.unbalance()
        with trouble() if trouble else contextlib.nullcontext():
            decision = model.rebalancer.step()
        moved = model.start.diff(model.rebalancer.placement)
        copies = moved.experts_moved
        assert reason in decision.reason, name
        assert model.step() == 0.0
        assert decision.moved == bool(copies) == (name in ("pays", "budget", "little memory"))
        assert name != "slow" or decision.decision_us == 1e18
        assert name != "budget" or copies <= 2
        assert name != "little memory" or moved.pairs[:, 1].sum() <= 1
        if name == "pays":
            assert decision.gain_us * 10**9 > 1.5 * (decision.cost_us + decision.decision_us)
            assert min(decision.cost_us, decision.decision_us) > 0
            assert (decision.experts_moved, decision.bytes_moved) == (copies, copies * 2 * 30 * 4)
            assert not model.rebalancer.step().moved
    idle = Model(rank)
    idle.rebalancer.observe(np.zeros((LAYERS, EXPERTS)))
    assert "balanced" in idle.rebalancer.step().reason


@on(2)
def test_gains_are_judged_on_counts_that_were_held_out(rank):
    """Of what placing by even traffic's noise seems to gain, nothing is believed."""
    seen = unseen = 0.0
    for seed in range(6):
        rebalancer = Model(rank, dead_zone=0.0, seed=seed).rebalancer
        random = np.random.default_rng(seed)
        rebalancer.observe(random.multinomial(80, np.full(EXPERTS, 1 / EXPERTS), LAYERS))
        placements = rebalancer.placement, rebalancer._find_target(1 << 40)
        now, then = (rebalancer._busiest(of, rebalancer._half_load(0))[1] for of in placements)
        seen += (now - then).sum()
        rebalancer._agreement.begin()
        unseen += rebalancer._judge(placements[1], 0.0).gain_us
    assert seen > 0
    assert unseen < 0.3 * seen


@on(2)
def test_arguments_that_cannot_be(rank):
    """One line each: argument, rule, value."""
    model = Model(rank)
    every = model.layers
    for layers, options, text in (
        ([], {}, "layers must be all layers of a placement, got none"),
        (every[1:], {}, "layers must be 0 to 2 of one placement, got [1, 2]"),
        (every, {"decay": 2}, "decay must be from 0 to 1, got 2"),
        (every, {"steps_ahead": 0}, "steps_ahead must be at least 1, got 0"),
        (every, {"topology": mt.Topology(3)}, "must have 2 devices like the placement, got 3"),
    ):
        given = {"cost_model": linear(1.0), "steps_ahead": 1} | options
        assert text in message(ValueError, Rebalancer, layers, **given)
    for counts, text in (
        (np.zeros((1, 2)), "counts must be [layers, experts] [3, 8], got [1, 2]"),
        (np.full((3, 8), -1), "counts must be finite numbers of at least 0, got -1 to -1"),
    ):
        assert message(ValueError, model.rebalancer.observe, counts) == text
