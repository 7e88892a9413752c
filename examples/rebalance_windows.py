"""Follow traffic that changes, by few moves: what the plugins do inside vLLM and SGLang.

    python examples/rebalance_windows.py
    python examples/rebalance_windows.py trace.safetensors --devices 8 --budget 16

Enters: a trace; by default the one that comes with moetuner, one kind of text after the other.
Windows of it arrive as they would while a model serves. After each one the map of experts is
adapted to what was seen last, and the next window shows whether that was right.
"""

import argparse
from pathlib import Path

import numpy as np

import moetuner as mt
from moetuner.plugins import rebalance_experts

BUNDLED = Path(mt.__file__).parent / "data" / "small-moe.safetensors"
# Windows that a decision looks at: more are steadier, fewer follow sooner.
REMEMBERED = 4


def arriving(path: Path, window: int) -> np.ndarray:
    """Return tokens per expert and window [W,L,E], kinds of text one after the other."""
    trace = mt.RoutingTrace.load(path)
    if trace.group is not None:
        order = np.argsort(trace.group, kind="stable")
        trace = mt.RoutingTrace.from_arrays(trace.expert_ids[order], num_experts=trace.num_experts)
    return mt.RoutingStatistics.from_trace(trace, window=window).window_load.astype(np.int64)


def imbalance(load: np.ndarray, slots: np.ndarray, devices: int) -> float:
    """Return the slowest device's tokens over the mean, average of layers; copies share evenly."""
    layers = np.arange(len(slots))[:, None]
    copies = np.stack([np.bincount(row, minlength=load.shape[1]) for row in slots])
    per_slot = load[layers, slots] / copies[layers, slots]
    per_device = per_slot.reshape(len(slots), devices, -1).sum(axis=2)
    return float((per_device.max(axis=1) / per_device.mean(axis=1)).mean())


def moved(old: np.ndarray, new: np.ndarray, devices: int) -> int:
    """Return how many experts devices hold that they did not hold before."""
    pairs = zip(*(m.reshape(-1, m.shape[1] // devices) for m in (old, new)), strict=True)
    return sum(len(set(after) - set(before)) for before, after in pairs)


def main() -> None:
    """Judge each window under the first map and under the adapted one; then adapt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--slots-per-device", type=int, default=3)
    parser.add_argument("--budget", type=int, default=16, help="Copies that move after a window.")
    parser.add_argument("--window", type=int, default=2048, help="Tokens between decisions.")
    options = parser.parse_args()
    load = arriving(options.trace, options.window)
    slots = options.devices * options.slots_per_device

    def adapted(seen: np.ndarray, running: np.ndarray | None) -> np.ndarray:
        return rebalance_experts(
            seen, slots, None, 1, options.devices, running, budget=options.budget
        )

    # What the first window asks for; without a map that runs there is nothing to move.
    first = running = adapted(load[:1], None)
    print("window  stays  adapted  moved")
    shown = []
    for number in range(1, len(load)):
        stays, follows = (imbalance(load[number], m, options.devices) for m in (first, running))
        new = adapted(load[max(0, number - REMEMBERED + 1) : number + 1], running)
        moves = moved(running, new, options.devices)
        print(f"{number:6}  {stays:5.3f}  {follows:7.3f}  {moves:5}")
        shown.append((stays, follows, moves))
        running = new
    stays, follows, moves = np.mean(shown, axis=0)
    print(f"  mean  {stays:5.3f}  {follows:7.3f}  {moves:5.1f}")


if __name__ == "__main__":
    main()
