"""Our placements beside those of others, on traffic that none of them has seen.

    make bench-peers
    python bench/versus.py [--data FOLDER] [--wheels build/wheels] [--quick]
    python bench/versus.py static --seeds 10

What others place with is their released code: EPLB as DeepSeek published it and SGLang's
``deepseek_vec`` out of SGLang's wheel, vLLM's policy out of its, FlashLB and SwiftBalancer out of
vllm-ascend's, STAIR out of its source archive, Mt-KaHyPar and HiGHS from PyPI (`bench/peers.py`
says how they are called). memra's
greedy, for two cards without NVLink, is written anew there as its tool describes it. ExFlow's
objective and the paper's two stages are this package's methods ``exflow`` and ``paper``. What is
not there is left out, with a line that says so.

*Unseen traffic*: half of the sequences, or of the windows of a load table, are seen, the others
judged; mean and standard deviation over several such halves, and of random placements over five
draws of each. *Imbalance* is max / mean load of devices, the mean over layers and windows of 512
tokens; *mixed* is the same with sequences served together; *crossing* is the share of steps from
layer to layer between devices; *fanout* is devices (nodes) that a token visits in a layer; *us* is
the predicted time of a layer on H100s in regime dispatch; of load tables, *total* is the imbalance
of all windows added up, *worst* that of any layer and window. *Ours* has a row for everything that
can be made small, at default effort; *capped* ones keep every layer's load within 1.05 of the mean,
or what they say. On two devices *fanout* less one is the share of tokens with experts on both.
Wanted there, and on four: ours capped at 1.4 is below memra's greedy in fanout and in imbalance.
The *oracle* is ours that saw the half that is judged. No placement is below the *bound*, which is
proven for that half; that of *us* is of times by counts, within half a percent of the replay's.
Seconds are of the processor, medians. Wanted: in the column of its goal, ours is below all others;
between nodes, traffic counts at the cost of its links, which is no column.

*Equal seconds*: the same figures, of what a method has after so many seconds of the clock, from
counts to slots, on one thread: medians of three runs up to a second, one run beyond. A cell is
blank where a method takes longer. Wanted: ours is nowhere behind. This table alone depends on the
machine and on what else it does.

*Rebalances*: each policy decides on the windows since its last decision, and is judged on the next
ones; all begin with the map that engines begin with. A sequence is drawn ``--seeds`` times; one
that was recorded begins at another window. Ours gets what the peer gets, the sum of these
windows or each of them. It decides by itself; where that moves more than the peer did in the same
decision, it decides anew with the peer's moves as its budget. *All moves* has these as its budget
in any case. *Balanced* is mean / max rank load; *moves* are copies that come to a rank that did not
have them, a decision; *ahead* is a mean of decisions with its standard error. Wanted: never less
balanced at no more moves, so beside the best of the others in every sequence. The row *by itself*
gets every window.

*Few*: the same sequences of the first two layers alone, with STAIR, which takes a second and more
to plan a layer of 288 slots.

*Proven*: what ``joint`` finds on all traffic at default effort, what no placement is below, and
seconds of the processor, also of checking the proof; of the paper's stage 1, clusters within its
tolerance, 2.5 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, benchmark, imbalance, skewed_loads, timed
from instances import (
    RECORDED,
    Instance,
    bundled,
    domains,
    drifting,
    in_domains,
    problem,
    recorded,
)
from numpy.typing import NDArray
from peers import (
    WHEELS,
    MtKaHyPar,
    Policy,
    Size,
    copies_moved,
    flashlb,
    memra_greedy,
    mt_kahypar,
    sglang,
    sglang_windows,
    stair,
    swift_balancer,
    vllm,
)

import moetuner as mt
from moetuner.cost import cost_model_of
from moetuner.plugins import rebalance_experts
from moetuner.solver.two_stage.cluster import TOLERANCE, cluster_layers
from moetuner.statistics import WINDOW

Slots = NDArray[Any]
Floats = NDArray[np.float64]
Counts = mt.RoutingStatistics
# What an engine's wheel has, or why it cannot run.
Peer = Callable[[Path, Size], Policy | str]
# Counts of what is seen, the instance and a seed in; slots [L,D,S] out.
Method = Callable[[Counts, Instance, int], Slots]

PARTS = ["static", "seconds", "rebalances", "few", "proven"]
POLICIES: dict[str, Peer] = {
    "EPLB": sglang,
    "vLLM": vllm,
    "deepseek_vec": sglang_windows,
    "FlashLB": flashlb,
    "SwiftBalancer": swift_balancer,
    "STAIR": stair,
}
# Those that take seconds for a layer, and decide on few layers alone.
SLOW = ("STAIR",)
FEW_LAYERS = 2
# How windows differ that have 200 to 20,000 tokens (`instances.window_tokens`).
UNLIKE = ("scattered", "alternating", "one in ten", "day")
# Those that look at every window; the others get the sum.
SEE_WINDOWS = ("deepseek_vec", "FlashLB", "STAIR")
# Those that keep groups of experts whole on a node.
KNOW_GROUPS = ("EPLB", "vLLM", "deepseek_vec")
CAP, LOOSE_CAP = {"max_imbalance": 1.05}, {"max_imbalance": 1.4}
FOLLOW, DISPATCH = {"objective": "traffic", "regime": "follow"}, {"objective": "traffic"}
# What can be made small, and the figure that then counts.
GOALS: dict[str, tuple[dict[str, Any], str]] = {
    "balance": ({"objective": "balance"}, "imbalance"),
    "follow": (FOLLOW, "crossing"),
    "follow, capped": (FOLLOW | CAP, "crossing"),
    "dispatch": (DISPATCH, "fanout"),
    "dispatch, capped": (DISPATCH | CAP, "fanout"),
    "dispatch, capped at 1.4": (DISPATCH | LOOSE_CAP, "fanout"),
    "time": ({"objective": "time"}, "us"),
}
FREE = ("balance", "follow", "dispatch", "time")
# Figures by column, as an evaluation calls them.
OF_TRACE = {
    "imbalance": "imbalance",
    "mixed": "imbalance_mixed",
    "crossing": "crossing",
    "fanout": "fanout",
    "nodes": "node_fanout",
    "us": "predicted_layer_us",
}
OF_LOADS = ("imbalance", "total", "worst")
DRAWS = 5
# Tokens of a window of a recorded trace, where rebalances are decided.
TRACE_WINDOW = 4096
# Generated problems whose gap is shown; layers, experts and clusters of stage 1.
GENERATED = ("paper", "48x128")
STAGE_1 = ((94, 128, 8), (58, 256, 32))


def has_tokens(instance: Instance) -> bool:
    """Return whether traffic is a trace, and not loads alone."""
    return isinstance(instance.traffic, mt.RoutingTrace)


def figured(instance: Instance) -> tuple[str, ...]:
    """Name the goals that are a figure: not where a cap, or links of several costs, count too."""
    if not has_tokens(instance):
        return ("balance",)
    return FREE if instance.topology.nodes == 1 else ("balance", "time")


def columns_of(instance: Instance) -> list[str]:
    """Name the figures that traffic and devices of an instance have."""
    if not has_tokens(instance):
        return list(OF_LOADS)
    return [name for name in OF_TRACE if name != "nodes" or instance.topology.nodes > 1]


def counted(traffic: mt.RoutingTrace | Counts) -> Counts:
    """Count a trace; counts are counted already."""
    if isinstance(traffic, Counts):
        return traffic
    return Counts.from_trace(traffic, threads=1)


def judged(instance: Instance, slots: Slots, traffic: Any) -> list[float]:
    """Return the figures of slots; some peers put several copies of an expert on a device."""
    if isinstance(traffic, Counts):
        load = traffic.window_load.astype(np.float64)
        windows, total = imbalance(load, slots), imbalance(load.sum(axis=0, keepdims=True), slots)
        return [float(windows.mean()), float(total.mean()), float(windows.max())]
    placement = mt.Placement(slots, num_experts=traffic.num_experts)
    options = {"cost_model": cost_model_of(traffic), "threads": 1}
    figures = mt.evaluate(placement, traffic, instance.topology, **options)
    return [getattr(figures, OF_TRACE[name]) for name in columns_of(instance)]


def problem_of(counts: Counts, instance: Instance, goal: str) -> mt.Problem:
    """Make the problem of a goal, in the windows that its column is judged in."""
    rules = GOALS[goal][0]
    if has_tokens(instance):
        # Counts of a trace with enough tokens would bring windows of prefill, too.
        rules = rules | {"phases": {WINDOW: 1.0}}
    return mt.Problem(counts, instance.topology, slots_per_device=instance.width, **rules)


def solved(method: Any, goal: str, limit: float | None = None) -> Method:
    """Return a method of this package: with a time limit on one thread, else as users call it."""

    def place(counts: Counts, instance: Instance, seed: int) -> Slots:
        options = {"seed": seed, "time_limit": limit, "threads": None if limit is None else 1}
        return mt.solve(problem_of(counts, instance, goal), method, **options).placement.slots

    return place


def size_of(counts: Counts, instance: Instance) -> Size:
    """Return the size of an instance, without groups."""
    devices = instance.topology.devices
    return Size(counts.layers, counts.num_experts, devices * instance.width, devices)


def plugin(counts: Counts, instance: Instance, seed: int) -> Slots:
    """Place as our plugins do at an engine's first call."""
    size = size_of(counts, instance)
    answer = rebalance_experts(counts.window_load, size.slots, None, 1, size.ranks)
    return answer.reshape(-1, size.ranks, size.width)


