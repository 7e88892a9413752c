"""Options for the measures that are judged, and the limits at which a command fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import click

from moetuner import _texts
from moetuner.cli.options import JUDGING, option
from moetuner.cli.options.kinds import Number
from moetuner.cli.options.placed import Placed
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.judgement import MEASURES, Judgement
from moetuner.files.cells import percent

TIME = "predicted_layer_us"


@dataclass(frozen=True)
class Gates:
    """The measures that are judged, and limits that fail.

    Parameters
    ----------
    measures
        Measure that --fail-if-worse and --fail-if-gain-below judge; may be repeated. [default: the
        predicted time]
    fail_if_worse
        Exit with status 3 if a group got worse by more than so many percent, beyond chance.
    fail_if_gain_below
        Exit with status 3 unless all traffic gains so many percent for certain: the lower end of
        the 95 % interval counts, so a gain that may be chance fails.
    """

    measures: tuple[str, ...] = option(
        click.Choice(MEASURES), default=(), flag="--measure", multiple=True, group=JUDGING
    )
    fail_if_worse: float | None = option(Number(min=0), "PCT", group=JUDGING)
    fail_if_gain_below: float | None = option(Number(max=100), "PCT", group=JUDGING)

    @property
    def judged(self) -> tuple[str, ...]:
        """The measures that limits are for."""
        return self.measures or (TIME,)

    @property
    def limits(self) -> dict[str, float | None]:
        """The limits by name, for JSON."""
        return {name: getattr(self, name) for name in ("fail_if_worse", "fail_if_gain_below")}

    def check(self, placed: Placed) -> None:
        """Raise if a limit would apply to other traffic than the part that was held out."""
        if any(limit is not None for limit in self.limits.values()):
            placed.check_gate()

    def with_measure(self, judgement: Judgement) -> Judgement:
        """Return a judgement with a verdict on the first measure; raise for one without figures."""
        for measure in self.measures:
            if measure not in judgement.whole:
                raise click.BadParameter(
                    f"must be of {', '.join(judgement.whole)} for this input, got {measure}",
                    param_hint="'--measure'",
                )
        return replace(judgement, measure=self.measures[0]) if self.measures else judgement

    def failures(self, judgement: Judgement) -> Iterator[str]:
        """Write a sentence for each limit that is exceeded."""
        limit, least = self.fail_if_worse, self.fail_if_gain_below
        worse = [] if limit is None else judgement.worse(limit / 100, measures=self.judged)
        for worst in worse[:1]:
            yield (
                f"failed: {_texts.name(worst.group)} has {worst.amount} "
                f"{FIGURES[worst.measure].label}; the gate allows {limit:g} %"
            )
        for measure in () if least is None else self.judged:
            gain, label = judgement.whole[measure], FIGURES[measure].label
            if least is not None and not gain.before and (gain.after or least > 0):
                after = FIGURES[measure].text(gain.after)
                yield f"failed: {label} is 0 under {gain.names[0]} and {after} then: no gain"
            elif gain.low is None:
                doubt = f": {gain.doubt}" if gain.is_too_few else ""
                yield f"failed: no gain in {label} is certain{doubt}"
            elif least is not None and 100 * gain.low < least:
                yield (
                    f"failed: the gain in {label} is {percent(gain.gain)}, but its 95 % interval "
                    f"begins at {100 * gain.low:.2f} %; the gate asks for {least:g} %"
                )

    def facts(self) -> dict[str, Any]:
        """Return measures and limits, for JSON."""
        return {"judged": self.judged, **self.limits}
