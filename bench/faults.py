"""Faults: damaged files, ten thousand rebalances, kill -9 and full disks while files are written.

    python bench/faults.py [fuzz soak kill disk] [--seconds 60] [--record]
    python bench/faults.py fuzz --seconds 600

*Fuzz*: valid files of every kind that is read, damaged (bits, bytes, splices, numbers, values of
JSON, members of archives), and random problems from the corners for `solve`; the targets are those
of the tests. Wanted: a result, or a ValueError or OSError of one line, within memory (4 GiB more
than the process has) and time; *findings* are all else: other errors, crashes, hangs. What was
found is printed with the file that shows it.

*Soak*: an engine's balancer decides again and again on loads that drift, as the engine calls it.
Wanted: memory at the end as after a tenth of the calls.

*Kill*: every function and command that writes is killed (SIGKILL) at random moments, half of them
while its temporary file is there. Wanted: the destination is the old file or the whole new one,
and what a killed process left behind is gone after the next run.

*Disk*: the same commands where files may not grow beyond random sizes (RLIMIT_FSIZE), and, as root,
on a small file system that is full. Wanted: one line on standard error, the old file as it was,
and no temporary file. What is mounted is unmounted at the end, also on Ctrl-C.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import HERE, Report, benchmark, imbalance, skewed_loads
from instances import routing
from scale import alone

import moetuner as mt
from moetuner.cli import main as command_line
from moetuner.files import TEMPORARY
from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log
from moetuner.plugins.recorder import LoadRecorder
from moetuner.plugins.settings import Settings

sys.path.append(str(HERE.parent / "tests" / "oracles"))


class Ended(NamedTuple):
    """How a forked process ended: its status (-9 for SIGKILL), its errors, and peak memory."""

    status: int
    said: str
    peak: float


def started(work: Callable[[], Any], most_bytes: int | None = None) -> tuple[int, int]:
    """Fork a process that does some work; return its number and a descriptor of its errors.

    Its files may not grow beyond so many bytes.
    """
    hears, says = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the package looks after
        pid = os.fork()
    if pid:
        os.close(says)
        return pid, hears
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(says, 2)
        faulthandler.disable()
        sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))  # noqa: SIM115
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        status = work() or 0
        sys.stderr.flush()
    finally:
        os._exit(status)


def ended(pid: int, hears: int) -> Ended:
    """Wait until a forked process has ended."""
    with os.fdopen(hears, "rb") as errors:
        said = errors.read().decode(errors="replace")
    _, status, usage = os.wait4(pid, 0)
    return Ended(os.waitstatus_to_exitcode(status), said, usage.ru_maxrss / 1024)


# --- fuzz

CASES, HANG, MEMORY = 50, 60.0, 4 << 30


def some_cases(name: str, target: Any, path: Path, valid: dict[str, bytes], seed: str) -> None:
    """Try damaged files of a target in this process, and print findings as errors."""
    from targets import check_solve, complaint, damaged

    rng, others, readable = random.Random(seed), [*valid.values()], 0
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    for number in range(CASES if target else CASES // 10):
        if target is None:
            case, found = (
                f"random.Random({seed!r}), problem {number}".encode(),
                check_solve(rng, timed=True),
            )
        else:
            case = damaged(valid[name], rng, others)
            path.write_bytes(case)
            found = complaint(target, path)
        readable += found is None
        if found is not None:
            print(json.dumps([found, case.hex()]), file=sys.stderr, flush=True)


def watched(work: Callable[[], None]) -> tuple[list[list[str]], float]:
    """Do some work in a fork, and return what it found: also that it crashed, or did not end."""
    pid, hears = started(work)
    timer = signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        status, said, peak = ended(pid, hears)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, timer)
    found = [json.loads(line) for line in said.splitlines() if line.startswith('["')]
    if status:
        words = said.strip().splitlines()[-1:] or [""]
        ending = f"no end after {HANG:.0f} s" if status == -signal.SIGKILL else f"status {status}"
        found.append([f"{ending}: {words[0]:.200}", ""])
    return found, peak


def fuzz(report: Report, asked: Any) -> None:
    """Print cases and findings of every target."""
    try:
        from targets import folder_for_targets, targets
    except ImportError as error:
        report.say(f"Nothing is fuzzed: {error} (pip install --group test).")
        return
    row = report.table(
        f"Fuzz, {asked.seconds:.0f} s",
        "target <42",
        "cases 8d",
        "findings 9d",
        "peak, MiB 10.0f",
    )
    with tempfile.TemporaryDirectory() as made:
        path, everything = folder_for_targets(Path(made)), {**targets(), "solve": None}
        valid = {}
        for name, target in everything.items():
            if target is not None:
                target.make(path)
                valid[name] = path.read_bytes()
        counts = {name: [0, 0, 0.0] for name in everything}
        kinds: dict[str, tuple[str, bytes]] = {}
        until, turn = time.monotonic() + asked.seconds, 0
        while time.monotonic() < until:
            for name, target in everything.items():
                seed = f"{asked.seed}-{turn}-{name}"
                found, peak = watched(
                    lambda name=name, target=target, seed=seed: some_cases(
                        name, target, path, valid, seed
                    )
                )
                counts[name][0] += CASES if target else CASES // 10
                counts[name][1] += len(found)
                counts[name][2] = max(counts[name][2], peak)
                for text, case in found:
                    content = bytes.fromhex(case) or path.read_bytes()
                    kinds.setdefault(f"{name}: {text[-120:]}", (text, content))
                if time.monotonic() > until and turn:
                    break
            turn += 1
    for name, (cases, findings, peak) in counts.items():
        row(name, cases, findings, peak)
    total = [sum(tally[at] for tally in counts.values()) for at in range(2)]
    row("all", *total, max(tally[2] for tally in counts.values()))
    for number, (kind, (text, content)) in enumerate(kinds.items()):
        saved = Path(tempfile.gettempdir()) / f"moetuner-finding-{number}"
        saved.write_bytes(content)
        report.say(f"Finding of {kind.split(':')[0]}, in {saved.name}: {text}")
    report.say(f"{total[0]} cases, {len(kinds)} kinds of findings (wanted: 0).")


# --- soak

LAYERS, EXPERTS, SLOTS, RANKS = 26, 64, 80, 8


def resident() -> int:
    """Return the memory that this process has, in KiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