def of_policy(peer: Peer, wheels: Path, *, hierarchical: bool = False) -> Method:
    """Return an engine's policy, from the map that engines begin with."""

    def place(counts: Counts, instance: Instance, seed: int) -> Slots:
        size = size_of(counts, instance)
        if hierarchical:
            size = replace(size, groups=instance.groups, nodes=instance.topology.nodes)
        policy = peer(wheels, size)
        assert not isinstance(policy, str)
        load = counts.window_load.astype(np.float64)
        return policy(load, size.initial()).reshape(-1, size.ranks, size.width)

    return place


def partitioned(kahypar: type[MtKaHyPar], way: str) -> Method:
    """Return Mt-KaHyPar's partition."""

    def place(counts: Counts, instance: Instance, seed: int) -> Slots:
        devices = instance.topology.devices
        device_of = getattr(kahypar(counts, devices), way)(seed)
        return mt.Placement.from_assignment(device_of, devices).slots

    return place


def memra(counts: Counts, instance: Instance, seed: int) -> Slots:
    """Place as memra's greedy does, of which every device has as many experts."""
    devices = instance.topology.devices
    return mt.Placement.from_assignment(memra_greedy(counts, devices), devices).slots


def there(wheels: Path, report: Report) -> tuple[dict[str, Peer], type[MtKaHyPar] | None]:
    """Return what can run of the peers, and say why the others cannot."""
    names = (" ".join(wheel.name.split("-")[:2]) for wheel in sorted(wheels.glob("*.whl")))
    report.say(f"Wheels of engines: {', '.join(names) or 'none'}.")
    policies, kahypar = {}, mt_kahypar()
    for name, peer in POLICIES.items():
        size = Size(2, 16, 24, 4)
        try:
            policy = peer(wheels, size)
        except ImportError as error:
            policy = str(error)
        if isinstance(policy, str):
            report.say(f"{name} is left out: {policy}.")
            continue
        # What is compiled, is before anything is timed.
        policy(drifting(2, 16, 4, 0.1, 0), size.initial())
        policies[name] = peer
    if isinstance(kahypar, str):
        report.say(f"Mt-KaHyPar is left out: {kahypar}.")
        return policies, None
    return policies, kahypar


