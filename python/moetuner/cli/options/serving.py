"""Options that say how traffic is served: by which engine, or setting by setting of a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import click

from moetuner.cli.options import Decorator, completing, option, option_group, parsed
from moetuner.cli.options.machine import cost_model_for, parse_cost_model
from moetuner.cli.options.traffic import Traffic
from moetuner.formats.engines import ENGINES
from moetuner.presets import GPUS
from moetuner.problem import Problem
from moetuner.problem.settings import ENGINE, settings_of
from moetuner.topology import Topology

SETTINGS = settings_of(Problem)
DEFAULTS = {of.name: of.default for of in fields(Problem) if of.name in SETTINGS}
# Settings that an engine decides unless an option does.
SERVED = ("regime", "split", "arrival")


def setting_option(name: str) -> Decorator:
    """Return the option of a setting; its value is None or empty if it is not given."""
    setting = SETTINGS[name]
    kind: Any = None
    others: dict[str, Any] = {}
    if name == "cost_model":  # its files and presets are read as those of --topology are
        others = {"callback": parse_cost_model, "shell_complete": completing(*GPUS, files=True)}
    elif setting.choices:
        kind = click.Choice(setting.choices)
    elif setting.read is not None:
        others = {"callback": parsed(setting.read, setting.rule), "multiple": setting.repeatable}
    else:
        others = {"is_flag": True}
    flag = setting.option or "--" + name.replace("_", "-")
    return option(
        flag, kind, setting.metavar, setting.help, name=name, group=setting.group, **others
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

    def explain(self, more: Sequence[str] = ()) -> str:
        """Write in a line what ``--for`` has set, and what other options have."""
        assert self.engine is not None
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
        return line + (f"; from your options: {', '.join(by_options)}." if by_options else ".")


engine_option = option(
    "--for",
    click.Choice(list(ENGINES)),
    None,
    "Engine that loads the placement. It sets regime, split and arrival, unless their options do. "
    "If a placement is computed, it also sets equal slots, all of them full.",
    name="engine",
    group=ENGINE,
)
serving_options = option_group(
    "serving",
    Serving,
    {
        "engine": engine_option,
        **{name: setting_option(name) for name in ("cost_model", *SERVED)},
    },
)
