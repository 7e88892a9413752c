"""What benchmarks share: arguments, clocks, tables, records of runs, and skewed loads.

A run with ``--record`` keeps its tables in bench/results, with its command, machine, commit and
date, where nothing differs from that commit; `python bench/harness.py` writes the headlines of all
of them into bench/RESULTS.md, and `python bench/measured.py` their figures into README.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

HERE = Path(__file__).parent
RECORDS, RESULTS = HERE / "results", HERE / "RESULTS.md"
# Packages whose version a figure may depend on.
PACKAGES = (
    *("numpy", "torch", "highspy", "simgrid", "mtkahypar", "numba", "ortools", "vllm", "sglang"),
)

# What RESULTS.md shows of a record: words of a table's title or of a sentence, and a cell that a
# table's rows must have, or none. A record that is not named here is shown whole.
HEADLINES: dict[str, dict[str, str]] = {
    "cluster": {
        "gpt-oss-20b 24 x 32, dispatch: % of a step saved": "",
        "gpt-oss-20b 24 x 32, follow: % of a step saved": "",
        "The paper's table": "joint",
        "ratios to contiguous": "",
        "Joint saves at most": "",
    },
    "deepseek": {"32 ranks of 9 slots": "", "72 ranks of 4 slots, fitted": ""},
    "faults": {
        "kinds of findings": "",
        "10000 rebalances": "",
        "processes were killed": "",
        "writes had no room": "",
    },
    "gpu-times": {"Mean error": "", "Preset": ""},
    "judge_traffic": {"32 devices, 8192 tokens, RDMA": "", "RDMA:": "", "default:": ""},
    "phases": {"gpt-oss-20b gains": "", "machines and numbers of slots": ""},
    "scale-transitions-text-replay-axes-limits": {
        "Transitions": "",
        "Text of": "",
        "Replay of a placement": "1",
        "Solve for": "largest",
        "Slopes of the logarithms": "",
        "Solves under a limit": "*",
    },
    "versus": {
        "Ours against the best": "",
        "after so many seconds": "",
        "Sequences of rebalances": "vLLM",
        "Deciding": "",
        "Proven": "",
    },
    "versus-few": {"Sequences of few layers": "STAIR", "Of few layers": ""},
}


def arguments(doc: str, positional: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Parse the command line by defaults.

    Parameters
    ----------
    doc
        What ``--help`` prints.
    positional, options
        By name. A type is that of a value without a default, a tuple the choices, a list the
        default of several values, False a flag; any other value is a default.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = [(name, kind, {}) for name, kind in (positional or {}).items()]
    named += [(f"--{name.replace('_', '-')}", kind, {}) for name, kind in options.items()]
    for name, kind, keywords in named:
        if isinstance(kind, type):
            keywords |= {"type": kind}
        elif isinstance(kind, tuple):
            keywords |= {"choices": kind}
        elif isinstance(kind, list):
            keywords |= {"nargs": "*", "default": kind, "type": type(kind[0]) if kind else str}
        elif isinstance(kind, bool):
            keywords |= {"action": "store_true"}
        else:
            keywords |= {
                "default": kind,
                "type": type(kind) if not isinstance(kind, Path) else Path,
            }
        parser.add_argument(name, **keywords)
    return parser.parse_args()


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """Return the result of some work, its seconds by the clock, and those of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - processor