def soaked(calls: int, drift: float = 0.05) -> dict[str, Any]:
    """Let a balancer decide on loads that drift, and return times, memory and balance."""
    rng = np.random.default_rng(0)
    spread = rng.normal(0, 0.8, (LAYERS, EXPERTS))
    slots = np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1))
    initial, milliseconds, imbalances, copies = slots, [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.from_environment({"MOETUNER_REBALANCE": "1", "MOETUNER_RECORD": folder})
        balancer = Balancer(settings, Log(logging.getLogger("soak")))
        memory = {}
        for call in range(calls):
            share = np.exp(spread)
            load = rng.poisson(65536 * share / share.sum(axis=1, keepdims=True)).astype(np.int64)
            if call % max(calls // 100, 1) == 0:
                maps = (table.reshape(LAYERS, RANKS, -1) for table in (initial, slots))
                imbalances.append([imbalance(load[None], table).mean() for table in maps])
            begin = time.perf_counter()
            balancer.record(load)
            answer = balancer.decide(load, SLOTS, None, 1, RANKS, slots)
            milliseconds.append(1e3 * (time.perf_counter() - begin))
            assert answer is not None
            copies += int((answer != slots).sum())
            slots = answer
            spread = np.sqrt(1 - drift**2) * spread + drift * rng.normal(0, 0.8, spread.shape)
            if call % 50 == 49:
                balancer.flush()
            if call + 1 in (calls // 10, calls):
                balancer.flush()
                memory[call + 1] = resident()
        recorded = mt.RoutingStatistics.load(next(Path(folder).glob("*.npz")))
    return {
        "milliseconds": np.percentile(milliseconds, (50, 95, 99, 100)).tolist(),
        "memory": memory,
        "imbalance": np.mean(imbalances, axis=0).tolist(),
        "copies": copies / calls,
        "recorded": recorded.windows,
    }


def soak(report: Report, asked: Any) -> None:
    """Print what so many decisions took, and what memory they left."""
    outcome = alone(soaked, asked.calls).result
    (early, before), (late, after) = outcome["memory"].items()
    row = report.table(
        f"{late} rebalances, {LAYERS} layers x {EXPERTS} experts in {SLOTS} slots on {RANKS} ranks",
        "ms, median 10.2f",
        "95 % 8.2f",
        "99 % 8.2f",
        "most 8.2f",
        f"MiB after {early} 16.1f",
        "at the end 10.1f",
        "growth, KiB 11d",
        "imbalance, initial map 22.3f",
        "map in force 12.3f",
        "copies a call 13.1f",
    )
    figures = *outcome["imbalance"], outcome["copies"]
    row(*outcome["milliseconds"], before / 1024, after / 1024, after - before, *figures)


# --- kill and disk


class Writes(NamedTuple):
    """Something that writes files of these names into a folder."""

    name: str
    act: Callable[[Path], Any]
    files: tuple[str, ...]
    repeats: bool = False


def repeated(writes: Writes, out: Path) -> Any:
    """Write once; what takes milliseconds is written again and again until a kill."""
    while writes.repeats:
        writes.act(out)
    return writes.act(out)


def made(folder: Path) -> Path:
    """Make what commands read, and return its folder."""
    trace = routing(6, 16, 2, tokens=20_000, skew=0.6)
    ids, sequence = trace.expert_ids[:], np.arange(20_000) // 100
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=16, sequence=sequence)
    trace.save(folder / "t.safetensors")
    problem = mt.Problem(trace, mt.Topology(4))
    for name, method in (("p.json", "lpt"), ("q.json", "contiguous")):
        mt.solve(problem, method).placement.save(folder / name)
    small = "".join(f"{n},{min(n, 16)},{20 + min(n, 16)}\n" for n in (1, 2, 4, 8, 16, 32))
    many = "".join(f"{n},16,{n / 64:g}\n" for n in (4096, 8192, 16384, 32768))
    (folder / "times.csv").write_text("tokens,experts,us\n" + small + many)
    return folder


def commands(inputs: Path) -> list[Writes]:
    """Return every command that writes, as it is called."""
    lines = {
        "solve": "solve {i}/t.safetensors --devices 4 --objective traffic --regime follow "
        "--out {o}/p.json --certificate {o}/c.json --json {o}/s.json",
        "solve, page": "solve {i}/t.safetensors --devices 4 --method lpt --out {o}/p.json "
        "--report {o}/r.html",
        "advise": "advise {i}/t.safetensors --devices 4 --time-limit 0.1 --report {o}/r.html "
        "--json {o}/a.json",
        "evaluate, page": "evaluate {i}/p.json {i}/t.safetensors --report {o}/r.html",
        "convert": "convert {i}/t.safetensors --out {o}/t.safetensors",
        "fit": "fit --times {i}/times.csv --hidden 64 --out {o}/m.json",
        "moves": "export {i}/p.json --initial {i}/q.json --to moves --out {o}/m.json",
        "inspect": "inspect {i}/t.safetensors --json {o}/s.json",
        "evaluate": "evaluate {i}/p.json {i}/t.safetensors --json {o}/s.json",
        "inspect, moves": "inspect {i}/q.json {i}/p.json --json {o}/d.json",
    }
    ends = {"eplb": "npz", "sglang": "json", "tensorrt-llm": "yaml"}
    for form, end in {**ends, "json": "json", "vllm-ascend": "json"}.items():
        dense = "--dense-layers none " if form in ("sglang", "tensorrt-llm") else ""
        line = f"export {{i}}/p.json --to {form} {dense}--out {{o}}/map.{end}"
        lines[f"export, {form}"] = line

    def run(line: str, out: Path) -> Any:
        return command_line(line.format(i=inputs, o=out).split())

    return [
        Writes(
            name,
            lambda out, line=line: run(line, out),
            tuple(word[4:] for word in line.split() if word.startswith("{o}/")),
        )
        for name, line in lines.items()
    ]


def functions(inputs: Path) -> list[Writes]:
    """Return functions of the package that write, each on its own."""
    trace = mt.RoutingTrace.load(inputs / "t.safetensors")
    statistics = mt.RoutingStatistics.from_trace(trace, window=64, sets=True)
    problem = mt.Problem(statistics, mt.Topology(4), regime="follow", max_imbalance=1.5)
    result = mt.solve(problem, iterations=50)
    load, recorders = skewed_loads(26, 64, 0), dict[int, LoadRecorder]()

    def record(out: Path) -> None:
        # A process has one recorder, and writes one file.
        recorders.setdefault(os.getpid(), LoadRecorder(out)).add(load)

    proof, model = result.certificate, mt.CostModel.preset("h100")
    acts: dict[str, tuple[Callable[[Path], Any], str]] = {
        "RoutingTrace.save": (lambda out: trace.save(out / "t.safetensors"), "t.safetensors"),
        "RoutingStatistics.save": (lambda out: statistics.save(out / "s"), "s"),
        "Placement.save": (lambda out: result.placement.save(out / "p.json"), "p.json"),
        "CostModel.save": (lambda out: model.save(out / "m"), "m"),
        "Certificate.save": (lambda out: proof is None or proof.save(out / "c"), "c"),
    }
    writes = [Writes(name, act, (file,), True) for name, (act, file) in acts.items()]
    return [*writes, Writes("LoadRecorder.add", record, (), True)]


OLD = b"old\n"
# A line on how far a command is, which comes on slow machines.
PROGRESS = re.compile(r"moetuner: (?!error: ).*: \d+ (s|%).*$")


def whole(path: Path) -> bool:
    """Return whether a file is the old one, or a whole new one by its own format."""
    content = path.read_bytes()
    if content == OLD:
        return True
    try:
        if path.suffix == ".html":
            return content.rstrip().endswith(b"</html>")
        if content[:1] in (b"{", b"["):
            return bool(json.loads(content))
        if content[:2] == b"PK" or content.startswith(b"\x93NUMPY"):
            loaded = np.load(path)
            return (
                loaded.size > 0
                if isinstance(loaded, np.ndarray)
                else all(map(len, loaded.values()))
            )
        if path.suffix in (".yaml", ".yml"):
            return mt.read_placement(path, devices=4, dense_layers=()).layers == 6
        header = int.from_bytes(content[:8], "little")
        ends = json.loads(content[8 : 8 + header]).items()
        last = max(tensor["data_offsets"][1] for name, tensor in ends if name != "__metadata__")
        return len(content) == 8 + header + last
    except (ValueError, KeyError, OSError):
        return False


def temporaries(folder: Path) -> list[Path]:
    """Return the temporary files in a folder."""
    return [path for path in folder.iterdir() if path.name.endswith(TEMPORARY)]


def renewed(folder: Path, writes: Writes) -> None:
    """Put old files where new ones will be written."""
    for path in folder.iterdir():
        path.unlink()
    for name in writes.files:
        (folder / name).write_bytes(OLD)


def broken(folder: Path) -> int:
    """Count files that are neither old nor whole."""
    return sum(not whole(path) for path in folder.iterdir() if not path.name.endswith(TEMPORARY))


def kill(report: Report, asked: Any) -> None:
    """Print what SIGKILL left behind of everything that writes."""
    row = report.table(
        f"kill -9: {asked.kills} times each command, {5 * asked.kills} times each function",
        "what <24",
        "killed 7d",
        "writing 8d",
        "old 6d",
        "new 6d",
        "broken 7d",
        "left over 9d",
    )
    rng, totals = random.Random(asked.seed), np.zeros(6, int)
    with tempfile.TemporaryDirectory() as folder:
        inputs, out = made(Path(folder)), Path(folder) / "out"
        out.mkdir()
        for writes in (*functions(inputs), *commands(inputs)):
            begin = time.perf_counter()
            first = ended(*started(lambda writer=writes: writer.act(out)))
            seconds = time.perf_counter() - begin
            if first.status:
                raise SystemExit(f"{writes.name}: {first.said}")
            counts = np.zeros(6, int)
            for number in range(asked.kills * (5 if writes.repeats else 1)):
                renewed(out, writes)
                pid, hears = started(lambda writer=writes: repeated(writer, out))
                wait(out, seconds, rng, writing=number % 2 == 1)
                writing = bool(temporaries(out))
                os.kill(pid, signal.SIGKILL)
                done = ended(pid, hears)
                old = sum((out / name).read_bytes() == OLD for name in writes.files)
                new = sum(not path.name.endswith(TEMPORARY) for path in out.iterdir()) - old
                bad = broken(out)
                counts += [done.status == -signal.SIGKILL, writing, old, new - bad, bad, 0]
            last = ended(*started(lambda writer=writes: writer.act(out)))
            counts[5] = len(temporaries(out)) + (last.status != 0)
            row(writes.name, *counts.tolist())
            totals += counts
    row("all", *totals.tolist())
    report.say(
        f"{totals[0]} processes were killed, {totals[1]} of them with a temporary file open: "
        f"{totals[4]} files are broken (wanted: 0), {totals[5]} left over after the next run."
    )


def wait(out: Path, seconds: float, rng: random.Random, *, writing: bool) -> None:
    """Wait for a random part of the time that something takes, or until it writes."""
    longest = 3 * seconds + 1 if writing else rng.random() * max(seconds, 0.05)
    until = time.perf_counter() + longest
    while time.perf_counter() < until:
        if writing and temporaries(out):
            # A temporary file lives for some milliseconds.
            until = min(until, time.perf_counter() + rng.random() * 0.005)
            writing = False


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a file system of so many bytes, where this user may; unmount it in the end."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def filled(out: Path, writes: Writes, full: str, room: int) -> Ended:
    """Do something where there is room for so many bytes more."""
    if full == "limit":
        return ended(*started(lambda: writes.act(out), room))
    free = os.statvfs(out)
    filler = out.parent / "filler"
    filler.write_bytes(bytes(max(free.f_bavail * free.f_frsize - room, 0)))
    return ended(*started(lambda: writes.act(out)))


def disk(report: Report, asked: Any) -> None:
    """Print how everything that writes ends where the disk is full."""
    row = report.table(
        f"Full disks, {asked.fills} times each",
        "what <24",
        "how <8",
        "refused 8d",
        "fit 5d",
        "not one line 12d",
        "broken 7d",
        "temporary 9d",
    )
    rng, totals = random.Random(asked.seed), np.zeros(5, int)
    with tempfile.TemporaryDirectory() as folder:
        inputs, mounted = made(Path(folder)), Path(folder) / "disk"
        mounted.mkdir()
        with small_disk(mounted, 64 << 20) as is_mounted:
            if not is_mounted:
                report.say("No file system is mounted (needs root): sizes of files are limited.")
            for writes in commands(inputs):
                for full in ("limit", "tmpfs") if is_mounted else ("limit",):
                    out = mounted / "out" if full == "tmpfs" else Path(folder) / "out"
                    out.mkdir(exist_ok=True)
                    renewed(out, writes)
                    assert (
                        ended(*started(lambda writer=writes, out=out: writer.act(out))).status == 0
                    )
                    largest = max((out / name).stat().st_size for name in writes.files)
                    counts = np.zeros(5, int)
                    for _ in range(asked.fills):
                        (mounted / "filler").unlink(missing_ok=True)
                        renewed(out, writes)
                        done = filled(out, writes, full, rng.randrange(largest))
                        lines = [
                            line for line in done.said.splitlines() if not PROGRESS.match(line)
                        ]
                        is_line = len(lines) == 1 and lines[0].startswith("moetuner: error: ")
                        refused = done.status == 2
                        unlike = not (refused and is_line) and (done.status != 0 or bool(lines))
                        bad, left = broken(out), len(temporaries(out))
                        counts += [refused, done.status == 0, unlike, bad, left]
                        if unlike:
                            print(f"{writes.name}: status {done.status}: {done.said:.500}")
                    row(writes.name, full, *counts.tolist())
                    totals += counts
            (mounted / "filler").unlink(missing_ok=True)
    row("all", "", *totals.tolist())
    report.say(
        f"{totals[0]} writes had no room: {totals[2]} did not say so in one line, {totals[3]} "
        f"broke a file and {totals[4]} left a temporary one (wanted: 0 of each)."
    )


def main() -> None:
    """Print the tables that were asked for."""
    # As Ctrl-C, so that nothing stays mounted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parts = {"fuzz": fuzz, "soak": soak, "kill": kill, "disk": disk}
    options = {"seconds": 60.0, "seed": 0, "calls": 10_000, "kills": 8, "fills": 6}
    with benchmark(__doc__, {"parts": list(parts)}, **options) as (asked, report):
        for name, part in parts.items():
            if name in asked.parts:
                part(report, asked)


if __name__ == "__main__":
    main()
