"""From recorded routing to a placement that an engine loads.

    python examples/quick_start.py
    python examples/quick_start.py trace.safetensors --devices 16 --engine vllm --out placement.json

Enters: a trace; by default the one that comes with moetuner. Leaves: a placement. In between:
is it worth it, what is proven of it, and what it does to traffic that it has not seen.
"""

import argparse
from pathlib import Path

import moetuner as mt

BUNDLED = Path(mt.__file__).parent / "data" / "small-moe.safetensors"


def main() -> None:
    """Ask, place, judge, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--engine", help="vllm, sglang, tensorrt-llm, megatron, ...")
    parser.add_argument("--out", type=Path, default=Path("placement.json"))
    options = parser.parse_args()
    topology = mt.Topology(options.devices)

    # Is it worth it? Placements of one half of the sequences are judged on the other, three times.
    trace = mt.RoutingTrace.load(options.trace)
    advice = mt.advise(trace, topology, engine=options.engine)
    print(advice.sentence)

    # The placement, from half of the sequences; the other half is kept to judge it.
    seen, unseen = mt.hold_out(trace)
    statistics = mt.RoutingStatistics.from_trace(seen, window=512)
    settings = {}
    if options.engine is not None:
        settings = mt.engine_settings(options.engine, statistics, topology)
    problem = mt.Problem(statistics, topology, **settings)
    result = mt.solve(problem)
    print(f"{result.objective:.1f} us per layer, no placement is below {result.bound:.1f}")

    running = mt.solve(problem, "contiguous").placement  # what engines begin with
    for name, placement in (("contiguous", running), ("moetuner", result.placement)):
        evaluation = mt.evaluate(placement, unseen, topology, window=512)
        print(f"{name:10}  imbalance {evaluation.imbalance:.2f}  fanout {evaluation.fanout:.2f}")

    result.placement.save(options.out)
    print(f"wrote {options.out}; moetuner export hands it to an engine")


if __name__ == "__main__":
    main()
