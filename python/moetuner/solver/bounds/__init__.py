"""Proven lower bounds, and certificates of them."""
