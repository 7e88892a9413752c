"""Policies that engines load, which place experts while a model serves.

The module of an engine asks ``balancer``, and a decision goes from station to station:
``proposals`` has what this rank would serve by its ``settings`` and ``files`` (``decision``
computes it, and knows no engine), ``agreement`` lets all ranks do the same, ``running`` compares
what the engine then runs, and ``reports`` passes all to the log and the metrics. ``updates`` loads
weights that change to where the experts are. Functions import engines and torch, so this package
imports neither.
"""

from moetuner.plugins.decision import rebalance_experts

__all__ = ["rebalance_experts"]
