"""advise(): whether expert placement pays for some traffic, with how many copies, at what cost.

Placements are computed from one part of the traffic and judged on the other, over several splits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from moetuner import _checks as check
from moetuner.cost import CostModel, busiest_ports, cost_model_of, size_of_expert
from moetuner.evaluation import Evaluation
from moetuner.evaluation.arrival import Arrival, share_mixed
from moetuner.evaluation.auditing import audit_of
from moetuner.evaluation.comparison import PRICE, compare
from moetuner.evaluation.copies import Split
from moetuner.evaluation.replay import Traffic, members
from moetuner.evaluation.units import hold_out, units_of
from moetuner.formats.engines import ENGINES, engine_settings, tokens_per_rank
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.report.advice import drift
from moetuner.report.advice.conclusion import concluded, knee_of
from moetuner.report.advice.values import PHASES, Advice, Copies, Judged, Moving, Phases
from moetuner.report.outcome import judge
from moetuner.solver import solve
from moetuner.solver.result import Result
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Regime, Topology
from moetuner.trace import RoutingTrace

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
    check.instance("traffic", traffic, RoutingTrace, RoutingStatistics)
    check.instance("topology", topology, Topology, hint=", such as Topology(devices=8)")
    check.flag("in_order", in_order)
    check.callable_or_none("report", report)
    _check_values(traffic, price, initial)
    if engine is not None:
        check.one_of("engine", engine, ENGINES)
        split = ENGINES[engine].split if split is None else split
        arrival = ENGINES[engine].arrival if arrival is None else arrival
    share_mixed("bursts" if arrival is None else arrival)
    given = check.listed("copies", copies, "whole numbers")
    counts = sorted({check.whole_number("copies", each, lowest=0) for each in given})
    if not counts:
        raise ValueError("copies must be at least one number of slots, got none")
    window, size = check.window_in(window), size_of_expert(traffic)
    windows: tuple[int | None, ...] = (window,)
    if isinstance(traffic, RoutingStatistics):
        # Statistics come in their windows. Pairs are of all of them, so they cannot be halved.
        traffic = replace(traffic, transitions=None, coactivation=None, sets=None)
        arrival, windows = None, (None,)
    elif window is None:
        windows = tuple(of for of in WINDOWS if of == WINDOWS[0] or traffic.tokens >= 4 * of)
    if expert_bytes is not None:
        check.positive("expert_bytes", expert_bytes, "number of bytes")
    elif size is not None:
        expert_bytes = 3.0 * size[0] * size[1]
    how = {
        "regime": regime,
        "cost_model": cost_model_of(traffic) if cost_model is None else cost_model,
        "split": "even" if split is None else split,
        "arrival": "bursts" if arrival is None else arrival,
    }
    study = _Study(
        *(traffic, topology, initial, engine, counts, windows, how, expert_bytes, price),
        *(in_order, iterations, check.seed_in(seed), threads, report or (lambda _: None)),
    )
    return study.advice(check.whole_number("splits", splits, highest=100))


def _check_values(traffic: Traffic, price: float, initial: Placement | Running) -> None:
    """Raise for traffic of no tokens, a price that is none, and what cannot run."""
    if isinstance(traffic, RoutingTrace):
        if traffic.tokens < 2:
            raise ValueError(f"traffic must have two tokens or more, got {traffic.tokens}")
    elif not traffic.total_load.any():
        raise ValueError("traffic must have tokens, got a load of 0")
    check.not_negative("price", price, "share")
    if isinstance(initial, str):
        check.one_of("initial", initial, get_args(Running))
    else:
        check.instance("initial", initial, Placement)


# Placements of a split: by slots for copies, and whether they are shared by the layers; or by the
# phase that they are for. None is what runs.
Key = tuple[int, bool] | str | None


@dataclass(frozen=True)
class _Trial:
    """Placements computed from one part of the traffic, judged on another one, by window."""

    problem: Problem
    results: dict[Key, Result]
    placements: dict[Key, Placement]
    evaluations: dict[int | None, dict[Key, Evaluation]]

    def us(self, key: Key, window: int | None) -> float:
        """Return the predicted microseconds of a layer."""
        return self.evaluations[window][key].predicted_layer_us or 0.0


@dataclass
class _Study:
    """What stays the same for all splits; ``how`` has the arguments of ``Problem``."""

    traffic: Traffic
    topology: Topology
    initial: Placement | Running
    engine: str | None
    copies: list[int]
    windows: tuple[int | None, ...]
    how: dict[str, Any]
    expert_bytes: float | None
    price: float
    in_order: bool
    iterations: int | None
    seed: int
    threads: int | None
    say: Callable[[str], None]
    # What is searched for with single copies: both, until the first split has shown which of
    # them brings time down further, on what it saw.
    goals: tuple[Literal["balance", "time"], ...] = field(default=("balance", "time"), init=False)

    def __post_init__(self) -> None:
        traffic, self.facts = self.traffic, ENGINES[self.engine] if self.engine else None
        # Slots of a device that hold each expert once.
        self.fewest = -(-traffic.num_experts // self.topology.devices)
        may_copy = self.facts is None or self.facts.may_copy
        most = traffic.num_experts - self.fewest if may_copy else 0
        # Slots for copies that are tried: those that the engine and the model allow.
        self.counts = [each for each in self.copies if each <= most] or [0]
        # Kinds and sequences are the same in all windows.
        self.units = {of: units_of(traffic, window=of, threads=self.threads) for of in self.windows}
        # One window cannot be halved.
        self.is_held_out = isinstance(traffic, RoutingTrace) or traffic.windows > 1

    def advice(self, splits: int) -> Advice:
        """Try placements on every split, and conclude."""
        # The whole, seen twice, is the same every time.
        splits = splits if self.is_held_out else 1
        trials = [self.trial(number, splits) for number in range(splits)]
        first, swept = trials[0], self._swept(trials)
        knee = knee_of(swept)
        proposed: Key = (knee, False)
        self.say("judging")
        judged = tuple(self._compared(trials, proposed, window) for window in self.windows)
        main = max(judged, key=lambda each: each.gain.mean)
        units, of = self.units[main.window], first.evaluations[main.window]
        placements = first.placements[None], first.placements[proposed]
        self.say("comparing the halves of the recording")
        difference = drift.drift_of(self.traffic, units, seed=self.seed)
        carried: list[float] = []
        if self.in_order and difference is not None and difference.is_beyond_chance:
            early, late = drift.halves(self.traffic)
            for seen, unseen, name in ((early, late, "first"), (late, early, "second")):
                self.say(f"a placement of the {name} half on the other")
                problem = self.problem(seen)
                results = {proposed: self._searched(problem, knee, self.seed)}
                trial = self._judged(problem, results, unseen, [main.window], self.seed)
                # The gain on the other half, at its lower end.
                carried.append(self._compared([trial], proposed, main.window).gain.low or 0.0)
        self.say("weighing what moves, and phases")
        phases = self._phases(first, knee)
        advice = Advice(
            *("not enough evidence", (), ()),
            judged=judged,
            copies=swept,
            knee=knee,
            moving=self._moving(*placements, main.gain.before - main.gain.after),
            phases=phases,
            drift=difference,
            carried=tuple(carried),
            running=of[None],
            proposed=of[proposed],
            placements=placements,
            result=first.results[proposed],
            audit=audit_of(of[None], of[proposed], units),
            units=units,
            problem=first.problem,
            settings=self._settings(splits),
        )
        kinds = tuple(name for name in members(self.traffic) if name and name not in PHASES)
        return concluded(advice, kinds, self._notes(phases, knee))

    def _settings(self, splits: int) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("engine", "price", "expert_bytes")},
            **{name: self.how[name] for name in ("regime", "split", "arrival")},
            **{name: getattr(self, name) for name in ("in_order", "seed")},
            "devices": self.topology.devices,
            "devices_per_node": self.topology.devices_per_node,
            "topology": self.topology.name,
            "initial": self.initial if isinstance(self.initial, str) else "given",
            "copies": self.counts,
            "windows": list(self.windows),
            "splits": splits,
            "held_out": self.is_held_out,
            "cost_model": self.how["cost_model"].name,
        }

    def _compared(self, trials: list[_Trial], proposed: Key, window: int | None) -> Judged:
        """Compare what is proposed with what runs, in windows of a size, over all splits."""
        pairs = [(of[None], of[proposed]) for of in (each.evaluations[window] for each in trials)]
        figures = compare(pairs, units=self.units[window], share=0.5)
        names = ("running", "proposed")
        return Judged(
            window,
            {name: replace(of, price=self.price, names=names) for name, of in figures.items()},
        )

    def _notes(self, phases: Phases | None, knee: int) -> tuple[str, ...]:
        """Write what phases cost each other, and what the engine cannot do."""
        notes = [] if phases is None else [phases.sentence(self.price)]
        traffic, of = self.traffic, self.facts
        short = isinstance(traffic, RoutingTrace) and traffic.tokens < 4 * WINDOWS[-1]
        if short and self.windows == WINDOWS[:1]:
            notes.append(
                f"Windows of {WINDOWS[-1]:,} tokens, as in prefill, were not judged: those need "
                f"{4 * WINDOWS[-1]:,} tokens"
            )
        if of is None:
            return tuple(notes)
        if self.how["arrival"] == "mixed":
            notes.append(
                f"Windows are of sequences that {of.title} serves together, not of the order of "
                "the recording"
            )
        if not of.may_copy and self.copies[-1]:
            notes.append(
                f"Copies were left out: {of.title} loads a placement as a renumbered checkpoint, "
                "which has every expert once"
            )
        most, fewer = self._tokens_per_rank(knee), self._tokens_per_rank(0)
        if most is not None and most < WINDOWS[-1]:
            without = f" ({fewer:,} without copies)" if knee else ""
            notes.append(
                f"{of.title} with DeepEP's low-latency kernels: a rank may send at most {most:,} "
                f"tokens at once, as their buffer of 32 GiB grows with the slots{without}"
            )
        return tuple(notes)

    def _tokens_per_rank(self, count: int) -> int | None:
        """Compute the limit of low-latency kernels with so many slots for copies, if known."""
        size = size_of_expert(self.traffic)
        if self.facts is None or not self.facts.has_low_latency or size is None:
            return None
        return tokens_per_rank(size[0], self.topology.devices * (self.fewest + count))

    def trial(self, number: int, splits: int) -> _Trial:
        """Place with every number of copies, and judge on the unseen traffic of a split.

        A budget that layers share is tried in the first split only, which tells enough of it, and
        not for engines, which have as many slots in every layer.
        """
        seed, name = check.nth_seed(self.seed, number), f"split {number + 1} of {splits}"
        seen, unseen = hold_out(self.traffic, 0.5 if self.is_held_out else 0.0, seed=seed)
        self.say(f"{name}: counting")
        problem = self.problem(seen)
        results: dict[Key, Result] = {}
        may_share = not number and problem.layers > 1 and self.engine is None
        for count in self.counts:
            for shared in (False, True) if may_share and count else (False,):
                what = f"{count} slots for copies" + (" on average" if shared else "")
                self.say(f"{name}: searching with {what}")
                results[count, shared] = self._searched(problem, count, seed, shared=shared)
        self.say(f"{name}: predicting")
        return self._judged(problem, results, unseen, self.windows, seed)

    def _judged(
        self,
        problem: Problem,
        results: dict[Key, Result],
        unseen: Traffic,
        windows: Sequence[int | None],
        seed: int,
    ) -> _Trial:
        """Judge what runs, and placements, on traffic that they have not seen."""
        running = self.initial
        if isinstance(running, str):
            result = solve(problem, running, seed=seed, threads=self.threads)
            running = result.uninterrupted().placement
        else:
            slots = max(running.slots_per_device, self.fewest)
            replace(problem, slots_per_device=slots).check_running(running)
        placements = {None: running, **{key: of.placement for key, of in results.items()}}
        some, how = list(placements.values()), {"mixed": False, "threads": self.threads}
        evaluations = {
            of: dict(zip(placements, judge(some, problem, unseen, window=of, **how), strict=True))
            for of in windows
        }
        return _Trial(problem, results, placements, evaluations)

    def problem(self, seen: Traffic) -> Problem:
        """Count traffic, and ask for the least time with one copy of each expert."""
        if isinstance(seen, RoutingTrace):
            seen = RoutingStatistics.from_trace(
                seen, window=self.windows[0], sets=True, threads=self.threads
            )
        return Problem(seen, self.topology, slots_per_device=self.fewest, **self.how)

    def _searched(self, problem: Problem, count: int, seed: int, *, shared: bool = False) -> Result:
        """Search for balance or, of single copies, for time: what is better for time."""
        width = self.fewest + count
        slots: dict[str, Any] = {"slots_per_device": width}
        if shared:
            beyond = self.topology.devices * width - problem.experts
            slots = {"slots_per_device": None, "extra_slots": problem.layers * beyond}
        if self.engine is not None:
            of_engine = engine_settings(
                self.engine, problem.statistics, self.topology, slots_per_device=width
            )
            slots["fill_slots"] = of_engine["fill_slots"]
        problem = replace(problem, **slots)
        how: dict[str, Any] = {"seed": seed, "threads": self.threads, "iterations": self.iterations}
        results = {
            goal: solve(replace(problem, objective=goal), "heuristic", **how).uninterrupted()
            for goal in (("balance",) if count else self.goals)
        }
        best = min(results, key=lambda goal: problem.value(results[goal].placement))
        if not count:
            self.goals = (best,)
        return results[best]

    def _swept(self, trials: list[_Trial]) -> tuple[Copies, ...]:
        """Compute what copies gain and cost; a budget that layers share has one split."""
        size, swept = self.expert_bytes, []
        for count, shared in (key for key in trials[0].results if isinstance(key, tuple)):
            key = count, shared
            gains = {
                window: tuple(
                    1 - of.us(key, window) / of.us(None, window)
                    for of in trials
                    if key in of.results
                )
                for window in self.windows
            }
            memory = None if size is None else count * self.traffic.layers * size
            swept.append(Copies(count, shared, gains, memory, self._tokens_per_rank(count)))
        return tuple(swept)

    def _moving(self, before: Placement, after: Placement, saved_us: float) -> Moving:
        diff = before.diff(after, topology=self.topology, expert_bytes=self.expert_bytes)
        if self.expert_bytes is None:
            return Moving(diff.experts_moved, diff.bytes_moved, None, None)
        ports, model = busiest_ports(diff.pairs, self.topology), self.how["cost_model"]
        us = float(model.ports_us(ports, self.topology, bytes_each=self.expert_bytes))
        saved = saved_us * self.traffic.layers
        steps = float(np.ceil(us / saved)) if saved > 0 else None
        return Moving(diff.experts_moved, diff.bytes_moved, us / 1e6, steps)

    def _phases(self, trial: _Trial, knee: int) -> Phases | None:
        """Place for prefill, for decode and for both, and predict each on each."""
        if not isinstance(self.traffic, RoutingTrace) or self.traffic.group is None:
            return None
        parts = hold_out(self.traffic, 0.5, seed=self.seed)
        if not all(set(PHASES) <= members(part).keys() for part in parts):
            return None
        seen, unseen = (
            {of: part.select(groups=of) for of in PHASES}
            for part in parts
            if isinstance(part, RoutingTrace)
        )
        results: dict[Key, Result] = {"both": trial.results[knee, False]}
        for phase, part in seen.items():
            results[phase] = self._searched(self.problem(part), knee, self.seed)
        times: dict[str, dict[str, float]] = {str(name): {} for name in results}
        for phase, part in unseen.items():
            window = self.windows[-1 if phase == "prefill" else 0]
            judged = self._judged(trial.problem, results, part, [window], self.seed)
            for name, of in times.items():
                of[phase] = judged.us(name, window)
        return Phases(times)