def others(
    instance: Instance, policies: dict[str, Peer], kahypar: type[MtKaHyPar] | None, wheels: Path
) -> dict[str, Method]:
    """Return all methods but ours that can place an instance."""
    methods = {
        name: solved(name.replace(" ", "_"), "balance")
        for name in ("contiguous", "round robin", "random")
    }
    for name, peer in policies.items():
        methods[name] = of_policy(peer, wheels)
        if name == "EPLB" and instance.groups > 1:
            methods["EPLB, hierarchical"] = of_policy(peer, wheels, hierarchical=True)
    if has_tokens(instance):
        methods["ExFlow's objective"] = solved("exflow", "follow")
        methods["the paper's two stages"] = solved("paper", "follow, capped")
        methods["memra's greedy"] = memra
        if kahypar is not None:
            methods["Mt-KaHyPar, follow"] = partitioned(kahypar, "follow")
            methods["Mt-KaHyPar, dispatch"] = partitioned(kahypar, "pairs")
    return methods


def of_halves(values: list[float], digits: int = 3) -> str:
    """Return mean and standard deviation."""
    return f"{np.mean(values):.{digits}f} ±{np.std(values):.{digits}f}"


def figures_of(
    instance: Instance, methods: dict[str, Method], seeds: int
) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    """Return figures and seconds of every method and half, ours and the oracle's, and bounds."""
    goals = list(GOALS) if has_tokens(instance) else ["balance"]
    ours = {f"ours, {goal}": solved("heuristic", goal) for goal in goals}
    ours["ours, plugins"] = plugin
    bounded = figured(instance)
    figures: dict[str, list[list[float]]] = {}
    bounds: dict[str, list[float]] = {column: [] for column in columns_of(instance)}

    def add(name: str, slots: Slots, unseen: Any, seconds: float) -> None:
        figures.setdefault(name, []).append([*judged(instance, slots, unseen), seconds])

    for half in range(seeds):
        seen, unseen = instance.halves(half)
        counts, judging = counted(seen), counted(unseen)
        for name, method in (methods | ours).items():
            for draw in range(DRAWS if name == "random" else 1):
                slots, _, seconds = timed(lambda: method(counts, instance, draw))
                add(name, slots, unseen, seconds)
        for goal in goals:
            posed, searched = problem_of(judging, instance, goal), goal not in bounded
            best = mt.solve(posed, "heuristic" if searched else "joint")
            add(f"oracle, {goal}", best.placement.slots, unseen, np.nan)
            if best.bound is not None:
                bounds[GOALS[goal][1]].append(best.bound)
    return figures, bounds


