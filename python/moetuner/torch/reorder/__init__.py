"""Experts of a model in the order of a placement."""
