"""Policies that engines load: where experts go while a model serves.

``decision`` decides, and knows no engine; ``settings`` are variables, ``files`` what they name,
``agreement`` what all ranks do, ``log`` what is said; ``balancer`` is what the file of an engine
calls. Engines and torch are imported inside functions, so that this package imports neither.
"""

from moetuner.plugins.decision import rebalance_experts

__all__ = ["rebalance_experts"]
