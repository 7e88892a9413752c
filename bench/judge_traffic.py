"""Traffic judged by SimGrid, beside what the cost model predicts of links.

    pip install "pybind11<2.12" "setuptools<70" wheel    # and cmake, a compiler, Boost's headers
    pip install --no-build-isolation simgrid==4.1
    python bench/judge_traffic.py [--trace FILE] [--windows 2] [--layers 8] [--tokens 512 8192]
        [--devices 16 32 72]

A placement is computed from half of the sequences; windows of the other half are sent: a row per
token and distinct device of its experts (`dispatch_rows`), the result back, one flow for each pair
of devices. SimGrid shares links fairly among flows and says when the last one ends. Sixteen devices
are two nodes of H100, 32 four nodes, 72 one NVL72, with the bandwidths and latencies of our
presets; more slots than experts hold copies (contiguous and random fill them with the first
experts again, the two stages leave them empty).

Columns: microseconds of dispatch and combine of a layer by SimGrid, by `CostModel.ports_us` of the
same rows, and by `evaluate`, which spreads homes evenly; ratios to contiguous by the three; how far
our two are off SimGrid's ratio. Times are means over windows and evenly spaced layers, one on 72
devices. *RDMA* is SimGrid's plain fair sharing (model CM02, factors 1, no TCP window, no
cross-traffic); *default* its model of TCP. Wanted: ratios within 10 %.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, benchmark, spread
from numpy.typing import NDArray

import moetuner as mt
from moetuner.cost import busiest_ports, cost_model_of

BUNDLED = Path(mt.__file__).parent / "data" / "small-moe.safetensors"
MACHINES = {16: ("h100-nvl8-ib400", 2), 32: ("h100-nvl8-ib400", 4), 72: ("gb200-nvl72", 1)}
PLACEMENTS = ("contiguous", "random", "eplb", "paper", "joint")
# SimGrid's settings: fair sharing of links that lose nothing, or its defaults, fitted to TCP; and
# what these make of a link's latency and bandwidth (factors of its model LV08).
FABRICS = {
    "RDMA": (
        (
            "network/model:CM02",
            "network/TCP-gamma:0",
            "network/crosstraffic:0",
            "network/bandwidth-factor:1",
            "network/latency-factor:1",
            "network/weight-S:0",
        ),
        (1.0, 1.0),
    ),
    "default": ((), (13.01, 0.97)),
}

Floats = NDArray[np.float64]


def platform(topology: mt.Topology) -> str:
    """Return SimGrid's platform of a topology: of every device, a link out and in of each tier.

    Switches are as fast as all their ports together, as NVLink's and a full fat tree's are.
    """
    devices, tier = range(topology.devices), topology.tier
    lines = [f'<host id="{device}" speed="1Gf"/>' for device in devices]
    for number, level in enumerate(topology.levels, start=1):
        # A route has two links, which share the latency of the way.
        link = f'bandwidth="{level.bandwidth:.0f}Bps" latency="{level.latency / 2:.3e}s"'
        for device in devices:
            lines += [f'<link id="{way}{number}-{device}" {link}/>' for way in ("out", "in")]
    for a, b in zip(*np.nonzero(tier), strict=True):
        links = f'<link_ctn id="out{tier[a, b]}-{a}"/><link_ctn id="in{tier[a, b]}-{b}"/>'
        lines.append(f'<route src="{a}" dst="{b}" symmetrical="NO">{links}</route>')
    head = '<?xml version="1.0"?>\n<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">\n'
    return f'{head}<platform version="4.1"><zone id="all" routing="Full">' + "\n".join(
        [*lines, "</zone></platform>"]
    )


def simulated(topology: mt.Topology, exchanges: Sequence[Floats], options: Sequence[str]) -> Floats:
    """Simulate exchanges of bytes [D,D], one after the other; return the seconds of each [n].

    An engine cannot be started twice, so a process of its own runs it.
    """
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        work = pool.submit(_simulate, platform(topology), list(exchanges), options)
        return np.array(work.result())


def _simulate(xml: str, exchanges: Sequence[Floats], options: Sequence[str]) -> list[float]:
    import simgrid

    quiet = ("--log=root.thres:critical", "--log=no_loc")
    engine = simgrid.Engine(["judge", *quiet, *(f"--cfg={option}" for option in options)])
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(xml)
        file.flush()
        engine.load_platform(file.name)
    hosts = [engine.host_by_name(str(device)) for device in range(len(exchanges[0]))]
    seconds = []

    def conduct() -> None:
        for sent in exchanges:
            began = engine.clock
            flows = [
                simgrid.Comm.sendto_async(hosts[a], hosts[b], int(sent[a, b]))
                for a, b in zip(*np.nonzero(sent), strict=True)
            ]
            for flow in flows:
                flow.wait()
            seconds.append(engine.clock - began)

    # Until 3.36 actors were created by their class.
    if hasattr(hosts[0], "add_actor"):
        hosts[0].add_actor("conductor", conduct)
    else:
        simgrid.Actor.create("conductor", hosts[0], conduct)
    engine.run()
    return seconds


def placements(trace: mt.RoutingTrace, topology: mt.Topology) -> dict[str, mt.Placement]:
    """Place the experts of a trace, with at least one slot of every device, by all methods."""
    experts, devices = trace.num_experts, topology.devices
    slots = max(-(-experts // devices), 1 if devices > experts else 2)
    order = np.arange(devices * slots).reshape(devices, slots) % experts
    rng = np.random.default_rng(0)
    names = [rng.permutation(experts) for _ in range(trace.layers)]
    placed = {
        "contiguous": mt.Placement(np.stack([order] * trace.layers), num_experts=experts),
        "random": mt.Placement(np.stack([name[order] for name in names]), num_experts=experts),
    }
    problem = mt.Problem(trace, topology, slots_per_device=slots)
    for method in PLACEMENTS[2:]:
        placed[method] = mt.solve(problem, method, iterations=20_000).placement
    return placed


def windows(trace: mt.RoutingTrace, tokens: int, number: int) -> Iterator[mt.RoutingTrace]:
    """Yield windows of so many tokens, spread evenly over a trace."""
    tokens = min(tokens, trace.tokens)
    for first in np.linspace(0, trace.tokens - tokens, number).astype(int):
        yield mt.RoutingTrace.from_arrays(
            trace.expert_ids[first : first + tokens],
            num_experts=trace.num_experts,
            model=trace.model,
        )


def exchanged(placement: mt.Placement, window: mt.RoutingTrace, model: mt.CostModel) -> Floats:
    """Return the bytes [2,L,D,D] that go from device to device, and those that come back."""
    rows = mt.dispatch_rows(placement, window).astype(np.float64)
    return np.stack([rows * model.token_bytes, rows.swapaxes(1, 2) * model.bytes_back])


def links_us(
    placement: mt.Placement, window: mt.RoutingTrace, topology: mt.Topology, model: mt.CostModel
) -> Floats:
    """Return our microseconds of dispatch and combine [3,L].

    Of these rows, by `evaluate`, and of these rows if all tiers were used at once.
    """
    ports = busiest_ports(mt.dispatch_rows(placement, window), topology)
    # Every tier by itself [tiers,L].
    tiers = [ports * tier for tier in np.eye(len(topology.levels))]
    ways = [
        np.stack([model.ports_us(rows, topology, bytes_each=carried) for rows in tiers])
        for carried in (model.token_bytes, model.bytes_back)
    ]
    # A model whose experts take no time has only links.
    only = mt.CostModel(0, 0, 0, 0, model.token_bytes, combine_bytes=model.bytes_back)
    options: dict[str, Any] = {"window": None, "mixed": False, "cost_model": only}
    evaluated = mt.evaluate(placement, window, topology, **options)
    return np.stack(
        [
            np.sum([way.sum(axis=0) for way in ways], axis=0),
            np.array(evaluated.predicted_us_per_layer),
            np.sum([way.max(axis=0) for way in ways], axis=0),
        ]
    )


def told(topology: mt.Topology, latency: float, bandwidth: float) -> mt.Topology:
    """Return a topology with all latencies and bandwidths times these factors."""
    tiers = [
        mt.Tier(level.devices, level.bandwidth * bandwidth, level.latency * latency)
        for level in topology.levels
    ]
    return mt.Topology(topology.devices, tiers=tuple(tiers))


def judged(
    report: Report, title: str, simgrid: Mapping[str, Floats], ours: Mapping[str, Floats]
) -> Floats:
    """Print a table of SimGrid's microseconds [n] and our own [5,n] by placement.

    Returns how far our ratios to contiguous are off SimGrid's, and our times off its times [P,2,5].
    """
    table = report.table(
        title,
        "placement <12s",
        "SimGrid, us 11.1f",
        "ports, us 9.1f",
        "evaluate, us 12.1f",
        "ratio, SimGrid 14.3f",
        "ports 7.3f",
        "evaluate 8.3f",
        "off, ports 10.1%",
        "evaluate 8.1%",
    )
    us = {
        name: np.array([times.mean(), *ours[name].mean(axis=1)]) for name, times in simgrid.items()
    }
    found = []
    for name, values in us.items():
        ratio = values / us["contiguous"]
        found.append([ratio[1:] / ratio[0] - 1, values[1:] / values[0] - 1])
        table(name, *values[:3], *ratio[:3], *found[-1][0][:2])
    return np.array(found)


def judge(
    report: Report, devices: int, parts: Sequence[mt.RoutingTrace], asked: Any
) -> Iterator[tuple[str, Floats]]:
    """Yield, by fabric, what `judged` found of placements on a machine, a table for each window.

    ``parts`` are the seen and the unseen half of a trace.
    """
    name, nodes = MACHINES[devices]
    topology = mt.Topology.preset(name, nodes=nodes)
    seen, unseen = parts
    # An exchange of 72 devices has 5,112 flows, seconds of SimGrid's: one layer will do.
    number = min(asked.layers, seen.layers) if devices < 72 else 1
    layers = np.linspace(0, seen.layers - 1, number).astype(int)
    model, placed = cost_model_of(seen), placements(seen, topology)
    for tokens in asked.tokens:
        sent_windows = list(windows(unseen, tokens, asked.windows))
        flows = [
            one
            for placement in placed.values()
            for window in sent_windows
            for layer in zip(*exchanged(placement, window, model)[:, layers], strict=True)
            for one in layer
        ]

        def ours(
            topology: mt.Topology, sent_windows: Sequence[mt.RoutingTrace] = sent_windows
        ) -> list[Floats]:
            """Return our times of all placements [3,n]."""
            return [
                np.concatenate(
                    [
                        links_us(placement, each, topology, model)[:, layers]
                        for each in sent_windows
                    ],
                    1,
                )
                for placement in placed.values()
            ]

        plain = ours(topology)
        for fabric, (options, factors) in FABRICS.items():
            seconds = simulated(topology, flows, options).reshape(len(placed), -1, 2)
            simgrid = dict(zip(placed, 1e6 * seconds.sum(axis=2), strict=True))
            knowing = ours(told(topology, *factors)) if options != FABRICS["RDMA"][0] else plain
            both = [np.concatenate([a, b[::2]]) for a, b in zip(plain, knowing, strict=True)]
            title = f"{name}, {devices} devices, {tokens} tokens, {fabric}"
            yield fabric, judged(report, title, simgrid, dict(zip(placed, both, strict=True)))


def main() -> None:
    """Print a table per machine, window and fabric."""
    numbers = {"windows": 2, "layers": 8, "tokens": [512, 8192], "devices": [16, 32, 72]}
    with benchmark(__doc__, trace=BUNDLED, **numbers) as (asked, report):
        if importlib.util.find_spec("simgrid") is None:
            print("SimGrid is not installed: see the first lines of this file", file=sys.stderr)
            raise SystemExit(2)
        parts = mt.RoutingTrace.load(asked.trace).split(0.5, seed=0)
        off = {fabric: list[Floats]() for fabric in FABRICS}
        for devices in asked.devices:
            for fabric, found in judge(report, devices, parts, asked):
                off[fabric].append(found)
        for fabric, tables in off.items():
            # Ratios off and times off, each [tables,P,5]: by ports, evaluate, tiers at once, and
            # by ports and tiers at once if told.
            ratio, time = np.moveaxis(100 * np.array(tables), 2, 0)
            worst = np.abs(ratio).max(axis=(0, 1))
            report.say(
                f"{fabric}: the ratio that is furthest off is {worst[0]:.1f} % off by ports, "
                f"{worst[1]:.1f} % by evaluate, and {worst[3]:.1f} % by ports if told this "
                "fabric's latency and bandwidth. Times by ports if told are "
                f"{spread(time[..., 3])} % above SimGrid's (median and quartiles), as tiers are "
                "used one after the other in the model. Were they used at once, they would be "
                f"{spread(time[..., 4])} % above, and ratios {worst[4]:.1f} % off at most."
            )


if __name__ == "__main__":
    main()
