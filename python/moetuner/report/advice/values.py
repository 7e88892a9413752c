"""The values that advise() returns: an Advice and its sections."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from moetuner.cost.memory import Memory
from moetuner.evaluation import Evaluation
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.judgement import Judgement
from moetuner.evaluation.samples import Samples
from moetuner.files.cells import percent
from moetuner.frozen import Frozen, as_json, html_table
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
    """Return the size of a judgement's windows, and the tokens of recorded ones, for a finding."""
    replayed = judgement.after.replayed
    recorded = None if replayed is None else replayed.traffic.window
    return {"window": judgement.window, "recorded": recorded}


def write_windows(judgement: Judgement) -> str:
    """Write the size of a judgement's windows."""
    return name_windows(**describe_windows(judgement))


def compute_saved_us(judgement: Judgement) -> float:
    """Compute the predicted microseconds that a step saves over all layers."""
    return judgement.layers * (judgement.gain.before - judgement.gain.after)


def compute_part(us: float, layers: int, step_ms: float) -> float:
    """Compute the share of a step that its layers take, each ``us``: at most all of it."""
    return min(layers * us / 1e3 / step_ms, 1.0)


def share_of_step(gain: Comparison, layers: int, step_ms: float) -> Comparison:
    """Return the gain of a whole step, of which the layers with experts are a part."""
    part = compute_part(gain.before, layers, step_ms)
    change = gain.change
    error = None if change.error is None else part * change.error
    value = part * change.value
    return replace(
        gain,
        before=1e3 * step_ms,
        after=1e3 * step_ms * (1 + value),
        change=replace(change, value=value, error=error),
        splits=tuple(part * split for split in gain.splits),
    )


def choose_main(judgements: tuple[Judgement, ...]) -> Judgement:
    """Return the judgement with the largest gain, among those that are worth it if any is."""
    return max(judgements, key=lambda judgement: (judgement.gain.is_worth_it, judgement.gain.gain))


@dataclass(frozen=True, eq=False, repr=False)
class Copies(Frozen):
    """Gain and cost of a number of slots for copies.

    Parameters
    ----------
    per_device
        Slots of a device in every layer beyond those that hold each expert once.
    gains
        Share of predicted time that is saved over the running placement on the unseen traffic of
        the first split, by window, after a search as short as that of all other numbers. Where no
        other number was tried, the gain of the proposed placement.
    bytes_per_device
        Memory that the copies take; None where the bytes of an expert are unknown.
    tokens_per_rank
        Tokens that a rank may send at once by DeepEP's low-latency kernels, whose buffers grow with
        the slots; None where the engine has no such kernels or the size of a row is unknown.
    layers
        Fewest layers whose copies bring nine tenths of the gain of copies in all layers on unseen
        traffic, if layers get copies in the order of their gain on seen traffic; None where
        placements without copies were not tried, or are as good.
    cache_tokens, cache_share
        Tokens of KV cache whose memory the copies take beyond those that run already, and their
        share of the KV cache that fits beside the weights; 1 where they do not fit. None where
        memory, KV cache or the bytes of an expert are unknown.
    """

    per_device: int
    gains: dict[int | None, tuple[float, ...]]
    bytes_per_device: float | None
    tokens_per_rank: int | None = None
    layers: int | None = None
    cache_tokens: int | None = None
    cache_share: float | None = None

    def mean(self, window: int | None) -> float:
        """Return the mean gain in windows of a size."""
        return float(np.mean(self.gains[window]))

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values."""
        gains = [
            {"window": window, "mean": self.mean(window), "splits": list(splits)}
            for window, splits in self.gains.items()
        ]
        return {**vars(self), "gains": gains}


class Moving(NamedTuple):
    """Cost of moving to the proposed placement; nothing moves where the answer is "not now".

    Parameters
    ----------
    experts
        Copies that have to be moved to devices.
    bytes, seconds
        Bytes of weights that move, and the time that this takes the busiest port at the topology's
        bandwidth; None where the bytes of an expert are unknown.
    steps
        Steps of the model that save as much time as moving takes; None where nothing is gained, or
        the seconds are unknown.
    of_experts, of_bytes
        Copies of the proposed placement on all devices, and their bytes.
    device_bytes
        Bytes of experts on the fullest device, before and after; None where the bytes of an expert
        are unknown.
    """

    experts: int
    bytes: float | None
    seconds: float | None
    steps: float | None
    of_experts: int
    of_bytes: float | None
    device_bytes: tuple[float, float] | None

    def stay(self) -> Moving:
        """Return the cost of keeping the running placement: nothing moves."""
        if self.device_bytes is None:
            return self._replace(experts=0)
        before, _ = self.device_bytes
        return self._replace(
            experts=0, bytes=0.0, seconds=0.0, steps=None, device_bytes=(before, before)
        )


class SmallStep(NamedTuple):
    """A step with few moves, which gains most of what the proposed placement gains.

    Parameters
    ----------
    experts
        Copies that have to be moved to devices.
    bytes
        Bytes of weights that move; None where the bytes of an expert are unknown.
    gain
        Gain over the running placement, on the unseen traffic of the first split, in the windows
        where most is gained.
    """

    experts: int
    bytes: float | None
    gain: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values."""
        return {"experts": self.experts, "bytes": self.bytes, "gain": self.gain.to_dict()}


