"""Splits: how an engine's dispatcher splits an expert's tokens over its copies."""

from __future__ import annotations

from typing import Literal, get_args

Split = Literal["even", "nearest", "round_robin", "lp"]
SPLITS: tuple[Split, ...] = get_args(Split)