def in_turns(
    works: Mapping[str, Callable[[], object]], repeat: int, *, processor: bool = False
) -> dict[str, list[float]]:
    """Return the seconds of works that take turns, so that a slow machine slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            seconds[name].append(timed(work)[1 + processor])
    return seconds


class Table:
    """Rows of aligned columns, printed as they come and kept.

    Parameters
    ----------
    columns
        Each a name and a format, such as ``"imbalance 9.4f"``: numbers stand on the right, and a
        format that begins with ``<`` is of words.
    title
        Of the table, printed above it.
    """

    def __init__(self, *columns: str, title: str = "") -> None:
        names, self.formats = zip(*(column.rsplit(" ", 1) for column in columns), strict=True)
        self.title, self.rows = title, list[list[str]]()
        if title:
            print(f"\n{title}")
        self(*names)

    def __call__(self, *values: Any) -> None:
        """Print a row; words may stand in columns of numbers."""
        cells = []
        for value, spec in zip(values, self.formats, strict=False):
            width = spec.lstrip("<").split(".")[0].rstrip("dfs%")
            words = f"{'<' if spec.startswith('<') else '>'}{width}"
            cells.append(format(value, words if isinstance(value, str) else spec))
        print(*cells, flush=True)
        self.rows.append([cell.strip() for cell in cells])

    def markdown(self) -> str:
        """Return the table as Markdown."""
        names, *rows = self.rows
        bar = ["---" if spec.startswith("<") else "---:" for spec in self.formats]
        lines = [f"| {' | '.join(row)} |" for row in (names, bar, *rows)]
        return "\n".join([*([f"**{self.title}**", ""] if self.title else []), *lines])


def spread(values: Any, digits: int = 1) -> str:
    """Return the median of some figures and, in brackets, their quartiles."""
    low, middle, high = np.percentile(np.asarray(values, float), (25, 50, 75))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


class Report:
    """Tables and sentences of a run, in the order in which they were printed."""

    def __init__(self) -> None:
        self.parts: list[Table | str] = []

    def table(self, title: str, *columns: str) -> Table:
        """Begin a table."""
        table = Table(*columns, title=title)
        self.parts.append(table)
        return table

    def say(self, sentence: str) -> None:
        """Print a sentence, with figures of this run."""
        print(f"\n{sentence}", flush=True)
        self.parts.append(sentence)

    def markdown(self) -> str:
        """Return all parts as Markdown."""
        parts = (part if isinstance(part, str) else part.markdown() for part in self.parts)
        return "\n\n".join(parts)


def machine() -> str:
    """Return processor, memory, system and versions in a line."""
    model = platform.processor() or platform.machine()
    memory = 0.0
    if Path("/proc/cpuinfo").exists():
        named = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
        model = named[0].split(":")[1].strip() if named else model
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    there = []
    for package in PACKAGES:
        try:
            there.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    size = f"{os.cpu_count()} cores" + (f", {memory:.0f} GiB" if memory else "")
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    python = f"Python {platform.python_version()}"
    return ", ".join([model, size, system, python, *there])


def commit() -> str:
    """Return the commit that runs; end the program where files differ from it.

    What the records themselves are written to may differ.
    """
    git = ["git", "-C", str(HERE)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    written = (":!results", ":!RESULTS.md", ":!../README.md")
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "..", *written], capture_output=True, text=True
    )
    if head.returncode or changed.stdout:
        files = changed.stdout.split("\n")[0] or "no repository"
        print(f"--record needs a commit that has what runs: {files.strip()}", file=sys.stderr)
        raise SystemExit(2)
    return head.stdout.strip()


@contextmanager
def benchmark(
    doc: str, positional: Mapping[str, Any] | None = None, **options: Any
) -> Iterator[tuple[Any, Report]]:
    """Parse the command line of a benchmark and give a report; keep it at the end of a whole run.

    Parameters
    ----------
    doc, positional, options
        As `arguments` has them; the first line of ``doc`` is the title.
    """
    asked, report = arguments(doc, positional, record=False, **options), Report()
    # Files may change while it runs.
    ran = commit() if asked.record else ""
    began, load = time.perf_counter(), os.getloadavg()[0]
    yield asked, report
    if not asked.record:
        return
    title, _, description = doc.strip().partition("\n")
    script = Path(sys.argv[0]).resolve().relative_to(HERE.parent)
    # Folders are the reader's own: their names tell enough.
    words = [word.rstrip("/").rsplit("/", 1)[-1] for word in sys.argv[1:] if word != "--record"]
    record = {
        "title": title.rstrip("."),
        "about": "\n\n".join(
            part for part in description.strip("\n").split("\n\n") if part[:1] != " "
        ),
        "command": " ".join(["python", str(script), *words]),
        "machine": machine(),
        "load": round(load, 1),
        "commit": ran,
        "date": date.today().isoformat(),
        "seconds": round(time.perf_counter() - began),
        "results": report.markdown(),
    }
    RECORDS.mkdir(exist_ok=True)
    # A run of some parts is a record of its own; files are not parts.
    lists = {key: kind for key, kind in (positional or {}).items() if isinstance(kind, list)}
    chosen = [vars(asked)[key] for key, kind in lists.items() if vars(asked)[key] != kind]
    parts = [part for values in chosen for part in values if isinstance(part, str)]
    name = "-".join([*script.with_suffix("").parts[1:], *parts])
    (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    RESULTS.write_text(written())


def written() -> str:
    """Return the text of RESULTS.md: of every record its headlines, a screen for each question."""
    sections = [
        "# Results",
        "Each section has the headlines of one command, with its commit, machine and date;\n"
        "its record in `bench/results` has all tables and says how they were made.\n"
        "`python bench/harness.py` writes this file from the records; nobody edits it.\n"
        "[What was tried](../docs/experiments.md) says why constants are what they are.",
    ]
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text())
        ran = (
            f"`{record['command']}`: {record['seconds']} s on {record['date']}, commit "
            f"{record['commit']}; {record['machine']}; load {record['load']} when it began."
        )
        first = record["about"].split("\n\n")[0]
        # Parts of one benchmark that ran apart are explained once.
        summary = first if first not in sections else ""
        parts = parts_of(record["results"])
        headlines = HEADLINES.get(path.stem, {"": ""})
        shown = [
            shortened(part, cell)
            for part in parts
            for words, cell in headlines.items()
            if words in part.splitlines()[0]
        ]
        tables = sum(part.startswith("**") for part in parts)
        link = f"Tables in [the record](../bench/results/{path.name}): {tables}."
        sections += [f"## {record['title']}", ran, summary, *shown, link]
    return "\n\n".join(section for section in sections if section) + "\n"


def parts_of(results: str) -> list[str]:
    """Split the Markdown of a record into sentences, and tables with their titles."""
    parts: list[str] = []
    for block in results.split("\n\n"):
        if block.startswith("|"):
            parts[-1] += f"\n\n{block}"
        else:
            parts.append(block)
    return parts


def shortened(part: str, cell: str) -> str:
    """Return a part of a record; of a table only the rows that have the cell, if there is one."""
    title, _, table = part.partition("\n\n")
    if not cell or not table:
        return part
    names, bar, *rows = table.splitlines()
    chosen = [row for row in rows if cell in (words.strip() for words in row.split("|"))]
    return "\n".join([f"{title} (rows: {cell})", "", names, bar, *chosen])


def skewed_loads(layers: int, experts: int, seed: int) -> NDArray[np.float64]:
    """Return log-normal loads [L,E], drawn anew for every layer: the heaviest tenth has a third."""
    popularity = np.random.default_rng(seed).lognormal(0, 0.8, (layers, experts))
    return np.floor(1e6 * popularity / popularity.sum(axis=1, keepdims=True))


def device_loads(load: NDArray[Any], slots: NDArray[Any]) -> NDArray[np.float64]:
    """Return loads of devices [W,L,D], of windows [W,L,E] and slots [L,D,S]; -1 is empty.

    Copies take equal parts, also several on a device, as some peers place them.
    """
    devices = []
    for layer, rows in enumerate(slots):
        copies = np.stack([np.bincount(row[row >= 0], minlength=load.shape[2]) for row in rows])
        assert copies.sum(axis=0).min() > 0
        devices.append(load[:, layer] @ (copies / copies.sum(axis=0)).T)
    return np.stack(devices, axis=1)


def imbalance(load: NDArray[Any], slots: NDArray[Any]) -> NDArray[np.float64]:
    """Return max / mean load of devices [W,L], of windows [W,L,E] and slots [L,D,S]."""
    device = device_loads(load, slots)
    ratios: NDArray[np.float64] = device.max(axis=2) / device.mean(axis=2)
    return ratios


def list_old_commands() -> list[str]:
    """List the commands whose records are older than the last change of what they measure.

    That is the core, the package, and the benchmark itself.
    """
    git, commands = ["git", "-C", str(HERE.parent)], []
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text())
        script = record["command"].split()[1]
        measured = ("rust", "python/moetuner", script)
        changes = subprocess.run(
            [*git, "diff", "--quiet", record["commit"], "--", *measured], capture_output=True
        )
        if changes.returncode:
            commands.append(f"{record['command']} --record")
    return commands


if __name__ == "__main__":
    RESULTS.write_text(written())
    old = list_old_commands()
    print(f"{len(old)} records are older than the last change of what they measure:")
    print("\n".join(old))
