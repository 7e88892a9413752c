"""What advise() answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from moetuner.evaluation import Evaluation
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.judgement import Judgement
from moetuner.evaluation.units import Units
from moetuner.frozen import Frozen, as_json
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.report import words
from moetuner.report.advice.drift import Drift
from moetuner.report.findings import PYTHON, Finding, Role, Voice
from moetuner.report.recording import PHASES
from moetuner.report.words.parts import name_windows
from moetuner.solver.result import Result

Answer = Literal["worth a trial", "not now", "not enough evidence"]


def describe_windows(judgement: Judgement) -> dict[str, int | None]:
    """Return which windows a judgement is in, and the tokens of those that were recorded."""
    replayed = judgement.after.replayed
    recorded = None if replayed is None else replayed.traffic.window
    return {"window": judgement.window, "recorded": recorded}


def write_windows(judgement: Judgement) -> str:
    """Write which windows a judgement is in."""
    return name_windows(**describe_windows(judgement))


def compute_saved_us(judgement: Judgement) -> float:
    """Compute the predicted microseconds that a step saves over all layers."""
    return judgement.layers * (judgement.gain.before - judgement.gain.after)


def choose_main(judged: tuple[Judgement, ...]) -> Judgement:
    """Return the windows where most is gained, for certain if in any."""
    return max(judged, key=lambda each: (each.gain.is_worth_it, each.gain.gain))


@dataclass(frozen=True, eq=False, repr=False)
class Copies(Frozen):
    """What some slots for copies gain on unseen traffic, and what they cost.

    Parameters
    ----------
    per_device
        Slots of a device in every layer beyond those that hold each expert once.
    gains
        Share of predicted time that is saved over the running placement in the first split, by
        window, after a search as short as that of all others; where no other number was tried, as
        judged.
    bytes_per_device
        Memory that the copies take; None where the bytes of an expert are not known.
    tokens_per_rank
        Tokens that a rank may send at once by DeepEP's low-latency kernels, whose buffers grow with
        the slots; None where the engine has none or the size of a row is not known.
    layers
        Fewest layers whose copies bring nine tenths of what those of all layers gain on unseen
        traffic, taken in the order of what they gain on the traffic that was seen; None where
        placements without copies are not compared, or are as good.
    """

    per_device: int
    gains: dict[int | None, tuple[float, ...]]
    bytes_per_device: float | None
    tokens_per_rank: int | None = None
    layers: int | None = None

    def mean(self, window: int | None) -> float:
        """Mean gain in windows of a size."""
        return float(np.mean(self.gains[window]))

    @property
    def best(self) -> float:
        """Mean gain in the windows where it is largest."""
        return max(map(self.mean, self.gains))

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values."""
        gains = [
            {"window": window, "mean": self.mean(window), "splits": list(each)}
            for window, each in self.gains.items()
        ]
        return {**vars(self), "gains": gains}


class Moving(NamedTuple):
    """What it costs to leave the running placement; nothing where the answer is "not now".

    Parameters
    ----------
    experts
        Copies that have to be moved to devices.
    bytes, seconds
        Of weights, and the time of the busiest port at the topology's bandwidth; None where the
        bytes of an expert are not known.
    steps
        Steps of the model after which a stop of so many seconds has paid; None where nothing is
        gained, or the seconds are not known.
    of_experts, of_bytes
        What the proposed placement has on all devices.
    device_bytes
        Weights of experts on the fullest device, before and after; None where the bytes of an
        expert are not known.
    """

    experts: int
    bytes: float | None
    seconds: float | None
    steps: float | None
    of_experts: int
    of_bytes: float | None
    device_bytes: tuple[float, float] | None

    def stay(self) -> Moving:
        """Return what it costs to keep the running placement: nothing moves."""
        if self.device_bytes is None:
            return self._replace(experts=0)
        before, _ = self.device_bytes
        return self._replace(
            experts=0, bytes=0.0, seconds=0.0, steps=None, device_bytes=(before, before)
        )


