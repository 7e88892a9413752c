"""Recorded expert loads: what a placement of one recording is worth on another, and what a mix is.

    python bench/deepseek.py FOLDER [--devices 32 72] [--splits 4] [--plot FILE.png] [--record]
    python bench/deepseek.py TABLE.npz

FOLDER has load tables, such as SGLang's dumps (`{"logical_count": ...}`); each file is a profile.
Of one load table its groups, else its windows, are the profiles. Phase and prompt length are what
the names say (`prefill`, `decode`, `in2000`); a profile whose name says nothing is a kind of its
own. All profiles are scaled to as many tokens, so that those of a mix count alike.

Imbalance is max / mean load of ranks, the mean over layers: then the mean and the worst of all
profiles that are judged. `eplb` is DeepSeek's algorithm on the sum of what was recorded, `joint` is
what `moetuner solve` does with every profile as a window, `quick` what the plugins do; *sum* means
that they got the sum instead. Ranks have just enough slots for one copy of each expert where that
fills them (no copies), else, and besides, one slot more than that.

One recording: judged on itself, on other lengths of its phase, and on the other phase. Several: all
of a phase, judged on the other phase; and a mix of half of each phase, judged on the other half,
over several splits. The last rows saw what is judged: one placement for all of it, the lower bound
that is proven for any such placement, and a placement for each profile.

Losing a rank is evaluated, not provided for: the share of ranks whose loss takes the last copy of
an expert in some layer; the share of layers of a lost rank in which that happens; and the experts
that are then missing in a layer, on average. The placements are those of the first mix.

Wanted: on 32 ranks with 288 slots a mix by ours at 1.045 and 1.069 where EPLB has 1.165 and 1.317.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from harness import Report, benchmark, imbalance, spread
from numpy.typing import NDArray

import moetuner as mt

Floats = NDArray[np.float64]
# Profiles a placement is computed from, and those that it is judged on.
Case = tuple[tuple[int, ...], tuple[int, ...]]

# Choices of a layer in a scaled profile, and the most profiles.
CHOICES, MOST = 1 << 23, 64
# By name in tables: the method, and whether every profile is a window.
METHODS = {
    "contiguous": ("contiguous", False),
    "EPLB": ("eplb", False),
    "joint, sum": ("joint", False),
    "joint": ("joint", True),
    "quick, sum": ("quick", False),
    "quick": ("quick", True),
}
ONE = [name for name in METHODS if not name.endswith("sum")]
OURS = ("joint", "quick")
OWN, LENGTH, PHASE, ALL, MIX = "own", "length", "phase", "all of a phase", "mix"


@dataclass(frozen=True)
class Profiles:
    """Loads of recordings [P,L,E], with the phase and the length that their names say."""

    names: tuple[str, ...]
    load: NDArray[np.int64]

    @property
    def phases(self) -> list[str]:
        """Phase of every profile; its name where that does not say."""
        found = [re.search("prefill|decode", name.lower()) for name in self.names]
        return [match[0] if match else name for match, name in zip(found, self.names, strict=True)]

    @property
    def lengths(self) -> list[str]:
        """Length of the prompts of every profile; its name where that does not say."""
        found = [re.search(r"in(\d+)", name.lower()) for name in self.names]
        return [match[1] if match else name for match, name in zip(found, self.names, strict=True)]

    def cases(self) -> dict[str, list[Case]]:
        """Return what is judged on what, by table column; a column may have nothing."""
        every, phases, lengths = range(len(self.names)), self.phases, self.lengths
        cases: dict[str, list[Case]] = {OWN: [((one,), (one,)) for one in every]}
        for one in every:
            is_other = [phase != phases[one] for phase in phases]
            of_length = [n for n in every if not is_other[n] and lengths[n] != lengths[one]]
            for column, others in ((LENGTH, of_length), (PHASE, np.flatnonzero(is_other).tolist())):
                cases.setdefault(column, []).extend([((one,), tuple(others))] if others else [])
        cases[ALL] = []
        for phase in dict.fromkeys(phases):
            seen = tuple(n for n in every if phases[n] == phase)
            others = tuple(n for n in every if phases[n] != phase)
            cases[ALL] += [(seen, others)] if others and len(seen) > 1 else []
        return cases

    def mixes(self, splits: int, seed: int) -> list[Case]:
        """Return halves that have half of each phase, each judged on the other one."""
        rng, phases, cases = np.random.default_rng(seed), self.phases, list[Case]()
        for _ in range(splits):
            order = rng.permutation(len(phases)).tolist()
            # What is the only one of its phase is shuffled with all others of that kind.
            order.sort(key=lambda n: phases[n] if phases.count(phases[n]) > 1 else "")
            halves = [tuple(sorted(order[part::2])) for part in range(2)]
            cases += [(halves[0], halves[1]), (halves[1], halves[0])]
        return cases


def read(path: Path) -> Profiles:
    """Read the profiles of a folder of load tables, or of one table by group or window."""
    loads: dict[str, NDArray[Any]] = {}
    if path.is_dir():
        for file in sorted(path.iterdir()):
            try:
                table = mt.open_input(file)
                assert isinstance(table, mt.RoutingStatistics), "must be a load table, got a trace"
                shape = table.total_load.shape
                first = next(iter(loads.values()), table.total_load).shape
                assert shape == first, f"must be {first} [layers, experts], got {shape}"
            except (ValueError, OSError, AssertionError) as error:
                print(f"{file.name} is left out: {error}")
                continue
            loads[file.stem] = table.total_load
    else:
        table = mt.open_input(path)
        if not isinstance(table, mt.RoutingStatistics):
            raise ValueError(f"{path}: must be a load table, got a trace")
        for window, load in enumerate(table.window_load):
            name = f"window {window}"
            if table.group is not None:
                name = table.group_names[table.group[window]]
            loads[name] = loads.get(name, 0) + load.astype(np.uint64)
    if not 2 <= len(loads) <= MOST:
        raise ValueError(f"{path}: must have 2 to {MOST} profiles, got {len(loads)}")
    together = mt.RoutingStatistics.from_load(np.stack([*loads.values()]))
    scaled = together.per_step(CHOICES, drawn=False).window_load.astype(np.int64)
    if len(scaled) < len(loads):
        raise ValueError(f"{path}: every profile must have a count above 0")
    return Profiles(tuple(loads), scaled)


@dataclass
class Placer:
    """Placements on so many devices with so many slots, each computed once."""

    load: NDArray[np.int64]
    devices: int
    slots: int
    seed: int = 0
    iterations: int | None = None
    results: dict[tuple[str, bool, tuple[int, ...]], mt.Result] = field(default_factory=dict)

    def result(self, method: str, seen: tuple[int, ...]) -> mt.Result:
        """Return the placement of some profiles by a method of `METHODS`."""
        name, windows = METHODS[method]
        windows = windows and len(seen) > 1
        key = (name, windows, seen)
        if key not in self.results:
            load = self.load[list(seen)]
            table = mt.RoutingStatistics.from_load(load if windows else load.sum(axis=0))
            problem = mt.Problem(
                table, mt.Topology(self.devices), slots_per_device=self.slots, objective="balance"
            )
            steps = self.iterations if name == "joint" else None
            self.results[key] = mt.solve(problem, cast(Any, name), seed=self.seed, iterations=steps)
        return self.results[key]

    def judged(self, method: str, case: Case) -> Floats:
        """Return the imbalance of every profile that is judged, the mean over layers."""
        slots = self.result(method, case[0]).placement.slots
        return imbalance(self.load[list(case[1])], slots).mean(axis=1)

    def oracle(self, judged: tuple[int, ...]) -> Floats:
        """Return the imbalance of what is judged under ours, computed from just that."""
        return min((self.judged(each, (judged, judged)) for each in OURS), key=np.mean)

    def bound(self, judged: tuple[int, ...]) -> float:
        """Return the imbalance that no placement is below on average, as it is proven."""
        return max(1.0, self.result("joint", judged).bound or 1.0)


def lost(slots: NDArray[Any], experts: int) -> NDArray[np.int64]:
    """Count the experts that have no copy left when a device of slots [L,D,S] is lost [L,D]."""
    has = np.stack(
        [[np.bincount(row[row >= 0], minlength=experts) > 0 for row in d] for d in slots]
    )
    return (has & (has.sum(axis=1, keepdims=True) == 1)).sum(axis=2)


def summary(values: Iterable[Floats]) -> tuple[float, float] | tuple[str, str]:
    """Return the mean and the worst of some figures; dashes where there are none."""
    parts = [*values]
    if not parts:
        return "-", "-"
    every = np.concatenate(parts)
    return float(every.mean()), float(every.max())


def sizes_of(experts: int, devices: int) -> list[int]:
    """Return slots of a device: for one copy of each expert, and one more than that."""
    return sorted({-(-experts // devices), experts // devices + 1})


def judge(placer: Placer, profiles: Profiles, mixes: list[Case], report: Report) -> dict[str, Any]:
    """Print the tables of one size; return mean and worst by column and method."""
    title = f"{placer.devices} ranks of {placer.slots} slots"
    figures: dict[str, Any] = {column: {} for column in (OWN, LENGTH, PHASE, ALL, MIX)}
    cases = profiles.cases()
    names = (f"{heading} 8.4f" for column in (OWN, LENGTH, PHASE) for heading in (column, "worst"))
    table = report.table(f"{title}: fitted to one recording, judged on", "placement <16", *names)
    for method in ONE:
        for column in (OWN, LENGTH, PHASE):
            figures[column][method] = summary(placer.judged(method, case) for case in cases[column])
        table(
            method, *(value for column in (OWN, LENGTH, PHASE) for value in figures[column][method])
        )
    table = report.table(
        f"{title}: fitted to several recordings",
        "placement <24",
        f"{ALL} 14.4f",
        "worst 8.4f",
        "mix 8.4f",
        "worst 8.4f",
        "mean of a split: median (quartiles) <30",
    )
    for method in METHODS:
        for column, chosen in ((ALL, cases[ALL]), (MIX, mixes)):
            figures[column][method] = summary(placer.judged(method, case) for case in chosen)
        means = [placer.judged(method, case).mean() for case in mixes]
        table(method, *figures[ALL][method], *figures[MIX][method], spread(means, 4))
    for column, chosen in ((ALL, cases[ALL]), (MIX, mixes)):
        figures[column]["oracle"] = summary(placer.oracle(case[1]) for case in chosen)
        bounds = [placer.bound(case[1]) for case in chosen]
        figures[column]["bound"] = (float(np.mean(bounds)) if bounds else "-", "-")
        own = {n: placer.oracle((n,)) for case in chosen for n in case[1]}
        figures[column]["each"] = summary(own[n] for case in chosen for n in case[1])
    for name, key in (
        ("saw what is judged", "oracle"),
        ("no placement is below", "bound"),
        ("one for each profile", "each"),
    ):
        table(name, *figures[ALL][key], *figures[MIX][key], "")
    return figures


def conclude(placer: Placer, figures: dict[str, Any], report: Report) -> None:
    """Say what the tables of one size amount to."""
    mix, phase = figures[MIX], figures[PHASE]
    text = ", ".join(
        f"{method} {mix[method][0]:.3f} and {mix[method][1]:.3f}" for method in ("EPLB", *OURS)
    )
    alone = [phase[method][0] for method in ("EPLB", *OURS) if phase[method][0] != "-"]
    other = f", {min(alone):.3f} to {max(alone):.3f} on average" if alone else ": none"
    report.say(
        f"{placer.devices} ranks of {placer.slots} slots, fitted to a mix and judged on the other "
        f"half, mean and worst: {text}; what saw the other half {mix['oracle'][0]:.3f} and "
        f"{mix['oracle'][1]:.3f}. Fitted to one recording and judged on another phase{other}."
    )


def losses(placers: list[Placer], case: Case, experts: int, report: Report) -> None:
    """Print what the loss of a rank takes, under placements of a mix."""
    table = report.table(
        "Losing one rank: is the last copy of an expert lost?",
        "ranks/slots <12",
        "placement <12",
        "copies in a layer 17.0f",
        "of ranks 9.1%",
        "of layers 9.1%",
        "experts lost in a layer 23.2f",
    )
    for placer in placers:
        for method in ONE:
            slots = placer.result(method, case[0]).placement.slots
            gone = lost(slots, experts)
            copies = (slots >= 0).sum() / len(slots) - experts
            row = ((gone.sum(axis=0) > 0).mean(), (gone > 0).mean(), gone.mean())
            table(f"{placer.devices}/{placer.devices * placer.slots}", method, copies, *row)


def draw(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw mean and worst by size, method and what is judged on; contiguous is far above."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot: it needs matplotlib (pip install matplotlib).")
        return
    names = {
        OWN: "itself",
        LENGTH: "another\nlength",
        PHASE: "the other\nphase",
        MIX: "the other half,\nfitted to a mix",
    }
    colours = {"EPLB": "#c44e52", "joint": "#4c72b0", "quick": "#55a868"}
    figure = Figure(figsize=(3.6 * len(figures), 3.8), layout="constrained")
    for panel, (title, profiles) in zip(
        np.atleast_1d(figure.subplots(1, len(figures), sharey=True)), figures.items(), strict=True
    ):
        columns = [column for column in names if profiles[column]["EPLB"][0] != "-"]
        for number, (method, colour) in enumerate(colours.items()):
            x = np.arange(len(columns)) + (number - 1) * 0.2
            mean, worst = zip(*(profiles[column][method] for column in columns), strict=True)
            panel.vlines(x, mean, worst, color=colour, linewidth=1.5, alpha=0.6)
            panel.plot(x, mean, "o", color=colour, markersize=6, label=method)
            panel.plot(x, worst, "_", color=colour, markersize=7)
        panel.set_xticks(range(len(columns)), [names[column] for column in columns], fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("max / mean load of ranks: mean (dot) to worst")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.supxlabel("judged on", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)


def main() -> None:
    """Print all tables."""
    options: dict[str, Any] = {"devices": [32, 72], "splits": 4, "seed": 0, "plot": Path}
    options["iterations"] = 0  # of joint, for a quick look; 0 is what `solve` takes
    with benchmark(__doc__, {"folder": Path}, **options) as (asked, report):
        try:
            profiles = read(asked.folder)
        except (ValueError, OSError) as error:
            print(f"{error}", file=sys.stderr)
            raise SystemExit(2) from None
        load, experts = profiles.load, profiles.load.shape[2]
        share = load / load.sum(axis=2, keepdims=True)
        far = np.abs(share[:, None] - share[None]).sum(axis=3).mean(axis=2) / 2
        kinds = report.table(
            f"{len(load)} profiles of {load.shape[1]} layers of {experts} experts",
            "profile <26",
            "phase <26",
            "length <26",
            "furthest from <26",
            "tokens apart 12.1%",
        )
        named = zip(profiles.names, profiles.phases, profiles.lengths, far, strict=True)
        for name, phase, length, figure in named:
            kinds(name, phase, length, profiles.names[int(figure.argmax())], figure.max())
        mixes = profiles.mixes(asked.splits, asked.seed)
        searched = (asked.seed, asked.iterations or None)
        placers, figures = [], {}
        for devices in asked.devices:
            for slots in sizes_of(experts, devices):
                placers.append(Placer(load, devices, slots, *searched))
                figures[f"{devices} ranks of {slots} slots"] = judge(
                    placers[-1], profiles, mixes, report
                )
        for placer, figure in zip(placers, figures.values(), strict=True):
            conclude(placer, figure, report)
        # As many slots as two copies of every expert take.
        twice = [
            Placer(load, devices, -(-2 * experts // devices), *searched)
            for devices in asked.devices
        ]
        losses([*placers, *twice], mixes[0], experts, report)
        if asked.plot:
            draw(figures, asked.plot)


if __name__ == "__main__":
    main()
