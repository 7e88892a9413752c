"""Read the settings of the plugins from variables of the environment, ``MOETUNER_...``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from moetuner._checks import is_number, shown
from moetuner.plugins.decision import MoveLimits

PREFIX = "MOETUNER_"
# Variables that are numbers, and the arguments of ``MoveLimits`` that they set.
NUMBERS = {
    "MOVE_BUDGET" if field.name == "budget" else field.name.upper(): field.name
    for field in fields(MoveLimits)
}
NAMES = (
    *("PLACEMENT", "REBALANCE", "PROFILE", "RECORD", "RELOAD", "UPDATES", "METRICS_PORT"),
    *NUMBERS,
)
# Variable of ``prometheus_client``: the folder in which processes leave their series for the one
# that serves them.
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
HIGHEST_PORT = 65535
# Texts that switch a variable on and off.
ON, OFF = ("1", "true", "on"), ("0", "false", "off")
# Beginnings of variables that other parts of the package read.
OTHERS = ("COMPLETE",)


@dataclass(frozen=True)
class Settings:
    """The variables of the plugins.

    Parameters
    ----------
    placements
        Files of placements to serve, one for each model of the engine: ``MOETUNER_PLACEMENT``.
    rebalance
        If True, follow live loads: ``MOETUNER_REBALANCE``.
    profile
        File of a trace, or of statistics with co-activation: ``MOETUNER_PROFILE``.
    record
        Folder for windows of load: ``MOETUNER_RECORD``.
    reload
        File whose change has all others read again: ``MOETUNER_RELOAD``.
    updates
        If True, weights that change follow experts that move (vLLM): ``MOETUNER_UPDATES``, by
        default if any other variable is set.
    metrics_port
        Port at which rank 0 serves its metrics: ``MOETUNER_METRICS_PORT``. A wrong one is None, as
        it must not change what ranks decide.
    rules
        Limits of moves. Each field has a variable of its name in capitals, such as
        ``MOETUNER_DEAD_ZONE``; that of the budget is ``MOETUNER_MOVE_BUDGET``.
    """

    placements: tuple[Path, ...] = ()
    rebalance: bool = False
    profile: Path | None = None
    record: Path | None = None
    reload: Path | None = None
    updates: bool = True
    metrics_port: int | None = None
    rules: MoveLimits = field(default_factory=MoveLimits)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings | None:
        """Read the settings of an environment, by default the process's; None without any."""
        variables = os.environ if environment is None else environment

        def text(name: str) -> str:
            return variables.get(PREFIX + name, "").strip()

        def path(name: str) -> Path | None:
            return Path(text(name)) if text(name) else None

        def switch(name: str) -> bool | None:
            value = text(name).lower()
            if value not in ("", *ON, *OFF):
                raise ValueError(f"{PREFIX}{name} must be 0 or 1, got {shown(value)}")
            return value in ON if value else None

        updates = switch("UPDATES")
        numbers = {}
        for name, argument in NUMBERS.items():
            number = _number(name, text(name)) if text(name) else getattr(MoveLimits, argument)
            is_whole = name == "MOVE_BUDGET" and number is not None
            numbers[argument] = int(number) if is_whole else number
        settings = cls(
            tuple(Path(name) for name in text("PLACEMENT").split(os.pathsep) if name.strip()),
            bool(switch("REBALANCE")),
            path("PROFILE"),
            path("RECORD"),
            path("RELOAD"),
            updates is not False,
            _find_port(variables),
            MoveLimits(**numbers),  # type: ignore[arg-type]
        )
        return settings if settings.decides or settings.record or updates else None

    @property
    def decides(self) -> bool:
        """True if settings ask for maps, not only for records."""
        return bool(self.placements) or self.rebalance


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not (is_number(number) and 0 <= number < float("inf")):
        raise ValueError(f"{PREFIX}{name} must be a number of at least 0, got {shown(value)}")
    return number


def _find_port(variables: Mapping[str, str]) -> int | None:
    """Return the port of the metrics; None if it is not set, wrong, or not needed."""
    text = variables.get(PREFIX + "METRICS_PORT", "").strip()
    if METRICS_FOLDER in variables or not (text.isascii() and text.isdigit() and len(text) < 9):
        return None
    return int(text) if int(text) <= HIGHEST_PORT else None


def find_idle_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return a warning for every variable without effect: it is unknown, or another one wins."""
    variables = os.environ if environment is None else environment
    names = [name.removeprefix(PREFIX) for name in sorted(variables) if name.startswith(PREFIX)]
    lines = []
    for name in names:
        if name in NAMES or name.strip("_").startswith(OTHERS):
            continue
        similar = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {PREFIX}{similar[0]}?" if similar else f"known are {', '.join(NAMES)}"
        lines.append(f"{PREFIX}{name} is not a variable of moetuner: {hint}")
    try:
        settings = Settings.from_environment(variables)
    except ValueError:
        return lines
    serves = settings is not None and bool(settings.placements)
    rebalances = settings is not None and settings.rebalance
    useless = "{} does nothing without MOETUNER_PLACEMENT or MOETUNER_REBALANCE=1"
    port = variables.get(PREFIX + "METRICS_PORT", "").strip()
    if port and METRICS_FOLDER in variables:
        lines.append(f"MOETUNER_METRICS_PORT does nothing where {METRICS_FOLDER} is set")
    elif port and _find_port(variables) is None:
        lines.append(
            f"MOETUNER_METRICS_PORT must be a port from 0 to {HIGHEST_PORT}, got {shown(port)}: "
            "metrics are not served"
        )
    elif port and not (serves or rebalances):
        lines.append(useless.format("MOETUNER_METRICS_PORT"))
    if serves and rebalances:
        lines.append("MOETUNER_PLACEMENT is served, so MOETUNER_REBALANCE does nothing")
    if variables.get(PREFIX + "PROFILE") and (serves or not rebalances):
        condition = "with MOETUNER_PLACEMENT" if serves else "without MOETUNER_REBALANCE=1"
        lines.append(f"MOETUNER_PROFILE does nothing {condition}")
    if variables.get(PREFIX + "RELOAD") and not (serves or rebalances):
        lines.append(useless.format("MOETUNER_RELOAD"))
    return lines
