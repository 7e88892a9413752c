"""Options that say how traffic is served, by which engine or setting by setting, and a problem."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar, Literal

import click

from moetuner._checks import ArgumentError, one_of
from moetuner.cli.options import SIZE, Text, flags, option
from moetuner.cli.options.machine import COST_MODEL, bytes_in_cost_model, cost_model_for
from moetuner.cli.options.traffic import Source, Traffic
from moetuner.cli.output import working
from moetuner.problem import TRAFFIC_CAP, Problem
from moetuner.problem.objective import goal_for, tables_for
from moetuner.serving.engines import ENGINES, NO_ENGINES, engine_settings
from moetuner.serving.settings import ENGINE, settings_of
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

SETTINGS = settings_of(Problem)
DEFAULTS = {field.name: field.default for field in fields(Problem) if field.name in SETTINGS}
# Settings that an engine decides unless an option does.
SERVED = ("regime", "split", "arrival")


def setting_option(name: str) -> Any:
    """Return the option of a setting; its value is None or empty if it is not given."""
    keywords = dict(SETTINGS[name])
    kind: Any = None
    read, choices = keywords.pop("read", None), keywords.pop("choices", None)
    if name == "cost_model":  # its files and presets are read as those of --topology are
        kind = COST_MODEL
    elif choices:
        kind = click.Choice(choices)
    elif read:
        rule = (inspect.getdoc(read) or "").removeprefix("Read ").removesuffix(".")
        kind = Text(read, rule)
    return option(kind, is_flag=kind is None, **keywords)


class EngineChoice(click.Choice[str]):
    """An engine of the table; of others that people ask for it says why they are not in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name of an engine."""
        if (why := NO_ENGINES.get(str(value).lower())) is not None:
            self.fail(f"no placement helps {value}: {why}", param, ctx)
        return super().convert(value, param, ctx)


ENGINE_OPTION = option(
    EngineChoice(list(ENGINES)),
    group=ENGINE,
    flag="--for",
    help="Engine that loads the placement. It sets regime, split and arrival, unless their options "
    "do. If a placement is computed, it also sets equal slots, all of them full.",
)


ROUTER_GROUPS_HELP = (
    "Groups among which the router chooses first (n_group), kept whole. For engines that renumber "
    "experts in a checkpoint."
)


# What says a setting.
Origin = Literal["option", "engine", "placement", "default"]


def _decided_by(engine: str | None) -> dict[str, Any]:
    """Return the settings that an engine decides."""
    if engine is None:
        return {}
    return {name: getattr(ENGINES[engine], name, DEFAULTS[name]) for name in SERVED}


class Serving:
    """How traffic is served.

    A setting is what its option says, else what the engine of ``--for`` decides, else what the
    placement was computed for, else the default.

    Parameters
    ----------
    engine
        Of ``ENGINES``; None for none.
    values
        Of settings by name; None, False and empty ones are not given.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        "engine": ENGINE_OPTION,
        **{name: setting_option(name) for name in ("cost_model", *SERVED)},
    }

    def __init__(self, engine: str | None = None, **values: Any) -> None:
        self.engine_given = engine
        self.given = {
            name: value
            for name, value in values.items()
            if value or (value == 0 and value is not False)
        }
        # Of a placement that is judged: its settings, which options replace.
        self.recorded: dict[str, Any] = {}
        # Counts have windows of their own: no order of arrival can be made of them.
        self.is_of_counts = False

    @property
    def engine(self) -> str | None:
        """The engine of ``--for``, else the one that the placement was computed for."""
        return self.engine_given or self.recorded.get("engine")

    @property
    def is_given(self) -> bool:
        """Whether any option says how traffic is served."""
        return self.engine_given is not None or bool(self.given)

    def as_placed(self, settings: Mapping[str, Any]) -> Serving:
        """Return the same options, with what a placement chose beyond its engine behind them."""
        placed, names = Serving(self.engine_given, **self.given), list(SERVED)
        if settings.get("engine") is not None:
            one_of("settings: engine", settings["engine"], ENGINES)
            names.append("engine")
        # Of a table nobody chose that its windows come as they were recorded.
        of_counts = "windows" in settings.get("input", {})
        if of_counts and settings.get("arrival") == DEFAULTS["arrival"]:
            names.remove("arrival")
        by_engine = _decided_by(settings.get("engine"))
        placed.recorded = {
            name: settings[name]
            for name in ("cost_model", *names)
            if name in settings and settings[name] != by_engine.get(name, DEFAULTS.get(name))
        }
        return placed

    def resolve(self, name: str) -> tuple[Any, Origin]:
        """Return a setting and what says it, in the order of the class."""
        says: list[tuple[Origin, Mapping[str, Any]]] = [
            ("option", self.given),
            ("engine", _decided_by(self.engine_given)),
            ("placement", self.recorded),
            ("engine", _decided_by(self.engine)),
        ]
        for origin, values in says:
            # Without an order of arrival there is none that an engine could decide.
            is_known = origin != "engine" or name != "arrival" or not self.is_of_counts
            if name in values and is_known:
                return values[name], origin
        return DEFAULTS[name], "default"

    def value(self, name: str) -> Any:
        """Return a setting."""
        return self.resolve(name)[0]

    def chosen(self, name: str) -> Any:
        """Return a setting that an option or the placement says; None where neither does."""
        value, origin = self.resolve(name)
        return value if origin in ("option", "placement") else None

    def as_served(self, source: Source) -> Source:
        """Return INPUT, counted in windows where a linear programme divides tokens of windows."""
        return source.as_counts() if self.value("split") == "lp" else source

    def as_judged(self, source: Source, traffic: Traffic) -> Traffic:
        """Return a part of INPUT that placements are judged on, likewise."""
        return source.count_all(traffic) if self.value("split") == "lp" else traffic

    def arguments(self, source: Source) -> dict[str, Any]:
        """Return the arguments of ``evaluate`` and ``audit`` that say the same of INPUT."""
        self.is_of_counts = isinstance(source.traffic, RoutingStatistics)
        model = cost_model_for(self.value("cost_model"), source.traffic, source.weight_bits)
        return {"cost_model": model, **{name: self.value(name) for name in SERVED}}

    def expert_bytes(self, source: Source, bytes_given: float | None) -> float | None:
        """Return bytes of an expert: those given, else of --cost-model's sizes or INPUT's model."""
        if bytes_given is None:
            bytes_given = bytes_in_cost_model(self.value("cost_model"), source.weight_bits)
        return source.expert_bytes(bytes_given)

    def settings(self, topology: Topology, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return settings and the machine for JSON."""
        model = arguments["cost_model"]
        machine = {name: getattr(topology, name) for name in ("devices", "devices_per_node")}
        machine |= {"topology": topology.name, "engine": self.engine}
        return machine | arguments | {"cost_model": None if model is None else asdict(model)}

    def explain(self, more: Sequence[str] = ()) -> list[str]:
        """Write in a line what ``--for`` has set, and other options; in none without an engine."""
        if self.engine is None:
            return []
        engine = ENGINES[self.engine]
        texts = {name: f"{name} {self.value(name)}" for name in SERVED}
        if not engine.may_copy:
            del texts["split"]
        elif self.resolve("split")[1] == "engine":
            texts["split"] += f" ({engine.how_split})"
        if self.is_of_counts and self.resolve("arrival")[1] == "default":
            texts["arrival"] += " (windows of counts, as recorded)"
        said: dict[Origin, list[str]] = {"option": [], "placement": [], "engine": []}
        for name, text in texts.items():
            origin = self.resolve(name)[1]
            said["engine" if origin == "default" else origin].append(text)
        line = f"For {engine.title}: {', '.join([*said['engine'], *more])}"
        if said["option"]:
            line += f"; from your options: {', '.join(said['option'])}"
        if said["placement"]:
            line += f"; from the placement: {', '.join(said['placement'])}"
        return [f"{line}."]


class ProblemOptions(Serving):
    """Options of every setting of a problem.

    Parameters
    ----------
    router_groups
        Groups of the router that are to stay whole.
    values
        As for ``Serving``.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        "engine": ENGINE_OPTION,
        "router_groups": option(SIZE, "N", group=ENGINE, help=ROUTER_GROUPS_HELP),
        **{name: setting_option(name) for name in SETTINGS},
    }

    def __init__(self, router_groups: int | None = None, **values: Any) -> None:
        super().__init__(**values)
        self.router_groups = router_groups

    def problem(
        self,
        source: Source,
        topology: Topology,
        traffic: Traffic | None = None,
        *,
        pairs: bool = True,
    ) -> Problem:
        """Count INPUT, or a part of it, and make the problem.

        Pairs that the objective is not made of are counted for methods that may ask for them.
        """
        chosen = self.given
        goal = goal_for(chosen.get("objective"), chosen.get("max_imbalance"))
        self.is_of_counts = isinstance(source.traffic, RoutingStatistics)
        tables = tables_for(chosen.get("regime", "dispatch"), goal)
        if pairs:
            tables |= {"transitions": True, "coactivation": True}
        statistics = source.count(traffic, by_group="groups" in chosen, **tables)
        settings = chosen | {name: self.value(name) for name in SERVED}
        settings["cost_model"] = cost_model_for(
            chosen.get("cost_model"), statistics, source.weight_bits
        )
        if source.window is not None and isinstance(source.traffic, RoutingTrace):
            if "phases" in chosen:
                raise click.UsageError("Give either '--window' or '--prefill-share', not both.")
            settings["phases"] = {source.window: 1.0}
        if goal == "traffic":
            settings.setdefault("max_imbalance", TRAFFIC_CAP)
        if self.engine is not None or self.router_groups is not None:
            by_engine = self._by_engine(statistics, topology)
            settings |= {"slots_per_device": by_engine["slots_per_device"], "extra_slots": None}
            bans = (*chosen.get("forbidden", ()), *by_engine.get("forbidden", ()))
            fill_slots = "fill_slots" in chosen or by_engine["fill_slots"]
            settings |= {"forbidden": bans, "fill_slots": fill_slots}
        elif "regime" not in chosen and goal == "traffic":
            # Visits cannot be counted from transitions alone.
            no_visits = statistics.sets is None and statistics.coactivation is None
            if no_visits and statistics.transitions is not None:
                settings["regime"] = "follow"
        with working("weighing windows"):
            return Problem(statistics, topology, **settings)

    def _by_engine(self, statistics: RoutingStatistics, topology: Topology) -> dict[str, Any]:
        """Return the settings of a problem that the engine decides."""
        if self.engine is None:
            raise click.UsageError("'--router-groups' needs '--for', the engine.")
        engine = ENGINES[self.engine]
        if self.router_groups is not None and not engine.renumbers:
            raise click.UsageError(
                f"'--router-groups' is for engines that renumber experts in the checkpoint; "
                f"{engine.title} does not, and its groups may be divided."
            )
        slots = {name: self.given.get(name) for name in ("slots_per_device", "extra_slots")}
        slots_and_groups = {**slots, "router_groups": self.router_groups}
        try:
            return engine_settings(self.engine, statistics, topology, **slots_and_groups)
        except ArgumentError as error:
            raise click.UsageError(f"'--for {self.engine}': {error.renamed(flags())}.") from None

    def explain_problem(self, problem: Problem) -> list[str]:
        """Write in a line what ``--for`` has set of a problem; in none without an engine."""
        full = "full " if problem.fill_slots else ""
        total = problem.slots * problem.devices
        more = [f"{problem.slots} {full}slots on every device in every layer"]
        if self.engine is not None and ENGINES[self.engine].may_copy:
            more[0] += f" ({total} slots, {total - problem.experts} of them redundant)"
        if self.router_groups is not None:
            more.append(f"{self.router_groups} router groups kept whole")
        return self.explain(more)

    def problem_settings(self, problem: Problem) -> dict[str, Any]:
        """Return the settings of a problem for JSON: defaults resolved."""
        settings = {name: getattr(problem, name) for name in SETTINGS}
        settings |= {"objective": problem.goal, "cost_model": problem.objective_function.cost_model}
        settings["phases"] = {size: share for size, share in problem.shares.items() if size} or None
        if problem.slots_per_device is None and problem.extra_slots is None:
            settings["slots_per_device"] = problem.slots
        return self.settings(problem.topology, settings)
