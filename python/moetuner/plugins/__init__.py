"""Policies that engines load, which place experts while a model serves.

``decision`` decides, and knows no engine; ``settings`` reads variables, ``files`` the files that
they name; ``agreement`` lets all ranks do the same, ``log`` writes lines, ``metrics`` those of
Prometheus. The module of an engine calls ``balancer``. Functions import engines and torch, so this
package imports neither.
"""

from moetuner.plugins.decision import rebalance_experts

__all__ = ["rebalance_experts"]