def static(report: Report, instance: Instance, methods: dict[str, Method], asked: Any) -> None:
    """Print a row per method, and how ours compare in the columns of their goals."""
    columns = columns_of(instance)
    figures, bounds = figures_of(instance, methods, asked.seeds)
    title = f"{instance}, halves unseen: {asked.seeds}"
    table = report.table(
        title, "method <31", *(f"{column} 14s" for column in columns), "seconds 8.2f"
    )
    digits = {column: 2 if column == "us" else 3 for column in columns}
    for name, rows in figures.items():
        *cells, seconds = zip(*rows, strict=True)
        took = "" if name.startswith("oracle") else float(np.median(seconds))
        table(name, *map(of_halves, cells, digits.values()), took)
    table(
        "bound",
        *(
            of_halves(bounds[column], digits[column]) if bounds[column] else ""
            for column in columns
        ),
        "",
    )
    report.say(against(instance, figures, methods))


def against(
    instance: Instance, figures: dict[str, list[list[float]]], methods: dict[str, Method]
) -> str:
    """Say what ours and the best of the others reach in the figure of every goal."""
    parts = []
    for goal in figured(instance):
        column = GOALS[goal][1]
        at = columns_of(instance).index(column)
        means = {
            method: float(np.mean([row[at] for row in rows])) for method, rows in figures.items()
        }
        best, ours = min(methods, key=means.__getitem__), means[f"ours, {goal}"]
        change = 100 * (ours / means[best] - 1)
        parts.append(f"{column} {ours:.3f} against {means[best]:.3f} ({best}, {change:+.1f} %)")
    return f"Ours against the best of the others, {instance.name}: {'; '.join(parts)}."


