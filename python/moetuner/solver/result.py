"""Result: a placement, its bound, and how both were found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from moetuner import _checks as check
from moetuner.frozen import Frozen, html_table
from moetuner.placement import Placement, contiguous
from moetuner.problem import Problem
from moetuner.solver.bounds.certificate import Certificate
from moetuner.solver.budget import Progress, gap_between

# The source of a bound that knows loads alone.
LOADS = "loads alone"

Status = Literal[
    "optimal", "feasible", "gap_reached", "time_limit", "interrupted", "violates rules"
]


@dataclass(frozen=True, eq=False, repr=False)
class _Facts(Frozen):
    """Facts that a method knows; those that it does not are None or empty."""

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as JSON values."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: _plain(value) for name, value in values if value not in (None, {})}


def _plain(value: Any) -> Any:
    """Return a value of a part as JSON has it."""
    if isinstance(value, _Facts):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, eq=False, repr=False)
class ClusterStage(_Facts):
    """How the paper's first stage went, which clusters the experts of every layer."""

    sizes: str
    layers_proven_without_search: int
    layers_searched: int
    largest_gap: float
    largest_deviation: float
    tolerance: float
    note: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class PlaceStage(_Facts):
    """How the paper's second stage went, which places the clusters; its bound is of its own sum."""

    way: str
    experts_per_device: tuple[int, int]
    bottleneck: int | None = None
    bound: int | None = None
    gap: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class SearchDetails(_Facts):
    """How the placement was found.

    Where there are many ``windows``, a search sees ``windows_searched`` means that stand for them.
    Where there are many tokens, expert sets are those of a sample of ``set_tokens``.
    """

    trials: int | None = None
    counts_rounded_to_multiples_of: int | None = None
    device_cost: int | None = None
    node_cost: int | None = None
    way: str | None = None
    found_by: str | None = None
    experts_moved: int | None = None
    stage_1: ClusterStage | None = None
    stage_2: PlaceStage | None = None
    windows: int | None = None
    windows_searched: int | None = None
    set_tokens: int | None = None


