"""Made: the settings of a placement's file: its serving, problem, search and recording."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moetuner import topology
from moetuner._checks import (
    expert_size,
    instance,
    is_number,
    seed_in,
    shown,
    text_or_none,
    whole_number,
)
from moetuner.frozen import as_json
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.reading import Reading
from moetuner.serving import ENGINE_SETTINGS, Serving, describe_machine, phases
from moetuner.serving.engines import ENGINES
from moetuner.serving.settings import check_setting, setting
from moetuner.statistics import COUNTED


def _share_below_one(name: str, value: object) -> None:
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be a share from 0 to below 1, got {shown(value)}")


def _mapping(name: str, value: object) -> None:
    instance(name, value, Mapping, hint=" by name")


# Settings of the serving, and further ones of the problem, which a file has under their own names.
SERVING_FIELDS = {field.name: field for field in fields(Serving) if field.metadata}
# Pins and bans, of which there may be thousands, are in no file.
PROBLEM_FIELDS = {
    field.name: field
    for field in fields(Problem)
    if field.metadata and field.name not in SERVING_FIELDS and not field.metadata.get("multiple")
}


@dataclass(frozen=True)
class Made:
    """How the placement of a file was made.

    A file has all of it in one object, ``settings``. Keys that this version does not know are
    ignored.

    Parameters
    ----------
    serving
        How the model is served, as far as the file says it: fields of ``Serving``, among them
        ``topology``, ``window`` and ``engine``.
    wanted
        Settings of the problem that are not fields of ``Serving``: what was wanted of the search.
    version, method, effort
        Version of moetuner, method and effort of the search; None if no search computed it.
    seed
        Seed of the search, and of the choice of held-out traffic.
    figure, unit
        The figure of an evaluation that is nearest to the objective, and the objective's unit.
    expert_size
        Hidden and intermediate size of an expert.
    holdout
        Share of the recording that was held out.
    counted
        True for each table that was counted from it, by name; and the tokens of its windows, where
        a step has more.
    input
        Settings with which the recording was read.
    plan
        For a placement of ``plan``: the file of the running placement, and the change of devices.
    spelled
        Options for machine and cost model as they were typed.
    """

    serving: Mapping[str, Any] = field(default_factory=dict)
    wanted: Mapping[str, Any] = field(default_factory=dict)
    version: str | None = setting(None, check=text_or_none)
    method: str | None = setting(None, check=text_or_none)
    effort: str | None = setting(None, check=text_or_none)
    seed: int = setting(0, check=lambda name, value: seed_in(value, name))
    figure: str | None = setting(None, check=text_or_none)
    unit: str | None = setting(None, check=text_or_none)
    expert_size: tuple[int, int] | None = setting(None, check=lambda _, value: expert_size(value))
    holdout: float | None = setting(None, check=_share_below_one)
    counted: Mapping[str, Any] | None = setting(None, check=_mapping)
    input: Reading = field(default_factory=Reading)
    plan: Mapping[str, Any] | None = setting(None, check=_mapping)
    spelled: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, placement: Placement) -> Made:
        """Read the settings of a placement; raise ValueError if one breaks a rule."""
        try:
            return cls._parse(placement.settings)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"settings: {error}") from None

    @classmethod
    def _parse(cls, settings: Mapping[str, Any]) -> Made:
        values = {name: value for name, value in settings.items() if value is not None}
        served = _build(SERVING_FIELDS, values)
        if "topology" in values:
            served["topology"] = topology.from_keys(values["topology"])
        if "window" in values:
            served["window"] = whole_number("window", values["window"])
        if "engine" in values:
            text_or_none("engine", values["engine"])
            served["engine"] = values["engine"]
        checked: dict[str, Any] = {}
        for declared in fields(cls):
            if "check" in declared.metadata and declared.name in values:
                check_setting(declared, values[declared.name])
                checked[declared.name] = values[declared.name]
        for name in ("input", "spelled"):
            _mapping(name, values.get(name, {}))
        spelled = {key: text for key, text in values.get("spelled", {}).items() if text is not None}
        for key, text in spelled.items():
            text_or_none(f"spelled.{key}", text)
        reading = Reading.from_json(values.get("input", {}))
        wanted = _build(PROBLEM_FIELDS, values)
        return cls(serving=served, wanted=wanted, input=reading, spelled=spelled, **checked)

    @classmethod
    def for_problem(cls, problem: Problem, **search: Any) -> Made:
        """Return the settings of a placement that a search computed for a problem."""
        statistics, objective = problem.statistics, problem.objective_function
        names = [name for name in SERVING_FIELDS if hasattr(problem, name)] + ["topology"]
        served = {name: getattr(problem.serving, name) for name in names}
        shares = {tokens: share for tokens, share in problem.shares.items() if tokens}
        served |= {"phases": shares or None, "window": problem.window}
        if problem.serving.engine is not None:
            served["engine"] = problem.serving.engine
        wanted = {name: getattr(problem, name) for name in PROBLEM_FIELDS}
        return cls(
            serving=served,
            wanted=wanted | {"objective": problem.goal},
            figure=objective.figure,
            unit=objective.unit,
            expert_size=statistics.expert_size,
            # The same traffic has another fingerprint if it was counted in another way.
            counted={
                name: getattr(statistics, table) is not None for name, table in COUNTED.items()
            }
            | ({} if statistics.window == problem.window else {"window": statistics.window}),
            **search,
        )

    def to_settings(self) -> dict[str, Any]:
        """Return the settings of a placement's file, as JSON values."""
        declared = {**SERVING_FIELDS, **PROBLEM_FIELDS}
        settings: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if "check" in field.metadata and getattr(self, field.name) is not None
        }
        for name, value in {**self.serving, **self.wanted}.items():
            write = declared[name].metadata.get("to_json") if name in declared else None
            settings[name] = value if write is None or value is None else write(value)
        mappings = {"input": self.input.to_json(), "spelled": dict(self.spelled)}
        settings |= {name: values for name, values in mappings.items() if values}
        return {name: as_json(value) for name, value in settings.items()}

    @property
    def machine(self) -> topology.Topology | None:
        """The machine that the placement was computed for; None if the file does not say it."""
        return self.serving.get("topology")

    @property
    def phases(self) -> dict[int | None, float]:
        """Shares of the serving time, by size of windows, that the placement was computed for."""
        window = self.serving.get("window")
        return self.serving.get("phases") or ({} if window is None else {window: 1.0})

    def describe(self) -> str:
        """Write what the placement is for: engine, objective, windows, settings and machine."""
        parts = []
        if self.serving.get("engine") in ENGINES:
            parts.append(ENGINES[self.serving["engine"]].title)
        if "objective" in self.wanted:
            parts.append(f"objective {self.wanted['objective']}")
        if (cap := self.wanted.get("max_imbalance")) is not None:
            parts.append(f"load cap {cap:g}")
        if sizes := self.phases:
            first = next(iter(sizes))
            windows = "windows as recorded" if first is None else f"windows of {first:,} tokens"
            parts.append(phases.describe(sizes) or windows)
        parts += [
            f"{name} {self.serving[name]}" for name in ENGINE_SETTINGS if name in self.serving
        ]
        machine = "" if self.machine is None else f" on {describe_machine(self.machine)}"
        return f"{', '.join(parts)}{machine}"

    def find_spelling(self, name: str, *, beside: Path, value: object) -> str | None:
        """Return the text of the option that gave a setting this value; None if unknown.

        The file that a text names is looked for in this folder, then in the folder of ``beside``.
        """
        text = self.spelled.get(name)
        if text is None or self.serving.get(name) != value:
            return None
        is_elsewhere = not Path(text).exists() and (beside.parent / text).exists()
        return str(beside.parent / text) if is_elsewhere else text

    @property
    def is_counted(self) -> bool:
        """True if the recording was counts, which have windows of their own."""
        return self.input.windows is not None

    def on(self, machine: topology.Topology) -> Made:
        """Return the same serving on another machine, for a placement that no search computed."""
        serving = {**self.serving, "topology": machine}
        return Made(
            serving=serving,
            expert_size=self.expert_size,
            input=self.input.without_files(),
            spelled=self.spelled,
        )


def _build(declared: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Build the declared settings from a file's JSON values, and check them."""
    built = {}
    for name, setting_field in declared.items():
        if name in values:
            build = setting_field.metadata.get("from_json")
            built[name] = values[name] if build is None else build(values[name])
            check_setting(setting_field, built[name])
    return built
