"""The request of advise(): its arguments, checked, and the problems that are built of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

from moetuner import _checks as check
from moetuner.cost import bytes_of_expert
from moetuner.cost.memory import Memory, compute_memory, memory_of
from moetuner.evaluation.samples import Samples, find_samples
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.files.cells import counted
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.goals import AIMS, Goal
from moetuner.problem.objective import choose_goal, choose_tables
from moetuner.problem.windows.choice import choose_counted_window
from moetuner.recording import Recording
from moetuner.serving import Serving, refuse_keywords
from moetuner.serving.engines import ENGINES, NO_ENGINES, Engine, engine_settings
from moetuner.serving.phases import PREFILL_WINDOWS, Phases, choose_judged_windows, make_phases
from moetuner.serving.running import STARTS, Running
from moetuner.statistics import RoutingStatistics, as_counts, check_recording
from moetuner.topology import Topology

Window = int | None


def count_running_slots(initial: Placement | str, experts: int, devices: int) -> int:
    """Return the slots of a device in a layer under the running placement."""
    if isinstance(initial, Placement):
        return initial.slots_per_device
    return Running.parse(initial).count_slots(experts, devices)


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of ``advise``, checked, with their defaults resolved.

    ``windows`` are the sizes of windows to judge; ``progress`` is called with a few words on each
    step of the computation.
    """

    traffic: Recording
    unseen: Recording | None
    serving: Serving
    initial: Placement | str
    copies: tuple[int, ...]
    windows: tuple[Window, ...]
    objective: Goal | None
    expert_bytes: float | None
    memory: Memory | None
    step_ms: Mapping[Window, float]
    price: float
    prefill_share: float | None
    recorded_by: str | None
    by_group: bool
    in_order: bool
    iterations: int | None
    time_limit: float | None
    seed: int
    threads: int | None
    progress: Callable[[str], None]

    def __post_init__(self) -> None:
        check.flag("in_order", self.in_order)
        check.flag("by_group", self.by_group)
        if self.by_group and len(self.traffic.group_rows()) < 3:
            raise check.ArgumentError("by_group needs traffic of two groups or more", "by_group")
        if self.objective is not None:
            check.one_of("objective", self.objective, get_args(Goal))
        if self.recorded_by is not None:
            check.one_of("recorded_by", self.recorded_by, (*ENGINES, *NO_ENGINES))

    @property
    def engine(self) -> Engine | None:
        """The engine's settings; None where none is named."""
        name = self.serving.engine
        return None if name is None else ENGINES[name]

    @property
    def topology(self) -> Topology:
        """The machine."""
        return self.serving.topology

    @property
    def goal(self) -> Goal:
        """The goal of placements: the objective, by default time."""
        return choose_goal(self.objective, None)

    @property
    def single_slots(self) -> int:
        """Slots of a device that hold each expert once."""
        return -(-self.traffic.num_experts // self.topology.devices)

    @property
    def running_copies(self) -> int:
        """Slots for copies of a device in a layer that run already: their memory costs nothing."""
        experts, devices = self.traffic.num_experts, self.topology.devices
        return max(count_running_slots(self.initial, experts, devices) - self.single_slots, 0)

    @property
    def tried_copies(self) -> tuple[int, ...]:
        """Slots for copies to try: the requested and running ones that engine and model allow."""
        may_copy = self.engine is None or self.engine.may_copy
        highest = self.traffic.num_experts - self.single_slots if may_copy else 0
        candidates = sorted({*self.copies, self.running_copies})
        return tuple(slots for slots in candidates if slots <= highest) or (0,)

    @property
    def is_held_out(self) -> bool:
        """True if placements are judged on traffic that they were not computed from.

        A recording of one window cannot be halved.
        """
        return self.traffic.length > 1 or self.unseen is not None

    @property
    def judged_recording(self) -> Recording:
        """The recording that has the unseen traffic: given apart, or half of ``traffic``."""
        return self.traffic if self.unseen is None else self.unseen

    @property
    def prefill_lacks(self) -> int:
        """Tokens by which the recording is too short to judge prefill; 0 if it is not."""
        is_judged = len(self.windows) > 1 or self.serving.phases is not None
        if is_judged or self.windows[0] is None:
            return 0
        # Without unseen traffic, half of the recording is judged on.
        fewest = (2 if self.unseen is not None else 4) * PREFILL_WINDOWS[-1]
        return fewest - self.judged_recording.length

    def settings(self, splits: int, phases: dict[int | None, float]) -> dict[str, Any]:
        """Return the settings of an advice as JSON values."""
        initial, topology, serving = self.initial, self.topology, self.serving
        return {
            "engine": serving.engine,
            "price": self.price,
            "waterfill": serving.waterfill,
            "expert_bytes": self.expert_bytes,
            "kv_bytes": None if self.memory is None else self.memory.token,
            "device_memory": None if self.memory is None else self.memory.device,
            "step_ms": [self.step_ms.get(window) for window in self.windows],
            "in_order": self.in_order,
            "seed": self.seed,
            "time_limit": self.time_limit,
            "prefill_share": self.prefill_share,
            "regime": serving.regime,
            "split": serving.split,
            "arrival": serving.arrival,
            "objective": self.objective,
            "devices": topology.devices,
            "devices_per_node": topology.devices_per_node,
            "topology": topology.name,
            "initial": initial if isinstance(initial, str) else "given",
            "copies": list(self.tried_copies),
            "windows": list(self.windows),
            "phases": phases,
            "splits": splits,
            "held_out": self.is_held_out,
            "cost_model": serving.cost_model and serving.cost_model.name,
        }

    @cached_property
    def units(self) -> dict[Window, Samples]:
        """The independent samples of ``judged_on``, by size of windows."""
        return {window: self.find_samples(self.judged_recording, window) for window in self.windows}

    def find_samples(self, traffic: Recording, window: Window) -> Samples:
        """Return the independent samples of traffic in windows of a size."""
        return find_samples(traffic, window=window, threads=self.threads)


@dataclass(frozen=True)
class Holdout:
    """The counts that placements are computed from, and the traffic that they are judged on."""

    seed: int
    statistics: RoutingStatistics
    unseen: Recording


def make_holdout(request: Request, seed: int) -> Holdout:
    """Return the counts of the seen part and the unseen part, chosen with a seed."""
    seen, unseen = split_seen_unseen(request, seed)
    return Holdout(seed, count_traffic(request, seen), unseen)


def split_seen_unseen(request: Request, seed: int) -> tuple[Recording, Recording]:
    """Return the seen and the unseen part of the traffic, as given apart or chosen with a seed."""
    if request.unseen is not None:
        return request.traffic, request.unseen
    if not request.is_held_out:
        return request.traffic, request.traffic
    return hold_out(request.traffic, seed=seed)


def count_traffic(request: Request, seen: Recording) -> RoutingStatistics:
    """Count seen traffic as ``moetuner solve`` does."""
    step = request.windows[0]
    window = None if step is None else choose_counted_window(seen.length, step)
    options: dict[str, Any] = {"window": window, "threads": request.threads}
    options |= choose_tables(request.serving.regime, request.goal)
    return as_counts(seen, **options)


def build_problem(
    request: Request, statistics: RoutingStatistics, copies: int, *, phases: Phases | None = None
) -> Problem:
    """Build the problem of ``moetuner solve`` with a number of slots for copies on a device.

    ``phases`` replace those of the request.
    """
    # The map that is written for no engine in particular has no empty slots either.
    slots, fill_slots = request.single_slots + copies, copies > 0
    if request.serving.engine is not None:
        settings = engine_settings(
            request.serving.engine, statistics, request.topology, slots_per_device=slots
        )
        fill_slots = settings["fill_slots"]
    serving = request.serving
    return Problem.served(
        statistics,
        serving,
        slots_per_device=slots,
        fill_slots=fill_slots,
        phases=serving.phases if phases is None else phases,
        window=request.windows[0],
        objective=request.objective,
        max_imbalance=AIMS[request.goal].cap,
    )


def resolve_serving(
    topology: Topology | Serving,
    traffic: Recording,
    options: dict[str, Any],
    *,
    engine: str | None,
    waterfill: float | None,
) -> Serving:
    """Return the serving of an argument, which is a serving or a machine with keywords."""
    if not traffic.ordered:  # counts have no sequences that could be mixed
        options = {**options, "arrival": None}
    if isinstance(topology, Serving):
        refuse_keywords(engine=engine, waterfill=waterfill, **options)
        return topology if traffic.ordered else replace(topology, arrival="bursts")
    options = {name: value for name, value in options.items() if value is not None}
    return Serving.resolve(topology, traffic, options=options, engine=engine, waterfill=waterfill)


def find_expert_bytes(traffic: Recording, expert_bytes: float | None) -> float | None:
    """Return the bytes of one expert, as given or of the model's experts; None where unknown."""
    if expert_bytes is None:
        return bytes_of_expert(traffic.expert_size, traffic.model)
    return check.positive("expert_bytes", expert_bytes, "number of bytes")


def find_memory(
    traffic: Recording,
    serving: Serving,
    expert_bytes: float | None,
    kv_bytes: float | None,
    device_memory: float | None,
    initial: Placement | str,
) -> Memory | None:
    """Return the memory of a device; None where it, or the bytes of an expert, are unknown."""
    topology = serving.topology
    if kv_bytes is not None:
        check.positive("kv_bytes", kv_bytes, "number of bytes")
    if device_memory is None:
        model = serving.cost_model
        device_memory = memory_of(topology.name, None if model is None else model.preset_text)
    else:
        check.positive("device_memory", device_memory, "number of bytes")
    if device_memory is None or expert_bytes is None:
        return None
    return compute_memory(
        traffic.model,
        layers=traffic.layers,
        slots=count_running_slots(initial, traffic.num_experts, topology.devices),
        expert_bytes=expert_bytes,
        device_bytes=device_memory,
        kv_bytes=kv_bytes,
    )


def read_step_ms(
    step_ms: float | Sequence[float] | None, windows: tuple[int | None, ...]
) -> dict[int | None, float]:
    """Return the milliseconds of a step by window; empty where they are unknown.

    Those of prefill are left out where it is not judged.
    """
    if step_ms is None:
        return {}
    of_phases: Sequence[Any] = [step_ms]
    if not isinstance(step_ms, int | float):
        of_phases = check.listed("step_ms", step_ms, "numbers of milliseconds")
    if len(of_phases) not in (1, 2):
        raise check.ArgumentError(
            "step_ms must be milliseconds of a step in decode, or in decode and in prefill, got "
            f"{counted(len(of_phases), 'number')}",
            "step_ms",
        )
    times = [check.positive("step_ms", each, "number of milliseconds") for each in of_phases]
    return dict(zip(windows, times, strict=False))


def sort_copies(copies: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of slots for copies to try, in ascending order."""
    listed = check.listed("copies", copies, "whole numbers")
    counts = sorted({check.whole_number("copies", count, lowest=0) for count in listed})
    if not counts:
        raise check.ArgumentError("copies must be at least one number of slots, got none", "copies")
    return tuple(counts)


def choose_windows(
    traffic: Recording, unseen: Recording | None, window: int | None
) -> tuple[int | None, ...]:
    """Return the sizes of windows to judge: the given one, else those of decode and prefill."""
    if not traffic.ordered:
        return (None,)  # statistics come in their windows
    if window is not None:
        return (window,)
    return choose_judged_windows(traffic.length // 2 if unseen is None else unseen.length)


def check_values(
    traffic: Recording, topology: Topology, price: float, initial: Placement | str
) -> None:
    """Raise for traffic without tokens, a price out of range, and a placement that cannot run."""
    check_recording(traffic)
    check.instance("topology", topology, Topology, hint=", such as Topology(devices=8)")
    if traffic.ordered and traffic.length < 2:
        raise ValueError(f"traffic must have two tokens or more, got {traffic.length}")
    if traffic.is_empty:
        raise ValueError("traffic must have tokens, got a load of 0")
    check.share("price", price)
    if isinstance(initial, str):
        if not Running.is_name(initial):
            names = ", ".join(STARTS)
            raise check.ArgumentError(
                f"initial must be {names} or eplb:N, got {check.shown(initial)}", "initial"
            )
        Running.parse(initial).count_slots(traffic.num_experts, topology.devices)
    else:
        check.instance("initial", initial, Placement)


def check_unseen(traffic: Recording, unseen: Recording) -> None:
    """Raise if the unseen traffic is of another kind or model, or has no tokens."""
    check_recording(unseen, "unseen")
    if traffic.noun != unseen.noun:
        raise check.ArgumentError(
            f"unseen must be {traffic.noun} like traffic, got {unseen.noun}", "unseen"
        )
    wanted, got = (
        f"{recording.layers} layers of {recording.num_experts} experts"
        for recording in (traffic, unseen)
    )
    if wanted != got:
        raise check.ArgumentError(f"unseen must have {wanted} like traffic, got {got}", "unseen")
    if unseen.is_empty:
        raise check.ArgumentError("unseen must have tokens, got none", "unseen")


def choose_phases(
    traffic: Recording, share: float | None, window: int | None, windows: tuple[int | None, ...]
) -> Phases | None:
    """Return the phases that placements are computed for: one window's, or by prefill's share.

    Raises if the share is no share, or only one phase is judged.
    """
    if share is None:
        return {window: 1.0} if traffic.ordered and window is not None else None
    check.share("prefill_share", share)
    if len(windows) == 1:
        raise check.ArgumentError(
            f"prefill_share needs a trace of at least {4 * PREFILL_WINDOWS[-1]:,} tokens and no "
            "window, so that both prefill and decode are judged",
            "prefill_share",
        )
    return make_phases(share)