@dataclass(frozen=True, eq=False, repr=False)
class CapsDetails(_Facts):
    """Load caps that were not kept, as imbalances by layer.

    ``raised`` are the caps that the placement keeps instead. ``infeasible`` has the layers of which
    it is proven that no placement keeps the cap, with a lower and an upper bound of the smallest
    cap that can be kept; both are the same number where that cap is known.
    """

    raised: Mapping[int, float] = field(default_factory=dict)
    infeasible: Mapping[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class UnseenDetails(_Facts):
    """What the search minimised so that it generalises to unseen traffic, and why."""

    chosen: str
    reason: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class LevelBound(_Facts):
    """The bound on one level of the topology: least pairs that cross."""

    crossing_pairs: int
    iterations: int
    ended: str


@dataclass(frozen=True, eq=False, repr=False)
class BoundDetails(_Facts):
    """The bound by level of the topology, and the one that the answer itself ``refuted``."""

    levels: Mapping[str, LevelBound] = field(default_factory=dict)
    refuted: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Details(Frozen):
    """Facts about an answer besides the placement, in four parts.

    Examples
    --------
    >>> import moetuner as mt
    >>> load = [[8, 4, 2, 2]]
    >>> problem = mt.Problem(mt.RoutingStatistics.from_load(load), mt.Topology(2), max_imbalance=1)
    >>> details = mt.solve(problem).details
    >>> details.caps.infeasible, details.to_dict()["caps_raised"]
    ({0: (1.25, 1.25)}, {0: 1.25})
    """

    search: SearchDetails = field(default_factory=SearchDetails)
    caps: CapsDetails = field(default_factory=CapsDetails)
    unseen: UnseenDetails | None = None
    bound: BoundDetails = field(default_factory=BoundDetails)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as JSON values, one entry per fact."""
        facts = self.search.to_dict()
        facts |= {f"caps_{name}": value for name, value in self.caps.to_dict().items()}
        names = {"levels": "bound", "refuted": "bound_refuted"}
        facts |= {names[name]: value for name, value in self.bound.to_dict().items()}
        return facts if self.unseen is None else {**facts, "unseen": self.unseen.to_dict()}

    def with_search_facts(self, **facts: Any) -> Details:
        """Return these details with facts of the search."""
        return replace(self, search=replace(self.search, **facts))


@dataclass(frozen=True, eq=False, repr=False)
class Result(Frozen):
    """A solved problem.

    ``objective`` and ``bound`` are ``Objective.value``'s: microseconds of a layer, max / mean load,
    or the share of the traffic that moves (the crossing on the problem's own statistics, where all
    links are equal). ``bound_scope`` says of which placements ``bound`` is a bound: whether they
    may have copies of experts, and which load caps they keep. ``violations`` are rules that the
    placement breaks, in words; ``status`` then is ``"violates rules"``, unless all that is broken
    is a load cap that had to be raised, as ``details.caps.raised`` says. ``lacks`` names counts
    that the objective needs and the statistics lack, and what follows. ``history`` records each
    improvement: phases, and every change of the best objective and the bound, the answer's last.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    >>> result = mt.solve(mt.Problem(statistics, mt.Topology(2), objective="balance"))
    >>> result.status, result.gap  # a bound of loads alone, which says nothing
    ('feasible', None)
    """

    placement: Placement
    method: str
    status: Status
    objective: float
    bound: float | None
    bound_source: str | None
    seconds: float
    details: Details = field(default_factory=Details, repr=False)
    certificate: Certificate | None = None
    bound_scope: str | None = field(default=None, repr=False)  # the placement shows it
    violations: tuple[str, ...] = ()
    lacks: str | None = None
    history: tuple[Progress, ...] = field(default=(), repr=False, compare=False)

    _also_shown = ("gap",)

    @property
    def bound_is_of_loads(self) -> bool:
        """True if the bound knows loads alone, so that the gap to it says little.

        It takes every window's best placement, though there is one for all; and of time no traffic,
        or next to none.
        """
        return self.bound_source == LOADS and self.status != "optimal"

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective: how far from the optimum this can be at most.

        None without a bound, and where ``bound_is_of_loads``: it is mostly the bound that is far
        from the optimum there.
        """
        return None if self.bound_is_of_loads else gap_between(self.objective, self.bound)

    def to_dict(self) -> dict[str, Any]:
        """Return figures as JSON values; the placement has a file of its own."""
        names = ("method", "status", "objective", "bound", "bound_source", "bound_scope", "gap")
        values = {name: getattr(self, name) for name in (*names, "seconds")}
        return values | {"violations": list(self.violations), "details": self.details.to_dict()}

    def uninterrupted(self) -> Result:
        """Return this result; raise KeyboardInterrupt if one has ended its search.

        Call it before conclusions are drawn from several results: an interrupted one is not final.
        """
        if self.status == "interrupted":
            raise KeyboardInterrupt
        return self

    def plot(
        self, problem: Problem, before: Placement | None = None, *, layer: int | None = None
    ) -> Any:
        """Draw the placement below the one before, as a figure of plotly.

        Parameters
        ----------
        problem
            The solved problem, whose loads are the colours.
        before
            The placement above; by default experts in blocks.
        layer
            Layer whose load of every device is drawn as bars instead.

        Raises
        ------
        ImportError
            If plotly is not installed: ``pip install 'moetuner[report]'``.

        Examples
        --------
        >>> import moetuner as mt
        >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
        >>> problem = mt.Problem(statistics, mt.Topology(2), objective="balance")
        >>> mt.solve(problem).plot(problem, layer=0).layout.yaxis.title.text
        'load / mean of devices'
        """
        check.instance("problem", problem, Problem)
        before = contiguous(self.placement) if before is None else before
        return self.placement.plot(problem.load, before=before, layer=layer)

    def _repr_html_(self) -> str:
        head = ("method", "status", "objective", "bound", "gap", "seconds")
        return html_table(head, [[getattr(self, name) for name in head]])
