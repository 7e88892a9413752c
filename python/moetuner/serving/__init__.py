"""Serving: how a model is served, by which engine, on which machine, with which split of copies."""
