"""Placements computed from one part of some traffic and judged on another, over several splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from moetuner import _checks as check
from moetuner.cost import busiest_ports, size_of_expert
from moetuner.evaluation import Evaluation
from moetuner.evaluation.auditing import audit_of, blocks
from moetuner.evaluation.comparison import Comparison, compare, with_splits
from moetuner.evaluation.replay import Traffic, members
from moetuner.evaluation.units import Units, hold_out, some, units_of
from moetuner.formats.engines import ENGINES, engine_settings, tokens_per_rank
from moetuner.placement import EMPTY, Placement
from moetuner.problem import TRAFFIC_CAP, Problem
from moetuner.problem.objective import Goal
from moetuner.problem.phases import WINDOWS, has_windows
from moetuner.report.advice import drift
from moetuner.report.advice.conclusion import concluded, knee_of
from moetuner.report.advice.values import (
    Advice,
    Copies,
    Half,
    Judged,
    Moving,
    Phases,
    main_of,
)
from moetuner.report.cells import counted
from moetuner.report.outcome import judge, left_over
from moetuner.report.recording import PHASES, one_kind
from moetuner.solver import Method, solve
from moetuner.solver.result import Result
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

# Placements that are judged: what runs, EPLB's in as many slots as the proposed one, and that one;
# or by slots for copies, and whether they are shared by the layers; or by the phase they are for.
RUNNING, EPLB, PROPOSED = "running", "eplb", "proposed"
Key = tuple[int, bool] | str
Window = int | None

# Search steps of a start: enough to see what there is to win, in a second for a common model.
ITERATIONS = 500


@dataclass(frozen=True)
class Part:
    """What placements are computed from, and what they are judged on."""

    seed: int
    statistics: RoutingStatistics
    unseen: Traffic


@dataclass(frozen=True)
class Trial:
    """The placements of a part, and their evaluations by window."""

    result: Result
    problem: Problem
    placements: dict[Key, Placement]
    evaluations: dict[Window, dict[Key, Evaluation]]


def slots_of_running(initial: Placement | str, experts: int, devices: int) -> int:
    """Return the slots of a device in a layer under what runs, which EPLB has to fill."""
    if isinstance(initial, Placement):
        return initial.slots_per_device
    redundant = int(initial.partition(":")[2] or 0)
    slots = -(-(experts + redundant) // devices)
    if initial.startswith("eplb") and slots * devices != experts + redundant:
        raise ValueError(
            f"initial {initial} must fill all devices evenly: {experts} experts and {redundant} "
            f"redundant ones are no multiple of {devices} devices; "
            f"eplb:{slots * devices - experts} would do"
        )
    return slots


@dataclass
class Study:
    """What stays the same for all splits; ``how`` has the arguments of ``Problem``."""

    traffic: Traffic
    unseen: Traffic | None
    topology: Topology
    initial: Placement | str
    engine: str | None
    copies: list[int]
    windows: tuple[Window, ...]
    how: dict[str, Any]
    expert_bytes: float | None
    price: float
    prefill_share: float | None
    by_group: bool
    in_order: bool
    iterations: int | None
    time_limit: float | None
    seed: int
    threads: int | None
    say: Callable[[str], None]
    # What short searches are for: the better of both, on what they saw.
    goals: tuple[Goal, ...] = field(default=("balance", "time"), init=False)

    def __post_init__(self) -> None:
        traffic, self.facts = self.traffic, ENGINES[self.engine] if self.engine else None
        if self.how["objective"] is not None:
            self.goals = (self.how["objective"],)
        if self.how["objective"] == "traffic":
            self.how["max_imbalance"] = TRAFFIC_CAP
        # Slots of a device that hold each expert once.
        experts, devices = traffic.num_experts, self.topology.devices
        self.fewest = -(-experts // devices)
        may_copy = self.facts is None or self.facts.may_copy
        most = experts - self.fewest if may_copy else 0
        # Slots for copies that are tried: those that the engine and the model allow, and as many as
        # run already, whose memory costs nothing.
        self.of_running = slots_of_running(self.initial, experts, devices) - self.fewest
        wanted = {*self.copies, max(self.of_running, 0)}
        self.counts = sorted(each for each in wanted if each <= most) or [0]
        # Kinds and sequences are the same in all windows.
        judged_on = traffic if self.unseen is None else self.unseen
        self.units = {of: self._units_of(judged_on, of) for of in self.windows}
        # One window cannot be halved.
        can_split = isinstance(traffic, RoutingTrace) or traffic.windows > 1
        self.is_held_out = can_split or self.unseen is not None

    def advice(self, splits: int) -> Advice:
        """Try placements on every split, and conclude."""
        # The whole, seen twice, is the same every time, and so is traffic that was given apart.
        splits = splits if self.is_held_out and self.unseen is None else 1
        part = self.part(0)
        swept = self._swept(part)
        # More memory is no gain of a placement: what is proposed takes no more than what runs.
        as_now = tuple(row for row in swept if row.per_device <= max(self.of_running, 0))
        knee, best = (knee_of(rows, self.prefill_share) for rows in (as_now or swept, swept))
        trials = []
        for number in range(splits):
            self.say(f"split {number + 1} of {splits}: solving and judging")
            trials.append(self.trial(self.part(number) if number else part, knee))
        first = trials[0]
        judged = tuple(self._judged(trials, window) for window in self.windows)
        main = main_of(judged)
        if len(swept) == 1:  # which was not searched for
            as_judged: dict[Window, tuple[float, ...]]
            as_judged = {of.window: (of.gain.mean,) for of in judged}
            swept = (replace(swept[0], gains=as_judged),)
        units, of = self.units[main.window], first.evaluations[main.window]
        self.say("comparing the halves of the recording")
        is_one = self.unseen is None
        difference = drift.drift_of(self.traffic, units, seed=self.seed) if is_one else None
        is_other = self.in_order and difference is not None and difference.is_beyond_chance
        halves = self._halves(knee, main.window) if is_other else ()
        self.say("weighing what moves, and phases")
        phases = self._phases(part, knee)
        advice = Advice(
            *("not enough evidence", (), ()),
            judged=judged,
            copies=swept,
            knee=knee,
            more=best if best > knee else None,
            moving=self._moving(first, main),
            phases=phases,
            drift=difference,
            halves=halves,
            running=of[RUNNING],
            proposed=of[PROPOSED],
            placements=(first.placements[RUNNING], first.placements[PROPOSED]),
            result=first.result,
            audit=audit_of(of[RUNNING], of[PROPOSED], units),
            units=units,
            problem=first.problem,
            judged_on=self._judged_on(part.unseen),
            one_kind=one_kind(self.traffic, self.unseen),
            total=self._total(judged),
            by_group=self._by_group(knee) if self.by_group else {},
            settings=self._settings(splits, first.problem.shares),
        )
        return concluded(advice, self._notes(phases, knee))

    def _settings(self, splits: int, phases: dict[int | None, float]) -> dict[str, Any]:
        own = ("engine", "price", "expert_bytes", "in_order", "seed", "time_limit", "prefill_share")
        return {
            **{name: getattr(self, name) for name in own},
            **{name: self.how[name] for name in ("regime", "split", "arrival", "objective")},
            "devices": self.topology.devices,
            "devices_per_node": self.topology.devices_per_node,
            "topology": self.topology.name,
            "initial": self.initial if isinstance(self.initial, str) else "given",
            "copies": self.counts,
            "windows": list(self.windows),
            "phases": phases,
            "splits": splits,
            "held_out": self.is_held_out,
            "cost_model": self.how["cost_model"].name,
        }

    def _judged_on(self, unseen: Traffic) -> str:
        if isinstance(unseen, RoutingStatistics):
            text = counted(unseen.windows, "window")
        elif unseen.sequence is None:
            text = counted(unseen.tokens, "token")
        else:
            sequences = counted(len(np.unique(unseen.sequence)), "sequence")
            text = f"{counted(unseen.tokens, 'token')} of {sequences}"
        # The longest windows leave most over.
        rest = left_over(unseen, self.windows[-1])
        where = "" if self.windows[-1] is None else f"in windows of {self.windows[-1]:,} "
        text += f" that the placement was {'not ' * self.is_held_out}computed from"
        return f"{text}; {where}{rest}" if rest else text

    def _judged(self, trials: list[Trial], window: Window) -> Judged:
        """Compare what is proposed with what runs, and with EPLB, in windows of a size."""
        units = self.units[window]
        figures, eplb = (self._compared(trials, key, window, units) for key in (RUNNING, EPLB))
        first = trials[0].placements
        eplb = {} if first[EPLB] == first[RUNNING] else eplb
        traffic = self.traffic if self.unseen is None else self.unseen
        recorded = None if isinstance(traffic, RoutingTrace) else traffic.window
        return Judged(window, figures, eplb, traffic.layers, recorded)

    def _compared(
        self, trials: list[Trial], key: Key, window: Window, units: Units
    ) -> dict[str, Comparison]:
        """Compare what is proposed with another placement, with the first split's intervals."""
        pairs = [(of[key], of[PROPOSED]) for of in (each.evaluations[window] for each in trials)]
        names = ("running" if key == RUNNING else "EPLB", "proposed")
        figures = compare(*pairs[0], units=units).items()
        return {
            name: replace(with_splits(of, pairs), price=self.price, names=names)
            for name, of in figures
        }

    def _total(self, judged: tuple[Judged, ...]) -> Comparison | None:
        """Weigh the gains of decode and prefill by their shares of the serving time."""
        if self.prefill_share is None:
            return None
        decode, prefill = (each.gain for each in judged)

        def weighed(of_decode: float, of_prefill: float) -> float:
            share = self.prefill_share or 0.0
            return share * of_prefill + (1 - share) * of_decode

        gain, low, high = weighed(decode.gain, prefill.gain), None, None
        if decode.interval is not None and prefill.interval is not None:
            low, high = map(weighed, decode.interval, prefill.interval)
        splits = tuple(map(weighed, decode.splits, prefill.splits))
        units = min(decode.units, prefill.units)
        of = replace(decode, before=1.0, after=1 - gain, gain=gain, low=low, high=high)
        return replace(of, units=units, splits=splits)

    def _halves(self, knee: int, window: Window) -> tuple[Half, ...]:
        """Judge a placement of each half of the recording on the other."""
        parts, halves = drift.halves(self.traffic), []
        sizes = [{name: len(rows) for name, rows in members(half).items()} for half in parts]
        # A group that the middle cuts is of the half that has more of it.
        groups = [
            tuple(str(n) for n in own if n is not None and own[n] >= sizes[1 - place].get(n, 0))
            for place, own in enumerate(sizes)
        ]
        for number, name in enumerate(("first", "second")):
            self.say(f"a placement of the {name} half on the other")
            trial = self.trial(
                Part(self.seed, self.counted(parts[number]), parts[1 - number]), knee
            )
            gain = self._gain(trial, window, self.units[window])
            halves.append(Half(groups[number], groups[1 - number], gain))
        return tuple(halves)

    def _by_group(self, knee: int) -> dict[str, dict[Window, Comparison]]:
        """Judge a placement of all other groups on each group."""
        gains: dict[str, dict[Window, Comparison]] = {}
        groups = members(self.traffic)
        rows = groups.pop(None)
        for group, mine in groups.items():
            self.say(f"a placement of all groups but {group}, on {group}")
            is_mine = np.isin(rows, mine)
            own, others = some(self.traffic, is_mine), some(self.traffic, ~is_mine)
            trial = self.trial(Part(self.seed, self.counted(others), own), knee)
            gains[str(group)] = {
                of: self._gain(trial, of, self._units_of(own, of)) for of in self.windows
            }
        return gains

    def _gain(self, trial: Trial, window: Window, units: Units) -> Comparison:
        return self._compared([trial], RUNNING, window, units)["predicted_layer_us"]

    def _units_of(self, traffic: Traffic, window: Window) -> Units:
        return units_of(traffic, window=window, threads=self.threads)

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
            notes.append(f"Windows mix sequences of the recording, as {of.title} serves them")
        if not of.may_copy and max(self.copies):
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

    def part(self, number: int) -> Part:
        """Return what placements are computed from, and judged on, in a split."""
        seed = check.nth_seed(self.seed, number)
        seen, unseen = self._seen(seed)
        return Part(seed, self.counted(seen), unseen)

    def _seen(self, seed: int) -> tuple[Traffic, Traffic]:
        """Return the seen and the unseen part of a split."""
        if self.unseen is not None:
            return self.traffic, self.unseen
        return hold_out(self.traffic, 0.5 if self.is_held_out else 0.0, seed=seed)

    def counted(self, seen: Traffic) -> RoutingStatistics:
        """Count traffic as ``moetuner solve`` does."""
        if isinstance(seen, RoutingStatistics):
            return seen
        sets = self.how["regime"] != "follow" and self.how["objective"] != "balance"
        return RoutingStatistics.from_trace(
            seen, window=self.windows[0], sets=sets, threads=self.threads
        )

    def problem(self, statistics: RoutingStatistics, count: int, **others: Any) -> Problem:
        """Ask for a placement with so many slots for copies, as ``moetuner solve`` does."""
        slots: dict[str, Any] = {"slots_per_device": self.fewest + count}
        if self.engine is not None:
            settings = engine_settings(self.engine, statistics, self.topology, **slots)
            slots["fill_slots"] = settings["fill_slots"]
        how = {**self.how, **slots, **others}
        if not all(has_windows(statistics, tokens) for tokens in how["phases"] or ()):
            how["phases"] = None  # of a part that is too short for windows of prefill
        return Problem(statistics, self.topology, **how)

    def solved(self, problem: Problem, method: Method, seed: int, **how: Any) -> Result:
        """Solve a problem; an interrupt ends the study."""
        how |= {"seed": seed, "threads": self.threads, "time_limit": self.time_limit}
        return solve(problem, method, **how).uninterrupted()

    def trial(self, part: Part, count: int) -> Trial:
        """Place with some slots for copies, and judge that beside EPLB and what runs."""
        problem = self.problem(part.statistics, count)
        result = self.solved(problem, "joint", part.seed, iterations=self.iterations)
        placements: dict[Key, Placement] = {
            RUNNING: self.running(part),
            EPLB: self.solved(problem, "eplb", part.seed).placement,
            PROPOSED: result.placement,
        }
        evaluations = self.evaluated(placements, problem, part.unseen, self.windows)
        return Trial(result, problem, placements, evaluations)

    def running(self, part: Part) -> Placement:
        """Return what runs; EPLB's placement is that of what was seen."""
        if isinstance(self.initial, Placement):
            count = max(self.of_running, 0)
            self.problem(part.statistics, 0, slots_per_device=self.fewest + count).check_running(
                self.initial
            )
            return self.initial
        method = self.initial.partition(":")[0]
        if method == "contiguous":
            traffic = self.traffic
            return blocks(traffic.layers, traffic.num_experts, self.topology.devices)
        problem = self.problem(part.statistics, self.of_running)
        return self.solved(problem, cast(Method, method), part.seed).placement

    def evaluated(
        self,
        placements: dict[Key, Placement],
        problem: Problem,
        unseen: Traffic,
        windows: Sequence[Window],
    ) -> dict[Window, dict[Key, Evaluation]]:
        """Evaluate placements on other traffic, by window."""
        some = list(placements.values())
        how = {"mixed": False, "threads": self.threads, "cost_model": self.how["cost_model"]}
        return {
            of: dict(zip(placements, judge(some, problem, unseen, window=of, **how), strict=True))
            for of in windows
        }

    def _searched(
        self,
        statistics: RoutingStatistics,
        count: int,
        *,
        shared: bool = False,
        window: Window = None,
    ) -> Placement:
        """Search shortly: for what was asked for, else for what is better for time.

        For the windows that count, or for those of one phase.
        """
        slots: dict[str, Any] = {}
        if shared:
            beyond = self.topology.devices * (self.fewest + count) - statistics.experts
            slots = {"slots_per_device": None, "extra_slots": statistics.layers * beyond}
        if window is not None:
            slots["phases"] = {window: 1.0}
        problem = self.problem(statistics, count, **slots)
        steps = ITERATIONS if self.iterations is None else self.iterations
        how: dict[str, Any] = {"seed": self.seed, "iterations": steps}
        results = {
            goal: self.solved(replace(problem, objective=goal), "heuristic", **how)
            for goal in self.goals
        }
        best = min(results, key=lambda goal: problem.value(results[goal].placement))
        return results[best].placement

    def _swept(self, part: Part) -> tuple[Copies, ...]:
        """Search with every number of copies, all as shortly: what differs is the copies' merit."""
        placements: dict[Key, Placement] = {RUNNING: self.running(part)}
        # Engines have as many slots in every layer.
        may_share = self.traffic.layers > 1 and self.engine is None
        if len(self.counts) == 1 and not (may_share and self.counts[0]):
            # There is nothing to choose: the proposed placement's own gain takes this one's place.
            placements[self.counts[0], False] = placements[RUNNING]
            return self._gains(part, placements)
        for count in self.counts:
            for shared in (False, True) if may_share and count else (False,):
                what = f"{count} slots for copies" + (" on average" if shared else "")
                self.say(f"searching with {what}")
                placements[count, shared] = self._searched(part.statistics, count, shared=shared)
        return self._gains(part, placements)

    def _gains(self, part: Part, placements: dict[Key, Placement]) -> tuple[Copies, ...]:
        """Compute what placements with copies gain over what runs, and the memory they take."""
        size, problem = self.expert_bytes, self.problem(part.statistics, 0)
        evaluations = self.evaluated(placements, problem, part.unseen, self.windows)
        swept = []
        for count, shared in (key for key in placements if isinstance(key, tuple)):
            gains: dict[Window, tuple[float, ...]] = {}
            for window, of in evaluations.items():
                before, after = (of[key].predicted_layer_us for key in (RUNNING, (count, shared)))
                gains[window] = (1 - (after or 0.0) / (before or 1.0),)
            memory = None if size is None else count * self.traffic.layers * size
            swept.append(Copies(count, shared, gains, memory, self._tokens_per_rank(count)))
        return tuple(swept)

    def _moving(self, trial: Trial, main: Judged) -> Moving:
        """Compute what it costs to leave what runs, and what memory experts take then."""
        size, after = self.expert_bytes, trial.placements[PROPOSED]
        diff = trial.placements[RUNNING].diff(after, topology=self.topology, expert_bytes=size)
        copies = [
            (trial.placements[key].slots != EMPTY).sum(axis=(0, 2)) for key in (RUNNING, PROPOSED)
        ]
        total = int(copies[1].sum())
        if size is None:
            return Moving(diff.experts_moved, None, None, None, total, None, None)
        ports, model = busiest_ports(diff.pairs, self.topology), self.how["cost_model"]
        us = float(model.ports_us(ports, self.topology, bytes_each=size))
        steps = float(np.ceil(us / main.saved_us)) if main.saved_us > 0 else None
        memory = size * int(copies[0].max()), size * int(copies[1].max())
        return Moving(
            *(diff.experts_moved, diff.bytes_moved, us / 1e6, steps), total, total * size, memory
        )

    def _phases(self, part: Part, knee: int) -> Phases | None:
        """Search shortly for prefill, for decode and for both, and predict each on each."""
        seen, unseen = self._seen(self.seed)
        if not isinstance(seen, RoutingTrace) or not isinstance(unseen, RoutingTrace):
            return None
        if not all(set(PHASES) <= members(each).keys() for each in (seen, unseen)):
            return None
        placements: dict[Key, Placement] = {"both": self._searched(part.statistics, knee)}
        windows = {of: self.windows[-1 if of == "prefill" else 0] for of in PHASES}
        for phase, window in windows.items():
            counts = self.counted(seen.select(groups=phase))
            placements[phase] = self._searched(counts, knee, window=window)
        times: dict[str, dict[str, float]] = {str(name): {} for name in placements}
        problem = self.problem(part.statistics, knee)
        for phase, window in windows.items():
            own = unseen.select(groups=phase)
            judged = self.evaluated(placements, problem, own, [window])[window]
            for name, of in times.items():
                of[phase] = judged[name].predicted_layer_us or 0.0
        return Phases(times)