class EqualSeconds:
    """What methods reach in so many seconds in the figure of a goal, by method and budget."""

    def __init__(self, instance: Instance, goal: str, budgets: list[float]) -> None:
        self.instance, self.goal, self.budgets = instance, goal, sorted(budgets)
        seen, self.unseen = instance.halves(0)
        self.counts = counted(seen)
        self.cells: dict[str, dict[float, list[float]]] = {}

    def add(self, name: str, budget: float, slots: Slots | None) -> None:
        """Judge slots, if there are any by then."""
        cell = self.cells.setdefault(name, {}).setdefault(budget, [])
        if slots is not None:
            at = columns_of(self.instance).index(GOALS[self.goal][1])
            cell.append(judged(self.instance, slots, self.unseen)[at])

    def limited(self, name: str, method: str, longest: float, seed: int) -> None:
        """Solve within every budget; what overruns it by a tenth has no cell."""
        for budget in self.budgets:
            if budget <= longest:
                place = solved(method, self.goal, budget)
                slots, seconds, _ = timed(lambda: place(self.counts, self.instance, seed))
                self.add(name, budget, slots if seconds <= 1.1 * budget else None)

    def one_by_one(self, name: str, methods: Iterable[Method], longest: float) -> None:
        """Run methods until time is up; of their answers the best on what is seen counts."""
        value = problem_of(self.counts, self.instance, self.goal).objective_function.value
        left, used, best = [budget for budget in self.budgets if budget <= longest], 0.0, None
        for seed, method in enumerate(methods):
            slots, seconds, _ = timed(lambda: method(self.counts, self.instance, seed))
            used += seconds
            while left and used > left[0]:
                self.add(name, left.pop(0), best)
            if not left:
                return
            if best is None or value(mt.Placement(slots)) < value(mt.Placement(best)):
                best = slots
        for budget in left:
            self.add(name, budget, best)


def equal_seconds(
    report: Report,
    instance: Instance,
    goal: str,
    policies: dict[str, Peer],
    kahypar: type[MtKaHyPar] | None,
    asked: Any,
) -> None:
    """Print a row per method, a column per budget; methods take turns."""
    run = EqualSeconds(instance, goal, asked.budgets)
    limited, others = {"ours": "heuristic"}, dict[str, Callable[[], Iterable[Method]]]()
    if has_tokens(instance):
        limited["the paper's two stages"] = "paper"
        if goal == "follow":
            limited["ExFlow's objective"] = "exflow"
        if kahypar is not None:
            of_ways = {"follow": lambda: repeat(partitioned(kahypar, "follow"))}
            of_ways["dispatch"] = lambda: [partitioned(kahypar, way) for way in ("pairs", "sets")]
            others["Mt-KaHyPar"] = of_ways[goal]
    else:
        others["ours, plugins"] = lambda: [plugin]
        for name, peer in policies.items():
            others[name] = lambda peer=peer: [of_policy(peer, asked.wheels)]
    for turn in range(3):
        longest = 1.0 if turn else max(asked.budgets)
        for name, method in limited.items():
            run.limited(name, method, longest, turn)
        for name, methods in others.items():
            run.one_by_one(name, methods(), longest)
    columns = (f"{budget:g}s 9s" for budget in run.budgets)
    title = f"{GOALS[goal][1]} on unseen traffic after so many seconds, {instance}"
    table = report.table(title, "method <31", *columns)
    for name, cells in run.cells.items():
        medians = (cells[budget] for budget in run.budgets)
        table(name, *(f"{np.median(values):.4f}" if values else "" for values in medians))


