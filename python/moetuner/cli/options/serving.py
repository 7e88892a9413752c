"""Options for how traffic is served, by engine or setting by setting, and for a problem."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import copy
from dataclasses import fields, replace
from typing import Any, ClassVar

import click

from moetuner._checks import ArgumentError
from moetuner.cli.options import list_flags, option
from moetuner.cli.options.kinds import SIZE, Number, Text
from moetuner.cli.options.machine import COST_MODEL, bytes_in_cost_model, cost_model_for
from moetuner.cli.options.traffic import Source, Traffic
from moetuner.cli.output import working
from moetuner.cli.split import TrafficSplit
from moetuner.cost import bytes_of_expert
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.goals import AIMS
from moetuner.problem.made import Made
from moetuner.problem.objective import choose_goal, choose_tables
from moetuner.serving import ENGINE_SETTINGS, Serving
from moetuner.serving.engines import ENGINES, NO_ENGINES, engine_settings
from moetuner.serving.settings import ENGINE, list_settings
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology

DECLARED = list_settings(Problem, Serving, ReplayOptions)
# Settings of a problem.
SETTINGS = [setting.name for setting in fields(Problem) if setting.metadata]


def setting_option(name: str) -> Any:
    """Return the option of a setting; its value is None or empty if it is not given.

    Only a whole number within limits has its default.
    """
    keywords = dict(DECLARED[name])
    kind: Any = None
    read, choices = keywords.pop("read", None), keywords.pop("choices", None)
    above, within = keywords.pop("above", None), keywords.pop("within", None)
    if name == "cost_model":  # its files and presets are read as those of --topology are
        kind = COST_MODEL
    elif above is not None:
        kind = Number(min=above, min_open=True)
    elif within is not None:
        kind = click.IntRange(*within)
    elif choices:
        kind = click.Choice(choices)
    elif read:
        rule = (inspect.getdoc(read) or "").removeprefix("Read ").removesuffix(".")
        kind = Text(read, rule)
    return option(kind, is_flag=kind is None, **keywords)


class EngineChoice(click.Choice[str]):
    """An engine of the table; the error for another one says why it is not in the table."""

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


class ServingOptions:
    """Options that say how traffic is served.

    Parameters
    ----------
    engine
        Name in ``ENGINES``; None without an engine.
    values
        Values of settings by name; None, False and empty ones are not given.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        "engine": ENGINE_OPTION,
        **{name: setting_option(name) for name in ("cost_model", *ENGINE_SETTINGS)},
    }

    def __init__(self, engine: str | None = None, **values: Any) -> None:
        self.engine = engine
        self.given = {
            name: value
            for name, value in values.items()
            if value or (value == 0 and value is not False)
        }

    @property
    def is_given(self) -> bool:
        """True if any option says how traffic is served."""
        return self.engine is not None or bool(self.given)

    def resolve(
        self, source: Source, topology: Topology, recorded: Mapping[str, Any] | None = None
    ) -> tuple[Source, Serving]:
        """Return INPUT as it is served, and how it is served.

        INPUT is counted in windows if the split divides the tokens of a window together. Settings
        that no option gives are those that a placement's file ``recorded``.
        """
        serving = self._resolve(source, topology, recorded)
        if serving.rule.needs_windows and serving.is_ordered:
            source = source.as_counts()
            serving = self._resolve(source, topology, recorded)
        return source, serving

    def _resolve(
        self, source: Source, topology: Topology, recorded: Mapping[str, Any] | None
    ) -> Serving:
        traffic = source.traffic
        options = {name: value for name, value in self.given.items() if name in ENGINE_SETTINGS}
        if "cost_model" in self.given:
            text = self.given["cost_model"]
            options["cost_model"] = cost_model_for(text, traffic, source.weight_bits)
        return Serving.resolve(
            topology,
            traffic,
            options=options,
            engine=self.engine,
            recorded=recorded,
            weight_bits=source.weight_bits,
            window=source.replay_window,
            top_k=source.top_k,
            waterfill=self.given.get("waterfill"),
        )

    def expert_bytes(self, source: Source, bytes_given: float | None) -> float | None:
        """Return bytes of an expert, by options, by --cost-model's sizes or by INPUT's model."""
        traffic, bits = source.traffic, source.weight_bits
        if bytes_given is None:
            bytes_given = bytes_in_cost_model(self.given.get("cost_model"), bits)
        if bytes_given is None:
            bytes_given = bytes_of_expert(traffic.expert_size, traffic.model, bits)
        return bytes_given


# Option of commands that show figures with waterfill.
WATERFILL = {"waterfill": setting_option("waterfill")}


class JudgedOptions(ServingOptions):
    """Options that say how traffic is served, and whether waterfill is on."""

    OPTIONS: ClassVar[dict[str, Any]] = {**ServingOptions.OPTIONS, **WATERFILL}


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


