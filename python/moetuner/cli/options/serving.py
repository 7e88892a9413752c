"""Options that say how traffic is served: by which engine, or setting by setting of a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar

import click

from moetuner.cli.options import Maker, Text, option
from moetuner.cli.options.machine import COST_MODEL, cost_model_for
from moetuner.cli.options.traffic import Traffic
from moetuner.formats.engines import ENGINES
from moetuner.problem import Problem
from moetuner.problem.settings import ENGINE, settings_of
from moetuner.topology import Topology

SETTINGS = settings_of(Problem)
DEFAULTS = {of.name: of.default for of in fields(Problem) if of.name in SETTINGS}
# Settings that an engine decides unless an option does.
SERVED = ("regime", "split", "arrival")


def setting_option(name: str) -> Maker:
    """Return the option of a setting; its value is None or empty if it is not given."""
    setting = SETTINGS[name]
    kind: Any = None
    if name == "cost_model":  # its files and presets are read as those of --topology are
        kind = COST_MODEL
    elif setting.choices:
        kind = click.Choice(setting.choices)
    elif setting.read is not None:
        kind = Text(setting.read, setting.rule)
    others: dict[str, Any] = {"flag": setting.option} if setting.option else {}
    return option(
        kind,
        setting.metavar,
        group=setting.group,
        help=setting.help,
        is_flag=kind is None,
        multiple=setting.repeatable,
        **others,
    )


ENGINE_OPTION = option(
    click.Choice(list(ENGINES)),
    group=ENGINE,
    flag="--for",
    help="Engine that loads the placement. It sets regime, split and arrival, unless their options "
    "do. If a placement is computed, it also sets equal slots, all of them full.",
)


class Serving:
    """Settings of a problem as options give them; what they leave open is the engine's.

    Parameters
    ----------
    engine
        Of ``ENGINES``; None for none.
    given
        Values of settings by name; None, False and empty ones are not given.
    """

    OPTIONS: ClassVar[dict[str, Maker]] = {
        "engine": ENGINE_OPTION,
        **{name: setting_option(name) for name in ("cost_model", *SERVED)},
    }

    def __init__(self, engine: str | None = None, **given: Any) -> None:
        self.engine = engine
        self.given = {
            name: value
            for name, value in given.items()
            if value is not None and value is not False and value != ()
        }

    @property
    def is_given(self) -> bool:
        """Whether any option says how traffic is served."""
        return self.engine is not None or bool(self.given)

    @property
    def has_times(self) -> bool:
        """Whether an option says what times are of."""
        return self.engine is not None or "cost_model" in self.given

    def value(self, name: str) -> Any:
        """Return a setting: the one given, else the engine's, else the default."""
        if name in self.given:
            return self.given[name]
        default = DEFAULTS[name]
        return default if self.engine is None else getattr(ENGINES[self.engine], name, default)

    def arguments(self, traffic: Traffic) -> dict[str, Any]:
        """Return the arguments of ``evaluate`` and ``audit`` that say the same."""
        model = cost_model_for(self.given.get("cost_model"), traffic)
        return {"cost_model": model, **{name: self.value(name) for name in SERVED}}

    def settings(self, topology: Topology, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return settings and the machine for JSON."""
        model = arguments["cost_model"]
        return {
            "devices": topology.devices,
            "devices_per_node": topology.devices_per_node,
            "topology": topology.name,
            "for": self.engine,
            **arguments,
            "cost_model": None if model is None else asdict(model),
        }

    def explain(self, more: Sequence[str] = ()) -> list[str]:
        """Write in a line what ``--for`` has set, and other options; in none without an engine."""
        if self.engine is None:
            return []
        engine = ENGINES[self.engine]
        by_engine, by_options = [], []
        for name in SERVED:
            if name == "split" and not engine.may_copy:
                continue
            text = f"{name} {self.value(name)}"
            if name in self.given:
                by_options.append(text)
            else:
                by_engine.append(f"{text} ({engine.how_split})" if name == "split" else text)
        line = f"For {engine.title}: {', '.join([*by_engine, *more])}"
        return [line + (f"; from your options: {', '.join(by_options)}." if by_options else ".")]
