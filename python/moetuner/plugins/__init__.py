"""Policies that engines load: where experts go while a model serves.

``policy`` decides, and knows no engine; every other file fits it to one engine, which it imports
inside functions, so that this package imports neither an engine nor torch.
"""

from moetuner.plugins.policy import rebalance_experts

__all__ = ["rebalance_experts"]