class ProblemOptions(ServingOptions):
    """Options of every setting of a problem.

    Parameters
    ----------
    router_groups
        Number of groups of the router that must stay whole.
    values
        As for ``ServingOptions``.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        "engine": ENGINE_OPTION,
        "router_groups": option(SIZE, "N", group=ENGINE, help=ROUTER_GROUPS_HELP),
        **{name: setting_option(name) for name in SETTINGS},
    }

    def __init__(self, router_groups: int | None = None, **values: Any) -> None:
        super().__init__(**values)
        self.router_groups = router_groups

    def split(
        self, source: Source, topology: Topology, holdout: float, seed: int, *, pairs: bool = True
    ) -> TrafficSplit:
        """Hold out a share of INPUT, and make the problem of the rest.

        If nothing is held out, INPUT is counted where the split of copies divides whole windows.
        With ``pairs``, pairs are counted that the objective does not need, but other methods may.
        """
        if not holdout:
            source, _ = self.resolve(source, topology)
        seen, judged_on = hold_out(source.traffic, holdout, seed=seed)
        problem = self._make_problem(source, topology, seen, pairs=pairs)
        judged_on = source.count_for_lp_split(judged_on, problem.serving)
        serving = replace(problem.serving, window=source.replay_window)
        return TrafficSplit(source, holdout, problem, judged_on, serving)

    def _make_problem(
        self, source: Source, topology: Topology, traffic: Traffic, *, pairs: bool
    ) -> Problem:
        """Count a part of INPUT, and make the problem."""
        chosen = self.given
        goal = choose_goal(chosen.get("objective"), chosen.get("max_imbalance"))
        tables = choose_tables(chosen.get("regime", "dispatch"), goal)
        if pairs:
            tables |= {"transitions": True, "coactivation": True}
        statistics = source.count_for_search(traffic, by_group="groups" in chosen, **tables)
        serving = self._resolve(source, topology, None)
        served = (*ENGINE_SETTINGS, "cost_model", *WATERFILL)
        rules = {name: chosen[name] for name in chosen if name not in served}
        if source.window is not None and source.traffic.ordered:
            if "phases" in chosen:
                raise click.UsageError("Give either '--window' or '--prefill-share', not both.")
            rules["phases"] = {source.window: 1.0}
        rules.setdefault("max_imbalance", AIMS[goal].cap)
        if self.engine is not None or self.router_groups is not None:
            by_engine = self._by_engine(statistics, topology)
            rules |= {"slots_per_device": by_engine["slots_per_device"], "extra_slots": None}
            bans = (*chosen.get("forbidden", ()), *by_engine.get("forbidden", ()))
            fill_slots = "fill_slots" in chosen or by_engine["fill_slots"]
            rules |= {"forbidden": bans, "fill_slots": fill_slots}
        elif "regime" not in chosen and goal == "traffic":
            # Visits cannot be counted from transitions alone.
            no_visits = statistics.sets is None and statistics.coactivation is None
            if no_visits and statistics.transitions is not None:
                rules["regime"] = "follow"
        with working("grouping windows"):
            return Problem.served(statistics, serving, window=source.replay_window, **rules)

    def _by_engine(self, statistics: RoutingStatistics, topology: Topology) -> dict[str, Any]:
        """Return the settings of a problem that the engine decides on."""
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
            raise click.UsageError(
                f"'--for {self.engine}': {error.renamed(list_flags())}."
            ) from None

    def as_running(self, made: Made, running: Placement) -> ProblemOptions:
        """Return options with the engine of the placement that runs, and its slots, if none say."""
        engine = self.engine or made.serving.get("engine")
        if engine not in ENGINES:
            return self
        options = copy(self)
        options.engine, options.given = engine, dict(self.given)
        if ENGINES[engine].may_copy and not self.given.keys() & {"slots_per_device", "extra_slots"}:
            options.given["slots_per_device"] = running.slots_per_device
        return options

    def explain_problem(self, problem: Problem) -> list[str]:
        """Write a line with the settings that --for decided on; none without an engine."""
        full = "full " if problem.fill_slots else ""
        total = problem.slots * problem.devices
        facts = [f"{problem.slots} {full}slots on every device in every layer"]
        if self.engine is not None and ENGINES[self.engine].may_copy:
            facts[0] += f" ({total} slots, {total - problem.num_experts} of them redundant)"
        if self.router_groups is not None:
            facts.append(f"{self.router_groups} router groups kept whole")
        return problem.serving.explain(facts)


def settings_for_json(problem: Problem) -> dict[str, Any]:
    """Return the settings of a problem for JSON, with the values of defaults."""
    made, served = Made.for_problem(problem), problem.serving.facts()
    settings = {name: getattr(problem, name) for name in SETTINGS} | {**made.wanted}
    settings["phases"] = made.serving["phases"]
    if problem.slots_per_device is None and problem.extra_slots is None:
        settings["slots_per_device"] = problem.slots
    settings |= {name: served[name] for name in settings if name in served}
    return {name: value for name, value in served.items() if name not in settings} | settings


class ComparedOptions(ProblemOptions):
    """Options of every setting of a problem, and whether waterfill is on."""

    OPTIONS: ClassVar[dict[str, Any]] = {**ProblemOptions.OPTIONS, **WATERFILL}
