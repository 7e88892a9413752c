"""advise(): whether expert placement pays for some traffic, with how many copies, at what cost.

Placements are computed from one part of the traffic and judged on the other, over several splits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from moetuner._checks import (
    callable_or_none,
    flag,
    instance,
    listed,
    not_negative,
    nth_seed,
    one_of,
    positive,
    seed_in,
    threads_in,
    whole_number,
    window_in,
)
from moetuner.cost import CostModel, busiest_ports, cost_model_of, size_of_expert
from moetuner.evaluation import Evaluation, evaluate
from moetuner.evaluation.arrival import Arrival, in_order, orders, share_mixed
from moetuner.evaluation.auditing import Audit, audit
from moetuner.evaluation.copies import Split
from moetuner.evaluation.units import hold_out, likeness, units_of, with_runs
from moetuner.evaluation.verdicts import PRICE
from moetuner.formats.engines import ENGINES, engine_settings, tokens_per_rank
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.report.advice import drift
from moetuner.report.advice.conclusion import concluded, judged_in, knee_of
from moetuner.report.advice.power_law import exponents
from moetuner.report.advice.values import PHASES, Advice, Copies, Moving, Phases
from moetuner.solver import solve
from moetuner.solver.result import Result
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Regime, Topology
from moetuner.trace import RoutingTrace

Traffic = RoutingTrace | RoutingStatistics
Running = Literal["contiguous", "round_robin"]

# Tokens of a window as engines decode, and as they read prompts.
WINDOWS = (512, 8192)
SPLITS, COPIES = 3, (0, 1, 2, 4)
# Search steps of a start: enough to see what there is to win, in a second for a common model.
ITERATIONS = 2000


def advise(
    traffic: Traffic,
    topology: Topology,
    *,
    initial: Placement | Running = "contiguous",
    engine: str | None = None,
    copies: Sequence[int] = COPIES,
    window: int | None = None,
    splits: int = SPLITS,
    price: float = PRICE,
    expert_bytes: float | None = None,
    cost_model: CostModel | None = None,
    regime: Regime = "dispatch",
    split: Split | None = None,
    arrival: Arrival | None = None,
    in_order: bool = True,
    iterations: int | None = ITERATIONS,
    seed: int = 0,
    threads: int | None = None,
    report: Callable[[str], None] | None = None,
) -> Advice:
    """Return whether a better placement is worth a trial on this traffic, and why.

    Parameters
    ----------
    traffic
        A trace, which is split by sequence, or by kind where its sequences repeat few prompts; or
        statistics, whose loads are split by window. Where neighbouring windows are alike, and where
        a trace has no sequences, runs are held out. Of a single window nothing can be left to judge
        on, so the answer is that there is not enough evidence.
    topology
        The devices and links.
    initial
        The placement that runs: one of your own, or what engines begin with.
    engine
        Who serves the model: decides which copy serves a token, whether there may be copies, that
        all slots are full and of one number in all layers, and whether the tokens of a window are
        of sequences that are served together or of one after the other. Names as in
        ``engine_settings``.
    copies
        Numbers of slots of a device in a layer, beyond one slot for each expert, that are tried.
    window
        Tokens whose load is balanced together; by default 512 as in decoding, and 8192 as in
        reading prompts where there are so many. Load tables bring their own windows.
    splits
        Ways to choose the half that is seen.
    price
        Share of the predicted time that a change must save to be worth the trouble.
    expert_bytes
        Bytes of one expert of one layer; by default of the model's experts in 8 bits, where known.
    cost_model, regime, split, arrival
        As for ``Problem``; split and arrival by default the engine's, else even and in bursts.
    in_order
        Whether the order of the recording is that of serving. Where not, a change of kind between
        its halves is no matter.
    iterations
        Search steps of each start; None for as many as ``solve`` takes.
    seed
        Of splits and searches.
    threads
        Threads to use, all cores by default; the answer does not depend on it.
    report
        Called with what is being done, a few words each time.

    Raises
    ------
    ValueError
        If the traffic has nothing to place, the placement is not of this model and machine, or an
        argument is out of range.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> load = np.tile([[[90, 80, 5, 5, 5, 5, 5, 5]]], (40, 1, 1))
    >>> advice = mt.advise(mt.RoutingStatistics.from_load(1000 * load), mt.Topology(4))
    >>> advice.answer
    'worth a trial'
    """
    instance("traffic", traffic, RoutingTrace, RoutingStatistics)
    instance("topology", topology, Topology, hint=", such as Topology(devices=8)")
    if not isinstance(initial, str):
        instance("initial", initial, Placement)
    flag("in_order", in_order)
    callable_or_none("report", report)
    _check_traffic(traffic)
    counts = sorted(
        {
            whole_number("copies", each, lowest=0)
            for each in listed("copies", copies, "whole numbers")
        }
    )
    if not counts:
        raise ValueError("copies must be at least one number of slots, got none")
    whole_number("splits", splits, highest=100)
    not_negative("price", price, "share")
    if expert_bytes is not None:
        positive("expert_bytes", expert_bytes, "number of bytes")
    if isinstance(initial, str):
        one_of("initial", initial, get_args(Running))
    if engine is not None:
        one_of("engine", engine, ENGINES)
        split = split or ENGINES[engine].split
        arrival = ENGINES[engine].arrival if arrival is None else arrival
    share_mixed("bursts" if arrival is None else arrival)
    model = cost_model_of(traffic) if cost_model is None else cost_model
    work = _Work(
        _splittable(traffic),
        topology,
        initial=initial,
        engine=engine,
        counts=tuple(counts),
        windows=_windows_of(traffic, window_in(window)),
        expert_bytes=_bytes(traffic) if expert_bytes is None else expert_bytes,
        model=model,
        regime=regime,
        split=split or "even",
        arrival="bursts" if arrival is None else arrival,
        iterations=iterations,
        threads=threads_in(threads),
        say=report or (lambda _: None),
    )
    return work.advice(splits, seed_in(seed), price, in_order=in_order)


@dataclass(frozen=True)
class _Fitted:
    """Placements of one split's seen traffic, and what they do to the unseen."""

    problem: Problem
    unseen: Traffic
    running: Placement
    # By slots for copies, and whether they are shared by the layers.
    results: dict[tuple[int, bool], Result]
    # Predicted times of a layer, by window: of the running placement, and of the others.
    before: dict[int | None, float]
    after: dict[tuple[int, bool], dict[int | None, float]]


