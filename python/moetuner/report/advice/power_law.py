"""The power law whose synthetic routing would keep its busiest device as busy.

Simulators of serving draw how many tokens each expert gets from a power law: NVIDIA's
AIConfigurator from the density x**-alpha between 1 and 0.8 of the tokens (its collectors'
``power_law_logits_v3``), with experts in blocks. Who knows the exponent that fits a placement can
compare their answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Draws that are averaged; always the same ones, so that the mean changes smoothly with alpha.
DRAWS = 128
# Between these the busiest device gets busier with alpha: below, all experts get nearly as many
# tokens as the most; above, nearly all get one, and the most fall to a few at random.
LOWEST, HIGHEST = -32.0, 2.0
# Exponents that are tried; what is between two follows the line.
STEPS = 340
MOST = 0.8


def exponents(
    imbalance: tuple[float, ...], *, experts: int, devices: int, tokens: int
) -> tuple[float | None, ...]:
    """Compute the exponent with the same busiest device, for every layer.

    ``imbalance`` is the largest / mean device load of the layers [L], of experts in blocks and
    windows of so many tokens. None where no exponent from -32 to 2 has it.
    """
    if devices < 2 or experts % devices or tokens < 4:
        return (None,) * len(imbalance)
    drawn = np.random.default_rng(0).random((DRAWS, experts))
    wanted = np.array(imbalance)
    grid = np.linspace(LOWEST, HIGHEST, STEPS + 1)
    reached = np.array([_busiest(alpha, drawn, devices, tokens) for alpha in grid])
    reached = np.maximum.accumulate(reached)
    alpha = np.interp(wanted, reached, grid)
    inside = (wanted >= reached[0]) & (wanted <= reached[-1])
    return tuple(
        round(float(each), 3) if is_inside else None
        for each, is_inside in zip(alpha, inside, strict=True)
    )


def _busiest(alpha: float, drawn: NDArray[np.float64], devices: int, tokens: int) -> float:
    """Largest / mean device load of a power law, averaged over draws."""
    most = MOST * tokens
    power = 1 - alpha
    even = abs(power) < 1e-9
    load = most**drawn if even else ((most**power - 1) * drawn + 1) ** (1 / power)
    of_device = load.reshape(len(load), devices, -1).sum(axis=2)
    return float((of_device.max(axis=1) / of_device.mean(axis=1)).mean())