def balancedness(size: Size, load: Floats, experts: Slots) -> float:
    """Mean / max rank load, the mean over windows and layers that have load."""
    shape = size.layers, size.ranks, size.width
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(1 / imbalance(load, experts.reshape(shape))))


def decide(
    size: Size, load: Floats, old: Slots, budget: int | None, *, spend: bool = False
) -> Slots:
    """Decide as the plugins do, with a budget where they would move more, or in any case."""
    sizes = size.slots, size.groups, size.nodes, size.ranks
    if not spend:
        new = rebalance_experts(load, *sizes, old)
        if budget is None or copies_moved(size, old, new) <= budget:
            return new
    return rebalance_experts(load, *sizes, old, budget=budget)


class Sequence:
    """A policy at work: its map, and of every decision balancedness, moves and milliseconds."""

    def __init__(self, size: Size) -> None:
        self.size, self.figures = size, list[tuple[float, int, float]]()
        self.begin()

    def begin(self) -> None:
        """Begin anew; figures are kept."""
        self.map = self.size.initial()

    def decide(self, policy: Callable[[Slots], Slots], later: Floats) -> int:
        """Take a decision, in force for later windows; return its moves."""
        new, _, seconds = timed(lambda: policy(self.map))
        moves = copies_moved(self.size, self.map, new)
        self.figures.append((balancedness(self.size, later, new), moves, 1e3 * seconds))
        self.map = new
        return moves

    def ahead_of(self, other: Sequence) -> tuple[float, float]:
        """How much more balanced than another one after the same decisions, and standard error."""
        pairs = zip(self.figures, other.figures, strict=True)
        gains = np.array([ours[0] - theirs[0] for ours, theirs in pairs])
        return float(gains.mean()), float(gains.std(ddof=1) / len(gains) ** 0.5)

    @property
    def means(self) -> tuple[float, float, float]:
        """Mean balancedness and moves of a decision, and median milliseconds."""
        balanced, moves, took = zip(*self.figures, strict=True)
        return float(np.mean(balanced)), float(np.mean(moves)), float(np.median(took))


