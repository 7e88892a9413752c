"""Options that describe a problem, and the problem that they make."""

from __future__ import annotations

from typing import Any, ClassVar

import click

from moetuner.cli.options import SIZE, Maker, as_options, option
from moetuner.cli.options.machine import cost_model_for
from moetuner.cli.options.serving import (
    ENGINE_OPTION,
    SERVED,
    SETTINGS,
    Serving,
    setting_option,
)
from moetuner.cli.options.traffic import Source, Traffic
from moetuner.formats.engines import ENGINES, engine_settings
from moetuner.problem import TRAFFIC_CAP, Problem
from moetuner.problem.objective import Objective
from moetuner.problem.settings import ENGINE
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology


class ProblemOptions(Serving):
    """Options of every setting of a problem.

    Parameters
    ----------
    router_groups
        Groups of the router that are to stay whole.
    given
        As for ``Serving``.
    """

    OPTIONS: ClassVar[dict[str, Maker]] = {
        "engine": ENGINE_OPTION,
        "router_groups": option(
            SIZE,
            "N",
            group=ENGINE,
            help="Groups among which the router chooses first (n_group), kept whole. For engines "
            "that renumber experts in a checkpoint.",
        ),
        **{name: setting_option(name) for name in SETTINGS},
    }

    def __init__(self, router_groups: int | None = None, **given: Any) -> None:
        super().__init__(**given)
        self.router_groups = router_groups

    def problem(
        self, source: Source, topology: Topology, traffic: Traffic | None = None
    ) -> Problem:
        """Count INPUT, or a part of it, and make the problem."""
        given = self.given
        goal = given.get("objective")
        # Visits are no part of balance, and sets take memory.
        sets = given.get("regime") != "follow" and goal != "balance"
        statistics = source.count(traffic, sets=sets, by_group="groups" in given)
        settings = {
            **given,
            **{name: self.value(name) for name in SERVED},
            "cost_model": cost_model_for(given.get("cost_model"), statistics),
        }
        if goal == "traffic":
            settings.setdefault("max_imbalance", TRAFFIC_CAP)
        if self.engine is not None or self.router_groups is not None:
            by_engine = self._by_engine(statistics, topology)
            settings |= {
                "slots_per_device": by_engine["slots_per_device"],
                "extra_slots": None,
                "forbidden": (*given.get("forbidden", ()), *by_engine.get("forbidden", ())),
                "fill_slots": "fill_slots" in given or by_engine["fill_slots"],
            }
        elif "regime" not in given and goal in (None, "traffic") and "max_imbalance" in settings:
            # Visits cannot be counted from transitions alone.
            no_visits = statistics.sets is None and statistics.coactivation is None
            if no_visits and statistics.transitions is not None:
                settings["regime"] = "follow"
        return Problem(statistics, topology, **settings)

    def _by_engine(self, statistics: RoutingStatistics, topology: Topology) -> dict[str, Any]:
        if self.engine is None:
            raise click.UsageError("'--router-groups' needs '--for', the engine.")
        engine = ENGINES[self.engine]
        if self.router_groups is not None and not engine.keeps_groups:
            raise click.UsageError(
                f"'--router-groups' is for engines that renumber experts in the checkpoint; "
                f"{engine.title} does not, and its groups may be divided."
            )
        try:
            return engine_settings(
                self.engine,
                statistics,
                topology,
                slots_per_device=self.given.get("slots_per_device"),
                extra_slots=self.given.get("extra_slots"),
                router_groups=self.router_groups,
            )
        except ValueError as error:
            text = as_options(str(error)).replace("devices must", "--devices must")
            raise click.UsageError(f"'--for {self.engine}': {text}.") from None

    def explain_problem(self, problem: Problem) -> list[str]:
        """Write in a line what ``--for`` has set of a problem; in none without an engine."""
        full = "full " if problem.fill_slots else ""
        total = problem.slots * problem.devices
        slots = f"{problem.slots} {full}slots on every device in every layer"
        if self.engine is not None and ENGINES[self.engine].may_copy:
            slots += f" ({total} slots, {total - problem.experts} of them redundant)"
        more = [slots]
        if self.router_groups is not None:
            more.append(f"{self.router_groups} router groups kept whole")
        return self.explain(more)

    def problem_settings(self, problem: Problem) -> dict[str, Any]:
        """Return the settings of a problem for JSON: defaults resolved."""
        settings = {name: getattr(problem, name) for name in SETTINGS}
        settings |= {"objective": problem.goal, "cost_model": Objective(problem).cost_model}
        if problem.slots_per_device is None and problem.extra_slots is None:
            settings["slots_per_device"] = problem.slots
        return self.settings(problem.topology, settings)
