"""Options that say how figures are computed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from moetuner.cli.options.serving import setting_option
from moetuner.cli.options.traffic import Source
from moetuner.evaluation.options import ReplayOptions


class FigureOptions:
    """Options of all settings that say how figures are computed.

    Parameters
    ----------
    values
        Values of settings by name.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        setting.name: setting_option(setting.name)
        for setting in fields(ReplayOptions)
        if setting.metadata
    }

    def __init__(self, **values: Any) -> None:
        self.values = values

    def replay_options(self, source: Source) -> ReplayOptions:
        """Return the options of a replay of INPUT."""
        return ReplayOptions(threads=source.threads, **self.values)