def cases(asked: Any, real: list[Instance], seed: int) -> Iterator[tuple[str, Size, Floats, int]]:
    """Give sequences of windows: a name, the size, loads [W,L,E], and windows between decisions."""
    decisions = asked.decisions + 1
    layers, experts, slots, ranks = (6, 64, 72, 8) if asked.quick else (58, 256, 288, 32)
    size = Size(layers, experts, slots, ranks)
    for drift, every in ((0.05, 1), (0.15, 1), (0.15, 4), (0.3, 1)):
        load = drifting(layers, experts, decisions * every, drift, seed)
        yield f"drift {drift:.0%}, every {every}", size, load, every
    load = drifting(layers, experts, decisions, 0.15, seed + 1)
    yield "drift 15%, 8 groups", replace(size, groups=8, nodes=4), load, 1
    for sizes in UNLIKE:
        load = drifting(layers, experts, decisions, 0.15, seed, sizes)
        yield f"drift 15%, sizes {sizes}", size, load, 1
    yield "domains, every 10", size, domains(layers, 10 * decisions, seed, experts), 10
    for instance in real:
        traffic, devices = instance.traffic, instance.topology.devices
        if isinstance(traffic, mt.RoutingTrace):
            if devices != 8 or instance.topology.nodes > 1:
                continue
            traffic = Counts.from_trace(traffic, window=TRACE_WINDOW)
        # A slot to spare on every rank.
        width = traffic.num_experts // devices + 1
        load = traffic.window_load.astype(np.float64)
        load = np.roll(load, -(seed * len(load) // asked.seeds), axis=0)[: 10 * decisions]
        size = Size(traffic.layers, traffic.num_experts, devices * width, devices)
        for every in (1, 4) if len(load) > 16 else (1,):
            yield f"{instance.name}, every {every}", size, load, every


class Contest:
    """Policies at work on a sequence: every peer, ours beside it in two ways, and ours alone."""

    def __init__(self, size: Size, policies: dict[str, Peer], wheels: Path) -> None:
        self.size, self.alone = size, Sequence(size)
        able = {
            name: peer for name, peer in policies.items() if size.groups == 1 or name in KNOW_GROUPS
        }
        self.calls = {name: peer(wheels, size) for name, peer in able.items()}
        self.runs = {name: [Sequence(size) for _ in range(3)] for name in able}

    def play(self, load: Floats, every: int) -> None:
        """Take all decisions on windows of load [W,L,E], from the initial map."""
        for sequence in (self.alone, *(each for run in self.runs.values() for each in run)):
            sequence.begin()
        size = self.size
        for at in range(every, len(load) - every + 1, every):
            past, later = load[at - every : at], load[at : at + every]
            self.alone.decide(lambda old: decide(size, past, old, None), later)
            for name, (theirs, ours, spending) in self.runs.items():
                moves = theirs.decide(lambda old: self.calls[name](past, old), later)
                seen = past if name in SEE_WINDOWS else past.sum(axis=0)
                ours.decide(lambda old: decide(size, seen, old, moves), later)
                spending.decide(lambda old: decide(size, seen, old, moves, spend=True), later)

    def gains(self, name: str) -> list[tuple[float, float]]:
        """How far ours are ahead of a peer, by themselves and with all of its moves."""
        theirs, *ours = self.runs[name]
        return [each.ahead_of(theirs) for each in ours]

    @property
    def best(self) -> str:
        """The peer that is most balanced."""
        return max(self.runs, key=lambda name: self.runs[name][0].means[0])


def of_few_layers(
    drawn: Iterator[tuple[str, Size, Floats, int]],
) -> Iterator[tuple[str, Size, Floats, int]]:
    """Give the first layers of sequences."""
    for name, size, load, every in drawn:
        yield name, replace(size, layers=FEW_LAYERS), load[:, :FEW_LAYERS], every


def rebalances(
    report: Report, policies: dict[str, Peer], real: list[Instance], asked: Any, *, few: bool
) -> None:
    """Print a row per sequence and peer, ours beside it at no more moves."""
    kind = "few layers" if few else "rebalances"
    table = report.table(
        f"Sequences of {kind}: balanced, moves a decision, milliseconds",
        "sequence <32",
        "peer <14",
        "balanced 8.4f",
        "moves 6.0f",
        "ms 7.1f",
        "ours 8.4f",
        "moves 6.0f",
        "ms 7.1f",
        "ahead 16s",
        "all moves 9.4f",
        "moves 6.0f",
        "ahead 16s",
    )
    contests: dict[str, Contest] = {}
    for seed in range(asked.seeds):
        drawn = cases(asked, real, seed)
        for name, size, load, every in of_few_layers(drawn) if few else drawn:
            if name not in contests:
                contests[name] = Contest(size, policies, asked.wheels)
            contests[name].play(load, every)
    for name, contest in contests.items():
        for peer, (theirs, ours, spending) in contest.runs.items():
            shown = (f"{gain:+.4f} ±{error:.4f}" for gain, error in contest.gains(peer))
            row = (*theirs.means, *ours.means, next(shown), *spending.means[:2], next(shown))
            table(name, peer, *row)
        table(name, "by itself", "", "", "", *contest.alone.means, "", "", "", "")
    if policies:
        for line in summed(contests):
            report.say(f"Of few layers: {line}" if few else line)


def summed(contests: dict[str, Contest]) -> list[str]:
    """Say in how many sequences ours is at least as balanced as the best of the others."""
    lines = []
    for at, way in enumerate(("by itself", "with all of the peer's moves as its budget")):
        gains = {name: contest.gains(contest.best)[at] for name, contest in contests.items()}
        never = sum(gain >= 0 for gain, _ in gains.values())
        behind = sum(gain < -2 * error for gain, error in gains.values())
        worst = min(gains, key=lambda name: gains[name][0])
        lines.append(
            f"Deciding {way}, at no more moves, ours is at least as balanced as the best of the "
            f"others in {never} of {len(gains)} sequences, and behind by more than two standard "
            f"errors in {behind}; worst: {worst}, {contests[worst].best}, {gains[worst][0]:+.4f}."
        )
    return lines


def proven(report: Report, traces: list[Instance], generated: tuple[str, ...]) -> None:
    """Print what is found on all traffic, what is proven, and what the check of the proof takes."""
    table = report.table(
        "Proven: what is found, and what no placement is below",
        "problem <66",
        "found 9.4f",
        "at least 9.4f",
        "gap 7.2%",
        "status <12",
        "seconds 8.1f",
        "verify 8.1f",
    )
    problems = {f"{name}, generated, follow, capped": problem(name) for name in generated}
    for instance in traces:
        counts = counted(instance.traffic)
        for goal in ("follow, capped", "dispatch", "dispatch, capped"):
            problems[f"{instance}, {goal}"] = problem_of(counts, instance, goal)
    for name, posed in problems.items():
        best, _, seconds = timed(lambda: mt.solve(posed))
        checking = ""
        if best.certificate is not None:
            checking = timed(lambda: mt.verify(best.certificate, posed))[2]
        found = best.objective, best.bound, best.gap, best.status
        table(name, *("" if value is None else value for value in found), seconds, checking)
    packed = report.table(
        "The paper's stage 1, which packs the experts of a layer into clusters of equal size",
        "layers x experts, clusters <28",
        "largest load / bound 20.5f",
        "proven 8s",
        "seconds 8.2f",
    )
    for layers, experts, clusters in STAGE_1:
        load = skewed_loads(layers, experts, 0).astype(np.uint64)
        stage, _, seconds = timed(lambda: cluster_layers(load, clusters))
        done = f"{(stage.gap <= TOLERANCE).sum()}/{layers}"
        packed(f"{layers} x {experts}, {clusters}", 1 / (1 - stage.gap.max()), done, seconds)


def main() -> None:
    """Print the tables that are asked for."""
    with benchmark(
        __doc__,
        {"parts": PARTS},
        data=Path("../shared/data"),
        wheels=WHEELS,
        seeds=3,
        budgets=[0.001, 0.01, 0.1, 1.0, 5.0, 20.0],
        decisions=12,
        quick=False,
    ) as (asked, report):
        if asked.quick:
            asked.seeds, asked.decisions = 1, 3
            asked.budgets = [budget for budget in asked.budgets if budget <= 1]
        policies, kahypar = there(asked.wheels, report)
        quick = {name: peer for name, peer in policies.items() if name not in SLOW}
        traces = [bundled()]
        loads = [in_domains(6, 20) if asked.quick else in_domains()]
        real = [] if asked.quick else list(recorded(asked.data))
        for file in () if asked.quick else RECORDED:
            if not (asked.data / file).exists():
                report.say(f"{file} is left out: it is not in the folder of --data.")
        for instance in real:
            (traces if has_tokens(instance) else loads).append(instance)
        for instance in traces + loads if "static" in asked.parts else ():
            methods = others(instance, quick, kahypar, asked.wheels)
            static(report, instance, methods, asked)
        flat = [instance for instance in traces if instance.topology.nodes == 1]
        if "seconds" in asked.parts:
            for instance, goal in (
                (flat[-1], "follow"),
                (flat[-1], "dispatch"),
                (loads[0], "balance"),
            ):
                equal_seconds(report, instance, goal, quick, kahypar, asked)
        if "rebalances" in asked.parts:
            rebalances(report, quick, real, asked, few=False)
        if "few" in asked.parts:
            rebalances(report, policies, real, asked, few=True)
        if "proven" in asked.parts:
            proven(report, flat[-2:], GENERATED[:1] if asked.quick else GENERATED)


if __name__ == "__main__":
    main()
