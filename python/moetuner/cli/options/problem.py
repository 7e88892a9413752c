"""Options that describe a problem, and the problem that they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, get_args

import click

from moetuner.cli import options
from moetuner.cli.options.machine import cost_model_for, cost_model_option
from moetuner.cli.options.traffic import Traffic, count
from moetuner.cost import CostModel
from moetuner.evaluation.copies import SPLITS
from moetuner.formats.engines import ENGINES, engine_settings
from moetuner.problem import Problem
from moetuner.problem.objective import Goal, Objective
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Regime, Topology

# Cap on the load where traffic alone is made small: without one, experts that nobody uses would
# fill devices, and those that all use would share one.
CAP = 1.05

Rule = tuple[int | None, int, int]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Asked:
    """What was asked for."""

    engine: str | None = None
    router_groups: int | None = None
    objective: Any = None
    max_imbalance: float | None = None
    slots_per_device: int | tuple[int, ...] | None = None
    extra_slots: int | None = None
    regime: Any = None
    cost_model: CostModel | str | None = None
    split: Any = None
    arrival: Any = None
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
        regime = self.regime or by_engine.get("regime")
        extra = None if by_engine else self.extra_slots
        return Problem(
            statistics,
            topology,
            slots_per_device=by_engine.get("slots_per_device", self.slots_per_device),
            regime=regime or _default_regime(statistics, self.objective, cap),
            max_imbalance=cap,
            objective=self.objective,
            cost_model=cost_model_for(self.cost_model, statistics),
            split=self.split or by_engine.get("split", "even"),
            extra_slots=extra,
            arrival=by_engine.get("arrival", "bursts") if self.arrival is None else self.arrival,
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

    def explain(self, problem: Problem) -> str:
        """Write in a line what ``--for`` has set, and what it left as the user set it."""
        if self.engine is None:
            return ""
        of = ENGINES[self.engine]
        parts = {
            "regime": (self.regime, f"regime {problem.regime}"),
            "split": (self.split, f"split {problem.split}"),
            "arrival": (self.arrival, f"arrival {problem.arrival}"),
        }
        if not of.may_copy:
            del parts["split"]
        elif self.split is None:
            parts["split"] = (None, f"split {problem.split} ({of.how_split})")
        made = [text for given, text in parts.values() if given is None]
        full = "full " if problem.fill_slots else ""
        total = problem.slots * problem.devices
        made.append(f"{problem.slots} {full}slots on every device in every layer")
        if of.may_copy:
            made[-1] += f" ({total} slots, {total - problem.experts} of them redundant)"
        if self.router_groups is not None:
            made.append(f"{self.router_groups} groups of the router whole")
        yours = [text for given, text in parts.values() if given is not None]
        line = f"For {of.title}: {', '.join(made)}"
        return line + (f"; as you said: {', '.join(yours)}." if yours else ".")


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


def settings(problem: Problem) -> dict[str, Any]:
    """Return what was asked for, for JSON."""
    topology = problem.topology
    slots = problem.slots_per_device
    if slots is None and problem.extra_slots is None:
        slots = problem.slots
    model = Objective(problem).cost_model
    return {
        "devices": topology.devices,
        "devices_per_node": topology.devices_per_node,
        "topology": topology.name,
        "slots_per_device": slots,
        "extra_slots": problem.extra_slots,
        "regime": problem.regime,
        "max_imbalance": problem.max_imbalance,
        "objective": problem.goal,
        "cost_model": None if model is None else asdict(model),
        "split": problem.split,
        "arrival": problem.arrival,
        "risk": problem.risk,
        "groups": problem.groups,
        "pinned": list(problem.pinned),
        "forbidden": list(problem.forbidden),
        "fill_slots": problem.fill_slots,
    }


def _parsed(
    parse: Callable[[str], Value], rule: str
) -> Callable[[click.Context, click.Parameter, str | None], Value | None]:
    """Make a callback that reads a value, and names the rule where it cannot."""

    def callback(
        context: click.Context, parameter: click.Parameter, value: str | None
    ) -> Value | None:
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError:
            raise click.BadParameter(f"must be {rule}, got '{value:.60}'") from None

    return callback


def _slots(value: str) -> int | tuple[int, ...]:
    each = tuple(_natural(part) for part in value.split(","))
    if len(each) == 1 and each[0] < 1:
        raise ValueError
    return each if len(each) > 1 else each[0]


def _number_or(*words: str) -> Callable[[str], str | float]:
    return lambda value: value if value in words else float(value)


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
    parse = _parsed(_rule, 'LAYER:EXPERT:DEVICE in numbers, or "*" for all layers')
    return tuple(rule for rule in (parse(context, parameter, value) for value in values) if rule)


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError
    return int(text)


problem_options = options.gathered(
    "asked",
    Asked,
    [
        click.option(
            "--for",
            "engine",
            type=click.Choice(list(ENGINES)),
            help="Engine that will load the placement: what it does is set, where other options do "
            "not say it: regime, split, arrival, equal slots and all of them full.",
        ),
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
            type=options.Number(min=1),
            metavar="X",
            help="Cap on max / mean device load in every layer; inf for none.  "
            f"[default: {CAP} for traffic, else none]",
        ),
        click.option(
            "--slots-per-device",
            callback=_parsed(_slots, "a number from 1, or one for every device as in 8,8,10,10"),
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
            "--regime",
            type=click.Choice(["follow", "dispatch"]),
            help="What moves: tokens fan out from their home device and come back, as in today's "
            "engines (dispatch, the default), or move on from expert to expert, as in the paper "
            "(follow, the default for traffic where INPUT has counts of transitions alone).",
        ),
        cost_model_option,
        click.option(
            "--split",
            type=click.Choice(SPLITS),
            help=f"{options.HOW_SPLIT}  [default: even, or the engine's]",
        ),
        click.option(
            "--arrival",
            callback=_parsed(
                _number_or("bursts", "mixed"), "bursts, mixed, or the weight of mixed from 0 to 1"
            ),
            metavar="bursts|mixed|W",
            help="Windows as recorded, of many sequences at once, or both with the weight of "
            "mixed ones.  [default: bursts, or the engine's]",
        ),
        click.option(
            "--risk",
            default="mean",
            show_default=True,
            callback=_parsed(_number_or("mean"), "mean, or a level from 0 to below 1"),
            metavar="mean|LEVEL",
            help="Mean over windows, or over the worst: 0.9 for the worst tenth.",
        ),
        click.option(
            "--groups",
            callback=_parsed(_groups, "minimax, or NAME=WEIGHT,..."),
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