class _Work:
    """What stays the same for all splits."""

    def __init__(
        self,
        traffic: Traffic,
        topology: Topology,
        *,
        initial: Placement | Running,
        engine: str | None,
        counts: tuple[int, ...],
        windows: tuple[int | None, ...],
        expert_bytes: float | None,
        model: CostModel,
        regime: Regime,
        split: Split,
        arrival: Arrival,
        iterations: int | None,
        threads: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.traffic, self.topology, self.initial = traffic, topology, initial
        self.engine = engine
        # What is searched for with single copies: both, until the first split has shown which of
        # them brings time down further, on what it saw.
        self.goals: tuple[Literal["balance", "time"], ...] = ("balance", "time")
        self.windows, self.expert_bytes, self.model = windows, expert_bytes, model
        self.regime, self.split, self.iterations = regime, split, iterations
        self.threads, self.say = threads, say
        # Order in which tokens come, where that is not theirs already.
        self.arrival: Arrival = arrival if isinstance(traffic, RoutingTrace) else "bursts"
        # Of two orders by weight none is the one; of one order tokens are in it, see _arriving.
        self.weighed: Arrival = "bursts" if self.arrival == "mixed" else self.arrival
        experts = traffic.num_experts
        fewest = -(-experts // topology.devices)
        may_copy = engine is None or ENGINES[engine].may_copy
        most = experts - fewest if may_copy else 0
        self.counts = tuple(each for each in counts if each <= most) or (0,)
        self.fewest = fewest
        self.left_out = tuple(each for each in counts if each > most)
        # What is independent, by window; kinds and sequences are the same in all of them.
        self.units = {
            each: units_of(traffic, window=each, threads=threads) for each in self.windows
        }
        # One window cannot be halved.
        self.is_held_out = isinstance(traffic, RoutingTrace) or traffic.windows > 1

    def advice(self, splits: int, seed: int, price: float, *, in_order: bool) -> Advice:
        # The whole, seen twice, is the same every time.
        splits = splits if self.is_held_out else 1
        fitted = []
        for number in range(splits):
            of = nth_seed(seed, number)
            seen, unseen = self._halves(of)
            name = f"split {number + 1} of {splits}"
            fitted.append(self.fit(seen, unseen, of, name, first=number == 0))
        swept = self._swept(fitted)
        knee = knee_of(swept)
        audits = []
        for number, each in enumerate(fitted):
            self.say(f"judging, split {number + 1} of {splits}")
            audits.append(self._audits(each, each.results[knee, False].placement))
        judged = tuple(
            judged_in(
                window, [of[window] for of in audits], price, likeness(0.5, self.units[window])
            )
            for window in self.windows
        )
        first, main = fitted[0], max(judged, key=lambda each: each.gain.mean)
        self.say("comparing the halves of the recording")
        found = drift.drift_of(self.traffic, self.units[main.window], seed=seed)
        carried: tuple[float, ...] = ()
        if in_order and found is not None and found.is_told:
            carried = self._carried(knee, main.window, seed)
        proposed = first.results[knee, False].placement
        evaluations = [
            self._evaluation(placement, first.unseen, main.window)
            for placement in (first.running, proposed)
        ]
        self.say("weighing what moves, and phases")
        saved = main.before[main.verdict.measure] - main.after[main.verdict.measure]
        moving = self._moving(first.running, proposed, saved)
        phases = self._phases(first, knee, seed)
        shapes = {
            "experts": self.traffic.num_experts,
            "devices": self.topology.devices,
            "tokens": main.window or 512,
        }
        running = "running"
        if isinstance(self.initial, str):
            running = self.initial.replace("_", " ")
        answer, reasons, warnings = concluded(
            judged,
            swept,
            knee,
            found,
            carried,
            _kinds(self.traffic),
            price,
            running=running,
            model=self.model.name,
            devices=self.topology.devices,
            losers=_losers(audits[0][main.window], main.verdict.measure),
            regime=self.regime,
            held_out=self.is_held_out,
            units=self.units[main.window],
            notes=self._notes(phases, price, knee),
        )
        return Advice(
            answer=answer,
            reasons=reasons,
            warnings=warnings,
            judged=judged,
            copies=swept,
            knee=knee,
            moving=moving,
            phases=phases,
            drift=found,
            carried=carried,
            exponents={
                name: exponents(of.imbalance_per_layer, **shapes)
                for name, of in zip(("running", "proposed"), evaluations, strict=True)
            },
            running=evaluations[0],
            proposed=evaluations[1],
            placements=(first.running, proposed),
            result=first.results[knee, False],
            audit=audits[0][main.window],
            units=self.units[main.window],
            problem=first.problem,
            settings={
                "devices": self.topology.devices,
                "devices_per_node": self.topology.devices_per_node,
                "topology": self.topology.name,
                "engine": self.engine,
                "initial": self.initial if isinstance(self.initial, str) else "given",
                "copies": list(self.counts),
                "windows": list(self.windows),
                "splits": splits,
                "held_out": self.is_held_out,
                "price": price,
                "expert_bytes": self.expert_bytes,
                "cost_model": self.model.name,
                "regime": self.regime,
                "split": self.split,
                "arrival": self.arrival,
                "in_order": in_order,
                "seed": seed,
            },
        )

    def _halves(self, seed: int) -> tuple[Traffic, Traffic]:
        """Split into what is seen and what is not; the whole twice where that cannot be."""
        return hold_out(self.traffic, 0.5 if self.is_held_out else 0.0, seed=seed)

    def _arriving(self, traffic: Traffic) -> Traffic:
        """Put tokens once into the one order in which they are served."""
        if self.arrival == "mixed" and isinstance(traffic, RoutingTrace):
            [(_, order)] = orders(traffic, self.arrival)
            return in_order(with_runs(traffic), order)
        return traffic

    def _notes(self, phases: Phases | None, price: float, knee: int) -> tuple[str, ...]:
        """Say what phases cost each other, and what the engine cannot do."""
        notes = [] if phases is None else [phases.sentence(price)]
        traffic = self.traffic
        short = isinstance(traffic, RoutingTrace) and traffic.tokens < 4 * WINDOWS[-1]
        if short and self.windows == WINDOWS[:1]:
            notes.append(
                f"Windows of {WINDOWS[-1]:,} tokens, as in prefill, were not judged: those need "
                f"{4 * WINDOWS[-1]:,} tokens"
            )
        if self.engine is None:
            return tuple(notes)
        of = ENGINES[self.engine]
        if self.arrival == "mixed":
            notes.append(
                f"Windows are of sequences that {of.title} serves together, not of the order of "
                "the recording"
            )
        if self.left_out and not of.may_copy:
            notes.append(
                f"Copies were left out: {of.title} loads a placement as a renumbered checkpoint, "
                "which has every expert once"
            )
        most = self._tokens_per_rank(knee)
        if most is not None and most < WINDOWS[-1]:
            note = (
                f"{of.title} with DeepEP's low-latency kernels: a rank may send at most {most:,} "
                "tokens at once, as their buffer of 32 GiB grows with the slots"
            )
            fewer = self._tokens_per_rank(0)
            if knee and fewer is not None:
                note += f" ({fewer:,} without copies)"
            notes.append(note)
        return tuple(notes)

    def _tokens_per_rank(self, count: int) -> int | None:
        """Compute the limit of low-latency kernels with so many slots for copies, if known."""
        size = size_of_expert(self.traffic)
        if self.engine is None or not ENGINES[self.engine].has_low_latency or size is None:
            return None
        return tokens_per_rank(size[0], self.topology.devices * (self.fewest + count))

    def fit(self, seen: Traffic, unseen: Traffic, seed: int, name: str, *, first: bool) -> _Fitted:
        """Place with every number of copies, and predict times on the unseen traffic.

        A budget that layers share is tried in the first split only, which tells enough of it.
        """
        self.say(f"{name}: counting")
        unseen = self._arriving(unseen)
        problem = self.problem(seen)
        running = self._running(problem, seed)
        results: dict[tuple[int, bool], Result] = {}
        for count in self.counts:
            # Engines have as many slots in every layer.
            may_share = first and count and problem.layers > 1 and self.engine is None
            for shared in (False, True) if may_share else (False,):
                what = f"{count} slots for copies" + (" on average" if shared else "")
                self.say(f"{name}: searching with {what}")
                results[count, shared] = self._searched(problem, count, seed, shared=shared)
        self.say(f"{name}: predicting")

        def times(placement: Placement) -> dict[int | None, float]:
            found = {}
            for window in self.windows:
                us = self._evaluation(placement, unseen, window).predicted_layer_us
                assert us is not None
                found[window] = us
            return found

        after = {key: times(each.placement) for key, each in results.items()}
        return _Fitted(problem, unseen, running, results, times(running), after)

    def problem(self, seen: Traffic) -> Problem:
        """Count traffic, and ask for the least time with one copy of each expert."""
        statistics = seen
        if isinstance(seen, RoutingTrace):
            statistics = RoutingStatistics.from_trace(
                seen, window=self.windows[0], sets=True, threads=self.threads
            )
        assert isinstance(statistics, RoutingStatistics)
        return Problem(
            statistics,
            self.topology,
            slots_per_device=self.fewest,
            regime=self.regime,
            cost_model=self.model,
            split=self.split,
            arrival=self.arrival,
        )

    def _running(self, problem: Problem, seed: int) -> Placement:
        if isinstance(self.initial, str):
            found = solve(problem, self.initial, seed=seed, threads=self.threads)
            return found.uninterrupted().placement
        slots = max(self.initial.slots_per_device, self.fewest)
        replace(problem, slots_per_device=slots).check_running(self.initial)
        return self.initial

    def _searched(self, problem: Problem, count: int, seed: int, *, shared: bool) -> Result:
        """Search for balance or, of single copies, for time: what is better for time."""
        slots: dict[str, Any] = {"slots_per_device": self.fewest + count}
        if shared:
            beyond = self.topology.devices * (self.fewest + count) - problem.experts
            slots = {"slots_per_device": None, "extra_slots": problem.layers * beyond}
        if self.engine is not None:
            found_by = engine_settings(
                self.engine, problem.statistics, self.topology, slots_per_device=self.fewest + count
            )
            slots["fill_slots"] = found_by["fill_slots"]
        asked = replace(problem, **slots)
        found = {
            goal: solve(
                replace(asked, objective=goal),
                "heuristic",
                seed=seed,
                iterations=self.iterations,
                threads=self.threads,
            ).uninterrupted()
            for goal in (("balance",) if count else self.goals)
        }
        best = min(found, key=lambda goal: asked.value(found[goal].placement))
        if not count:
            self.goals = (best,)
        return found[best]

    def _evaluation(self, placement: Placement, traffic: Traffic, window: int | None) -> Evaluation:
        return evaluate(
            placement,
            traffic,
            self.topology,
            window=window,
            split=self.split,
            cost_model=self.model,
            regime=self.regime,
            arrival=self.weighed,
            mixed=False,
            threads=self.threads,
        )

    def _audits(self, fitted: _Fitted, proposed: Placement) -> dict[int | None, Audit]:
        return {
            window: self._audit(proposed, fitted.running, fitted.unseen, window)
            for window in self.windows
        }

    def _audit(
        self, proposed: Placement, running: Placement, unseen: Traffic, window: int | None
    ) -> Audit:
        return audit(
            proposed,
            unseen,
            self.topology,
            baseline=running,
            window=window or 1,
            cost_model=self.model,
            regime=self.regime,
            split=self.split,
            arrival=self.weighed,
            threads=self.threads,
            units=self.units[window],
        )

    def _swept(self, fitted: list[_Fitted]) -> tuple[Copies, ...]:
        found = []
        for count, shared in fitted[0].results:
            gains = {
                window: tuple(
                    1 - each.after[count, shared][window] / each.before[window]
                    for each in fitted
                    if (count, shared) in each.after
                )
                for window in self.windows
            }
            each = self.expert_bytes
            layers = self.traffic.layers
            found.append(
                Copies(
                    count,
                    shared,
                    gains,
                    None if each is None else count * layers * each,
                    self._tokens_per_rank(count),
                )
            )
        return tuple(found)

    def _carried(self, knee: int, window: int | None, seed: int) -> tuple[float, ...]:
        """Gains of a placement of each half of the recording on the other, at their lower ends."""
        early, late = drift.halves(self.traffic)
        found: list[float] = []
        for seen, unseen, name in ((early, late, "first"), (late, early, "second")):
            self.say(f"a placement of the {name} half on the other")
            problem = self.problem(seen)
            result = self._searched(problem, knee, seed, shared=False)
            running = self._running(problem, seed)
            judged = self._audit(result.placement, running, self._arriving(unseen), window)
            change = judged.whole["predicted_layer_us"].change
            found.append(0.0 if change is None or change.high is None else -change.high)
        return tuple(found)

    def _moving(self, before: Placement, after: Placement, saved_us: float) -> Moving:
        diff = before.diff(after, topology=self.topology, expert_bytes=self.expert_bytes)
        seconds = steps = None
        if self.expert_bytes is not None:
            ports = busiest_ports(diff.pairs, self.topology)
            us = self.model.ports_us(ports, self.topology, bytes_each=self.expert_bytes)
            seconds = float(us) / 1e6
            saved = saved_us * self.traffic.layers
            steps = float(np.ceil(float(us) / saved)) if saved > 0 else None
        return Moving(diff.experts_moved, diff.bytes_moved, seconds, steps)

    def _phases(self, fitted: _Fitted, knee: int, seed: int) -> Phases | None:
        """Place for prefill, for decode and for both, and predict each on each."""
        trace = self.traffic
        if not isinstance(trace, RoutingTrace) or not set(PHASES) <= set(_present(trace)):
            return None
        seen, unseen = hold_out(trace, 0.5, seed=seed)
        assert isinstance(seen, RoutingTrace)
        assert isinstance(unseen, RoutingTrace)
        if not all(set(PHASES) <= set(_present(part)) for part in (seen, unseen)):
            return None
        placements = {"both": fitted.results[knee, False].placement}
        for phase in PHASES:
            problem = self.problem(seen.select(groups=phase))
            placements[phase] = self._searched(problem, knee, seed, shared=False).placement
        found: dict[str, dict[str, float]] = {}
        for name, placement in placements.items():
            found[name] = {}
            for phase in PHASES:
                part = self._arriving(unseen.select(groups=phase))
                window = self.windows[-1 if phase == "prefill" else 0]
                us = self._evaluation(placement, part, window).predicted_layer_us
                assert us is not None
                found[name][phase] = us
        return Phases(found)


def _check_traffic(traffic: Traffic) -> None:
    """Raise unless there is something to see and something to judge on."""
    if isinstance(traffic, RoutingTrace):
        if traffic.tokens < 2:
            raise ValueError(f"traffic must have two tokens or more, got {traffic.tokens}")
        return
    if not traffic.total_load.any():
        raise ValueError("traffic must have tokens, got a load of 0")


def _losers(found: Audit, measure: str) -> dict[str, float]:
    """Name the groups that are worse beyond chance, and by what share."""
    worse = found.worse(measures=(measure,)) if found.groups else []
    return {each.group: each.change.value for each in worse}


def _bytes(traffic: Traffic) -> float | None:
    """Bytes of the model's experts in 8 bits; None where their size is not known."""
    size = size_of_expert(traffic)
    return None if size is None else 3.0 * size[0] * size[1]


def _windows_of(traffic: Traffic, window: int | None) -> tuple[int | None, ...]:
    """Return windows to judge in: those that were asked for, else of decoding and of prompts."""
    if isinstance(traffic, RoutingStatistics):
        return (None,)
    if window is not None:
        return (window,)
    return tuple(each for each in WINDOWS if each == WINDOWS[0] or traffic.tokens >= 4 * each)


def _splittable(traffic: Traffic) -> Traffic:
    """Return traffic that can be halved: of loads without pairs, which are of all windows."""
    if isinstance(traffic, RoutingStatistics):
        return replace(traffic, transitions=None, coactivation=None, sets=None)
    return traffic


def _present(trace: RoutingTrace) -> tuple[str, ...]:
    """Names of the groups that have tokens."""
    if trace.group is None:
        return ()
    return tuple(trace.group_names[number] for number in np.unique(trace.group))


def _kinds(traffic: Traffic) -> tuple[str, ...] | None:
    """Return kinds of traffic that are there; None where nobody told kinds apart."""
    if traffic.group is None:
        return None
    names = (traffic.group_names[number] for number in np.unique(traffic.group))
    kinds = tuple(name for name in names if name not in PHASES)
    return kinds or None
