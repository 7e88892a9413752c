"""Options that say how figures are computed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from moetuner.cli.options.serving import setting_option
from moetuner.cli.options.traffic import Source
from moetuner.evaluation.options import ReplayOptions


class FigureOptions:
    """Options of every setting that says how figures are computed, however the model is served.

    Parameters
    ----------
    values
        Of settings by name.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        own.name: setting_option(own.name) for own in fields(ReplayOptions) if own.metadata
    }

    def __init__(self, **values: Any) -> None:
        self.values = values

    def replay_options(self, source: Source) -> ReplayOptions:
        """Return how INPUT is replayed."""
        return ReplayOptions(threads=source.threads, **self.values)