class SmallStep(NamedTuple):
    """What few moves gain of what the proposed placement does.

    Parameters
    ----------
    experts
        Copies that have to be moved to devices.
    bytes
        Of weights; None where the bytes of an expert are not known.
    gain
        Over what runs, on the unseen traffic of the first split, in the windows where most is
        gained.
    """

    experts: int
    bytes: float | None
    gain: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values."""
        return {"experts": self.experts, "bytes": self.bytes, "gain": self.gain.to_dict()}


class LpSplit(NamedTuple):
    """How even copies leave devices if a linear programme divides their tokens.

    Parameters
    ----------
    imbalance, imbalance_even
        Busiest device over the mean of recorded windows, divided so and in even shares.
    """

    imbalance: float
    imbalance_even: float


class PhaseTimes(NamedTuple):
    """One placement for prefill and decode, or two.

    ``microseconds`` is the predicted layer time on the unseen traffic of a phase, by what the
    placement was computed from (``"prefill"``, ``"decode"``, ``"both"``), then by phase.
    """

    microseconds: dict[str, dict[str, float]]

    @property
    def costs(self) -> dict[str, float]:
        """By how much a phase is slower under the other phase's placement than under its own."""
        pairs = zip(PHASES, PHASES[::-1], strict=True)
        return {phase: self._cost(phase, other) for phase, other in pairs}

    @property
    def costs_of_one(self) -> dict[str, float]:
        """By how much a phase is slower under one placement for both than under its own."""
        return {phase: self._cost(phase, "both") for phase in PHASES}

    def _cost(self, phase: str, under: str) -> float:
        return self.microseconds[under][phase] / self.microseconds[phase][phase] - 1

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values."""
        costs = {name: getattr(self, name) for name in ("costs", "costs_of_one")}
        return {"predicted_layer_us": self.microseconds, **costs}


@dataclass(frozen=True, eq=False, repr=False)
class Advice(Frozen):
    """Whether a placement is worth a trial, with what speaks for and against it.

    Times are predicted by a cost model and not measured.

    Parameters
    ----------
    answer
        ``"worth a trial"``, ``"not now"`` or ``"not enough evidence"``.
    findings
        What decides the answer, which comes first; why, what to know before relying on it, and
        what it takes. ``reasons``, ``warnings`` and ``sentence`` say them.
    judged
        What runs and what is proposed on unseen traffic of the first split, in each size of
        windows, with their groups; gains of all splits beside them.
    over_eplb
        The same with EPLB's placement, in as many slots as the proposed one has, in place of what
        runs, by window; empty if EPLB's is what runs.
    copies, knee
        What slots for copies would bring, all by searches of the same length, and how many of a
        device the proposed placement has: of those that take no more memory than what runs the
        fewest that are nearly as good as the best.
    more
        The fewest that are nearly as good as the best of all, where that is more memory than runs;
        None where it is not.
    moving
        From the running placement to the proposed one.
    step
        The cheapest useful step: few moves that gain most of it; None where there is none.
    phases
        Prefill and decode apart; None where the traffic does not know both.
    division
        The proposed placement if a linear programme divides tokens over copies; None where the
        engine has none, or nothing has copies.
    drift
        How far the second half of the recording differs from the first; None where that is not
        known.
    halves, groups_of_halves
        Gains of a placement of the first half on the second, and the other way round, where the
        halves differ, in the window where most is gained; and the groups of both halves.
    placements
        What runs and what is proposed, of the first split.
    result
        What the search found on the seen traffic of the first split.
    judged_on
        What that unseen traffic is, in words.
    one_kind
        What shows that the recording is of one kind of traffic, in words: figures hold for such
        traffic only. None where it has several kinds, or does not tell.
    prefill_lacks
        Tokens by which the recording is too short to judge prefill; 0 where it is judged, or
        windows of one size were asked for.
    total
        Gain over all of the serving time, where the share of prefill is known.
    by_group
        Gain of a placement that was computed from all other groups, by group and window; empty
        unless asked for.
    units
        What is independent in the traffic, in the window where most is gained.
    settings
        What was asked for.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> flat = mt.RoutingStatistics.from_load(np.full((40, 2, 8), 64))
    >>> mt.advise(flat, mt.Topology(4)).answer
    'not now'
    """

    answer: Answer
    findings: tuple[Finding, ...] = field(repr=False)
    judged: tuple[Judgement, ...]
    over_eplb: dict[int | None, Judgement] = field(repr=False)
    copies: tuple[Copies, ...]
    knee: int
    more: int | None
    moving: Moving
    phases: PhaseTimes | None
    drift: Drift | None
    halves: tuple[Comparison, ...]
    groups_of_halves: tuple[tuple[str, ...], ...]
    placements: tuple[Placement, Placement] = field(repr=False)
    result: Result = field(repr=False)
    units: Units = field(repr=False)
    problem: Problem = field(repr=False)
    judged_on: str = ""
    one_kind: str | None = None
    prefill_lacks: int = 0
    total: Comparison | None = None
    step: SmallStep | None = None
    division: LpSplit | None = None
    by_group: dict[str, dict[int | None, Comparison]] = field(default_factory=dict, repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    _also_shown = ("sentence", "reasons", "warnings")

    @property
    def main(self) -> Judgement:
        """The judgement in the windows where most is gained, for certain if in any."""
        return choose_main(self.judged)

    @property
    def ordered(self) -> list[Judgement]:
        """The judgements in windows of all sizes, those first in which most is gained."""
        return sorted(self.judged, key=lambda judged: -judged.gain.gain)

    @property
    def running(self) -> Evaluation:
        """What the running placement does to unseen traffic, in these windows."""
        return self.main.before

    @property
    def proposed(self) -> Evaluation:
        """What the proposed placement does to it."""
        return self.main.after

    @property
    def verdicts(self) -> tuple[Comparison, ...]:
        """The gains that the answer is on: in total if that is known, else in all windows."""
        return (self.total,) if self.total else tuple(each.gain for each in self.judged)

    @property
    def carried(self) -> tuple[float, ...]:
        """Lower ends of the gains of a placement of the one half on the other."""
        return tuple(gain.low or 0.0 for gain in self.halves)

    @property
    def sentence(self) -> str:
        """The answer and its first reason, which stand alone."""
        return self.say_answer()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, in sentences; the first is that of the answer."""
        return self.say("headline", "reason")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before relying on it, in sentences."""
        return self.say("warning")

    def overruled(self, headline: Finding) -> Advice:
        """Return the same with the answer that something forces which the traffic does not show."""
        answer: Any = headline.forces
        first, *others = self.findings
        findings = (replace(headline, role="headline"), replace(first, role="reason"), *others)
        return replace(self, answer=answer, findings=findings)

    def say_answer(self, voice: Voice = PYTHON) -> str:
        """Write the answer and its headline, which stand alone."""
        return words.say_answer(self.answer, self.findings[0], voice)

    def say(self, *roles: Role, voice: Voice = PYTHON) -> tuple[str, ...]:
        """Write the findings of some roles in sentences."""
        return tuple(words.say_all(self.findings, voice, roles=roles))

    def to_dict(self, voice: Voice = PYTHON) -> dict[str, Any]:
        """Return fields as JSON values, but for placements, the search and its problem."""
        left_out = {"placements", "result", "problem", "groups_of_halves"}
        left_out |= {"by_group", "judged", "over_eplb", "halves", "step", "answer", "findings"}
        fields: dict[str, Any] = {
            "answer": self.answer,
            "reasons": list(self.say("headline", "reason", voice=voice)),
            "warnings": list(self.say("warning", voice=voice)),
        }
        fields |= as_json(
            {name: value for name, value in vars(self).items() if name not in left_out}
        )
        by_group = [
            gain.to_dict() | {"group": group, "window": window}
            for group, gains in self.by_group.items()
            for window, gain in gains.items()
        ]
        groups = [list(names) for names in self.groups_of_halves]
        halves = [
            {"seen": groups[seen], "unseen": groups[1 - seen], "gain": gain.to_dict()}
            for seen, gain in enumerate(self.halves)
        ]
        return fields | {
            "sentence": self.say_answer(voice),
            "judged": [self._describe(judgement) for judgement in self.judged],
            "running": self.running.to_dict(),
            "proposed": self.proposed.to_dict(),
            "halves": halves,
            "carried": list(self.carried),
            "step": None if self.step is None else self.step.to_dict(),
            "by_group": by_group,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def _describe(self, judgement: Judgement) -> dict[str, Any]:
        """Return a judgement, the one over EPLB, and what a step saves, as JSON values."""
        over_eplb, saved = self.over_eplb.get(judgement.window), compute_saved_us(judgement)
        return {
            **judgement.to_dict(),
            "over_eplb": None if over_eplb is None else over_eplb.to_dict(),
            "layers": judgement.layers,
            "saved_us_per_layer": saved / judgement.layers,
            "saved_us_per_step": saved,
        }
