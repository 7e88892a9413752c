"""Options that describe a problem, and the problem that they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import click

from moetuner.cli import options
from moetuner.cli.options.machine import cost_model_for
from moetuner.cli.options.serving import Serving, parsed, serving_list
from moetuner.cli.options.traffic import Traffic, count
from moetuner.formats.engines import ENGINES, engine_settings
from moetuner.problem import Problem
from moetuner.problem.objective import Goal, Objective
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Regime, Topology

# Groups of help that commands share which make a problem.
GROUPS = {
    "The machine": "--topology --cost-model --slots-per-device --extra-slots --fill-slots",
    "What is wanted": "--objective --max-imbalance --risk --groups --arrival --window",
    "What engines do": "--regime --split --router-groups --pin --forbid",
}

# Cap on the load where traffic alone is made small: without one, experts that nobody uses would
# fill devices, and those that all use would share one.
CAP = 1.05

Rule = tuple[int | None, int, int]


@dataclass(frozen=True)
class Asked(Serving):
    """What was asked for, and how it is served."""

    router_groups: int | None = None
    objective: Any = None
    max_imbalance: float | None = None
    slots_per_device: int | tuple[int, ...] | None = None
    extra_slots: int | None = None
    risk: Any = "mean"
    groups: Any = None
    pinned: tuple[Rule, ...] = field(default=())
    forbidden: tuple[Rule, ...] = field(default=())
    fill_slots: bool = False

    def problem(
        self, traffic: Traffic, topology: Topology, *, window: int | None, threads: int | None
    ) -> Problem:
        """Count the traffic and make the problem."""
        statistics = count(
            traffic,
            window,
            threads,
            # Visits are no part of balance, and sets take memory.
            sets=self.regime != "follow" and self.objective != "balance",
            by_group=self.groups is not None,
        )
        cap = self.max_imbalance
        if cap is None and self.objective == "traffic":
            cap = CAP
        by_engine = self._by_engine(statistics, topology)
        extra = None if by_engine else self.extra_slots
        regime = self.value("regime")
        if self.regime is None and self.engine is None:
            regime = _default_regime(statistics, self.objective, cap)
        return Problem(
            statistics,
            topology,
            slots_per_device=by_engine.get("slots_per_device", self.slots_per_device),
            regime=regime,
            max_imbalance=cap,
            objective=self.objective,
            cost_model=cost_model_for(self.cost_model, statistics),
            split=self.value("split"),
            extra_slots=extra,
            arrival=self.value("arrival"),
            risk=self.risk,
            groups=self.groups,
            pinned=self.pinned,
            forbidden=(*self.forbidden, *by_engine.get("forbidden", ())),
            fill_slots=self.fill_slots or by_engine.get("fill_slots", False),
        )

    def _by_engine(self, statistics: RoutingStatistics, topology: Topology) -> dict[str, Any]:
        if self.engine is None:
            if self.router_groups is not None:
                raise click.UsageError("'--router-groups' needs '--for', the engine.")
            return {}
        if self.router_groups is not None and not ENGINES[self.engine].keeps_groups:
            raise click.UsageError(
                f"'--router-groups' is for engines that renumber experts in the checkpoint; "
                f"{ENGINES[self.engine].title} does not, and its groups may be divided."
            )
        try:
            return engine_settings(
                self.engine,
                statistics,
                topology,
                slots_per_device=self.slots_per_device,  # type: ignore[arg-type]
                extra_slots=self.extra_slots,
                router_groups=self.router_groups,
            )
        except ValueError as error:
            raise click.UsageError(f"'--for {self.engine}': {_as_options(str(error))}.") from None

    def explain_problem(self, problem: Problem) -> str:
        """Write in a line what ``--for`` has set of a problem."""
        full = "full " if problem.fill_slots else ""
        total = problem.slots * problem.devices
        slots = f"{problem.slots} {full}slots on every device in every layer"
        if self.engine is not None and ENGINES[self.engine].may_copy:
            slots += f" ({total} slots, {total - problem.experts} of them redundant)"
        made = [slots]
        if self.router_groups is not None:
            made.append(f"{self.router_groups} groups of the router whole")
        return self.explain(made)

    def problem_settings(self, problem: Problem) -> dict[str, Any]:
        """Return what was asked for, for JSON."""
        slots = problem.slots_per_device
        if slots is None and problem.extra_slots is None:
            slots = problem.slots
        served = {name: getattr(problem, name) for name in ("regime", "split", "arrival")}
        model = Objective(problem).cost_model
        return {
            **self.settings(problem.topology, {"cost_model": model, **served}),
            "slots_per_device": slots,
            "extra_slots": problem.extra_slots,
            "max_imbalance": problem.max_imbalance,
            "objective": problem.goal,
            "risk": problem.risk,
            "groups": problem.groups,
            "pinned": list(problem.pinned),
            "forbidden": list(problem.forbidden),
            "fill_slots": problem.fill_slots,
        }


def _as_options(text: str) -> str:
    return options.as_options(text).replace("devices must", "--devices must")


def _default_regime(
    statistics: RoutingStatistics, objective: Goal | None, cap: float | None
) -> Regime:
    """Return dispatch, unless traffic is asked for of counts that know nothing but transitions."""
    is_traffic = objective == "traffic" or (objective is None and cap is not None)
    no_visits = statistics.sets is None and statistics.coactivation is None
    only_transitions = no_visits and statistics.transitions is not None
    return "follow" if is_traffic and only_transitions else "dispatch"


def _slots(value: str) -> int | tuple[int, ...]:
    each = tuple(_natural(part) for part in value.split(","))
    if len(each) == 1 and each[0] < 1:
        raise ValueError
    return each if len(each) > 1 else each[0]


def _risk(value: str) -> str | float:
    return value if value == "mean" else float(value)


def _groups(value: str) -> str | dict[str, float]:
    if value == "minimax":
        return value
    # A name may have any character but the last "=".
    pairs = [part.rpartition("=") for part in value.split(",")]
    if not all(name for name, _, _ in pairs):
        raise ValueError
    return {name: float(weight) for name, _, weight in pairs}


def _rule(value: str) -> Rule:
    layer, expert, device = value.split(":")
    return (None if layer == "*" else _natural(layer), _natural(expert), _natural(device))


def _rules(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[Rule, ...]:
    parse = parsed(_rule, 'LAYER:EXPERT:DEVICE in numbers, or "*" for all layers')
    return tuple(rule for rule in (parse(context, parameter, value) for value in values) if rule)


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError
    return int(text)


problem_options = options.gathered(
    "asked",
    Asked,
    [
        *serving_list,
        click.option(
            "--router-groups",
            type=click.IntRange(1, 65536),
            metavar="N",
            help="Groups that the router chooses among first (n_group), to be kept whole by an "
            "engine that renumbers experts in its checkpoint.",
        ),
        click.option(
            "--objective",
            type=click.Choice(get_args(Goal)),
            help="What to make small: predicted time of a layer, max / mean load, or traffic "
            "under --max-imbalance.  [default: traffic with --max-imbalance, else time]",
        ),
        click.option(
            "--max-imbalance",
            type=options.Number(min=1, infinite=True),
            metavar="X",
            help="Cap on max / mean device load in every layer; inf for none.  "
            f"[default: {CAP} for traffic, else none]",
        ),
        click.option(
            "--slots-per-device",
            callback=parsed(_slots, "a number from 1, or one for every device as in 8,8,10,10"),
            metavar="S|S,S,...",
            help="Slots of a device in a layer, or of every device; just enough by default. What "
            "is left over holds further copies.",
        ),
        click.option(
            "--extra-slots",
            type=click.IntRange(min=0),
            metavar="N",
            help="Instead: copies beyond one of each expert, over all layers, which go to the "
            "layers where they help most.",
        ),
        click.option(
            "--risk",
            default="mean",
            show_default=True,
            callback=parsed(_risk, "mean, or a level from 0 to below 1"),
            metavar="mean|LEVEL",
            help="Mean over windows, or over the worst: 0.9 for the worst tenth.",
        ),
        click.option(
            "--groups",
            callback=parsed(_groups, "minimax, or NAME=WEIGHT,..."),
            metavar="minimax|NAME=W,...",
            help="The worst group of the traffic counts, or groups by weight (others by 1).",
        ),
        click.option(
            "--pin",
            "pinned",
            multiple=True,
            callback=_rules,
            metavar="LAYER:EXPERT:DEVICE",
            help='The expert has a copy there; "*" for all layers. Repeatable.',
        ),
        click.option(
            "--forbid",
            "forbidden",
            multiple=True,
            callback=_rules,
            metavar="LAYER:EXPERT:DEVICE",
            help="The expert has none there. Repeatable.",
        ),
        click.option(
            "--fill-slots",
            is_flag=True,
            help="No slot stays empty, as engines need it: copies that take the fewest tokens fill "
            "what would.",
        ),
    ],
)