class LpSplit(NamedTuple):
    """Imbalance where a linear programme splits the tokens of copies, beside even shares.

    Parameters
    ----------
    imbalance, imbalance_even
        Load of the busiest device over the mean, averaged over windows: by the linear programme,
        and in even shares.
    """

    imbalance: float
    imbalance_even: float


class PhaseTimes(NamedTuple):
    """Predicted times of one placement for prefill and decode, and of one for each.

    ``microseconds`` has the layer time on the unseen traffic of a phase, by what the placement was
    computed from (``"prefill"``, ``"decode"``, ``"both"``), then by phase.
    """

    microseconds: dict[str, dict[str, float]]

    @property
    def gain_of_two(self) -> float:
        """Largest share of time that a phase saves under its own placement over one for both."""
        return max(1 - 1 / (1 + cost) for cost in self.costs_of_one.values())

    @property
    def costs(self) -> dict[str, float]:
        """Share of time that each phase takes longer under the other's placement than its own."""
        pairs = zip(PHASES, PHASES[::-1], strict=True)
        return {phase: self._cost(phase, other) for phase, other in pairs}

    @property
    def costs_of_one(self) -> dict[str, float]:
        """Share of time that each phase takes longer under one for both than under its own."""
        return {phase: self._cost(phase, "both") for phase in PHASES}

    def _cost(self, phase: str, under: str) -> float:
        return self.microseconds[under][phase] / self.microseconds[phase][phase] - 1

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values."""
        costs = {name: getattr(self, name) for name in ("costs", "costs_of_one")}
        return {"predicted_layer_us": self.microseconds, **costs}


@dataclass(frozen=True, eq=False, repr=False)
class Advice(Frozen):
    """Answer whether a placement is worth a trial, with its reasons, gains and costs.

    Times are predicted by a cost model and not measured.

    Parameters
    ----------
    answer
        ``"worth a trial"``, ``"not now"`` or ``"not enough evidence"``.
    findings
        Findings: the headline, which decides the answer, comes first; then reasons, warnings and
        costs. ``sentence``, ``reasons`` and ``warnings`` say them.
    judged
        Judgements of the proposed placement beside the running one on unseen traffic of the first
        split, one for each size of windows, with groups; their gains have the values of all splits.
    over_eplb
        The same beside EPLB's placement, in as many slots as the proposed one has, by window; empty
        if EPLB's placement runs.
    copies
        Gain and cost of each number of slots for copies that was tried, by equally short searches.
    chosen_copies
        Slots for copies of a device and layer in the proposed placement: those that pay for their
        memory in all phases, or the number that was asked for.
    fewer_copies
        Slots for copies of the best placement that takes no more memory than the running one; None
        where that one is proposed.
    larger_copies
        More slots for copies that gain more, but not in all phases or not what their memory is
        worth; None where none do.
    moving
        Cost of moving from the running placement to the proposed one.
    step
        The cheapest useful step: few moves that gain most of it; None where there is none.
    phases
        Placements for prefill and decode apart; None where the traffic does not have both.
    lp_split
        Imbalance of the proposed placement if a linear programme splits tokens over copies; None
        where the engine has no such dispatch, or no expert has copies.
    drift
        How far the second half of the recording differs from the first; None where unseen traffic
        was given, or the recording is too short.
    halves, groups_of_halves
        Where the halves of the recording differ: the gain of a placement computed from the first
        half on the second, and the reverse, in the window where most is gained; and the groups of
        both halves.
    placements
        The running and the proposed placement of the first split.
    result
        Result of the search on the seen traffic of the first split.
    judged_on
        Description of the unseen traffic of the first split.
    one_kind
        Evidence that the recording is of one kind of traffic, in words: figures hold for such
        traffic only. None where it has several kinds, or the kind is unknown.
    prefill_lacks
        Tokens by which the recording is too short to judge prefill; 0 where prefill is judged, or
        windows of one size were requested.
    total
        Gain over all of the serving time, where the share of prefill is known.
    by_group
        Gain on each group of a placement that was computed from all other groups, by group and
        window; empty unless requested.
    units
        Independent samples of the traffic, in the window where most is gained.
    of_step
        Gain of a whole step, by window, where ``step_ms`` says what a step takes; empty otherwise.
    memory
        Memory of a device and what is left of it for KV cache; None if unknown.
    settings
        Settings of the advice, with defaults resolved.

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
    chosen_copies: int
    fewer_copies: int | None
    larger_copies: int | None
    moving: Moving
    phases: PhaseTimes | None
    drift: Drift | None
    halves: tuple[Comparison, ...]
    groups_of_halves: tuple[tuple[str, ...], ...]
    placements: tuple[Placement, Placement] = field(repr=False)
    result: Result = field(repr=False)
    units: Samples = field(repr=False)
    problem: Problem = field(repr=False)
    judged_on: str = ""
    one_kind: str | None = None
    prefill_lacks: int = 0
    total: Comparison | None = None
    step: SmallStep | None = None
    lp_split: LpSplit | None = None
    by_group: dict[str, dict[int | None, Comparison]] = field(default_factory=dict, repr=False)
    of_step: dict[int | None, Comparison] = field(default_factory=dict)
    memory: Memory | None = None
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    _also_shown = ("sentence", "reasons", "warnings")

    def plot(self, *, layer: int | None = None) -> Any:
        """Draw the proposed placement below the running one, as a figure of plotly.

        Colours are loads of the seen traffic. ``layer`` is one whose load of every device is drawn
        as bars instead.

        Raises
        ------
        ImportError
            If plotly is not installed: ``pip install 'moetuner[report]'``.
        """
        running, proposed = self.placements
        return proposed.plot(self.problem.load, before=running, layer=layer)

    def _repr_html_(self) -> str:
        head = ("windows", "measure", "running", "proposed", "gain", "from", "to")
        rows: list[tuple[Any, ...]] = [
            (
                "-" if judgement.window is None else f"{judgement.window:,}",
                measure,
                gain.before,
                gain.after,
                *map(percent, (gain.gain, gain.low, gain.high)),
            )
            for judgement in self.judged
            for measure, gain in judgement.whole.items()
        ]
        return html_table(head, rows, self.sentence)

    @property
    def main(self) -> Judgement:
        """The judgement with the largest gain, among those that are worth it if any is."""
        return choose_main(self.judged)

    @property
    def judged_by_gain(self) -> list[Judgement]:
        """The judgements in windows of all sizes, by falling gain."""
        return sorted(self.judged, key=lambda judgement: -judgement.gain.gain)

    @property
    def running(self) -> Evaluation:
        """Evaluation of the running placement, in the windows of the main judgement."""
        return self.main.before

    @property
    def proposed(self) -> Evaluation:
        """Evaluation of the proposed placement, in the windows of the main judgement."""
        return self.main.after

    @property
    def verdicts(self) -> tuple[Comparison, ...]:
        """The gains that decide the answer: the total if it is known, else those of all windows.

        They are of a whole step where its time is known.
        """
        if self.total is not None:
            return (self.total,)
        return tuple(map(self.decisive_gain, self.judged))

    def decisive_gain(self, judgement: Judgement) -> Comparison:
        """Return the gain of a step if its time is known, else of the layers with experts."""
        return self.of_step.get(judgement.window, judgement.gain)

    @property
    def carried(self) -> tuple[float, ...]:
        """Lower ends of the gains of placements computed from one half and judged on the other."""
        return tuple(gain.low or 0.0 for gain in self.halves)

    @property
    def sentence(self) -> str:
        """The answer and its first reason, as a sentence that stands alone."""
        return self.say_answer()

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons, in sentences; the first is that of the answer."""
        return self.say("headline", "reason")

    @property
    def warnings(self) -> tuple[str, ...]:
        """Limits of the answer, in sentences."""
        return self.say("warning")

    def overruled(self, headline: Finding) -> Advice:
        """Return the advice with another headline and the answer that this one forces."""
        answer: Any = headline.forces
        first, *others = self.findings
        findings = (replace(headline, role="headline"), replace(first, role="reason"), *others)
        return replace(self, answer=answer, findings=findings)

    def say_answer(self, voice: Voice = PYTHON) -> str:
        """Write the answer and its headline in a sentence that stands alone."""
        return words.say_answer(self.answer, self.findings[0], voice)

    def say(self, *roles: Role, voice: Voice = PYTHON) -> tuple[str, ...]:
        """Write the findings of some roles in sentences."""
        return tuple(words.say_all(self.findings, voice, roles=roles))

    def to_dict(self, voice: Voice = PYTHON) -> dict[str, Any]:
        """Return fields as JSON values, without placements, the search and its problem."""
        left_out = {"placements", "result", "problem", "groups_of_halves"}
        left_out |= {"by_group", "judged", "over_eplb", "halves", "step", "answer", "findings"}
        left_out |= {"of_step", "memory"}
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
            "memory": None if self.memory is None else self.memory._asdict(),
            "by_group": by_group,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def _describe(self, judgement: Judgement) -> dict[str, Any]:
        """Return a judgement, the one beside EPLB, and the time saved per step, as JSON values."""
        over_eplb, saved = self.over_eplb.get(judgement.window), compute_saved_us(judgement)
        of_step = self.of_step.get(judgement.window)
        return {
            **judgement.to_dict(),
            "over_eplb": None if over_eplb is None else over_eplb.to_dict(),
            "layers": judgement.layers,
            "saved_us_per_layer": saved / judgement.layers,
            "saved_us_per_step": saved,
            "of_step": None if of_step is None else of_step.to_dict(),
        }
