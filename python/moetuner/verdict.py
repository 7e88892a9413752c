"""Verdict: whether a placement is worth changing to, in time if times were predicted."""

from __future__ import annotations

from dataclasses import dataclass

from moetuner._validation import not_negative
from moetuner.evaluation import Evaluation

# Gains below this are within what predictions, profiles and clocks get wrong. Engines that ask
# before they rebalance draw the line at about the same place (vLLM on ROCm: 5 %).
DEAD_ZONE = 0.02


@dataclass(frozen=True)
class Verdict:
    """What changing from one placement to another would bring.

    Parameters
    ----------
    measure
        ``predicted_layer_us``, or ``imbalance`` where no times were predicted.
    before, after
        The measure.
    gain
        Share that is saved; negative where the change makes things worse.
    dead_zone
        Gains up to this are noise.
    """

    measure: str
    before: float
    after: float
    gain: float
    dead_zone: float

    @property
    def is_worth_it(self) -> bool:
        """Whether the gain is more than noise."""
        return self.gain > self.dead_zone

    def __str__(self) -> str:
        unit = " us" if self.measure == "predicted_layer_us" else ""
        figures = f"{self.measure} {self.before:.4g}{unit} -> {self.after:.4g}{unit}"
        word = "worth it" if self.is_worth_it else "not worth it"
        noise = f"{100 * self.dead_zone:g} % is noise"
        return f"{word}: {figures}, gain {100 * self.gain:.1f} % ({noise})"


def verdict(before: Evaluation, after: Evaluation, *, dead_zone: float = DEAD_ZONE) -> Verdict:
    """Judge a change of placement by what both do to the same traffic.

    Parameters
    ----------
    before, after
        Evaluations of the same traffic.
    dead_zone
        Share up to which a gain is noise and not worth it.

    Raises
    ------
    ValueError
        If ``dead_zone`` is negative.
    """
    not_negative("dead_zone", dead_zone, "share")
    old, new, measure = before.imbalance, after.imbalance, "imbalance"
    if before.predicted_layer_us is not None and after.predicted_layer_us is not None:
        old, new = before.predicted_layer_us, after.predicted_layer_us
        measure = "predicted_layer_us"
    gain = 1 - new / old if old > 0 else 0.0
    return Verdict(measure, old, new, gain, dead_zone)
