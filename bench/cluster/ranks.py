"""The processes of all ranks, what they run, what their stamps tell, and a cost model of it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from network import Network, own_prefix, postponed, undisturbed
from numpy.typing import NDArray

import moetuner as mt
from moetuner.cost import busiest_ports

Floats = NDArray[np.float64]
# Seconds that a rank's experts take for each second of a core.
PACE = 5.0
# Seconds in which a rank whose peer is gone ends.
ENDS = 5.0


@dataclass(frozen=True)
class Work:
    """Layers to run.

    Parameters
    ----------
    name
        Of the model.
    regime
        How tokens move.
    seen, unseen
        The halves of its sequences.
    tokens
        Of a step.
    hidden, inner
        Sizes of an expert.
    """

    name: str
    regime: str
    seen: mt.RoutingTrace
    unseen: mt.RoutingTrace
    tokens: int
    hidden: int
    inner: int

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a row on its way out, with slots and weights or its number, and back."""
        row = 4 * self.hidden
        return (row + 4, 0) if self.regime == "follow" else (row + 8 * self.seen.top_k, row)

    def steps(self, trace: mt.RoutingTrace, tokens: int, count: int) -> NDArray[Any]:
        """Return experts of some steps, evenly spread over a half [W,T,L,K]."""
        ids = trace.expert_ids
        starts = np.linspace(0, len(ids) - tokens, count).astype(int)
        return np.stack([ids[start : start + tokens] for start in starts])

    def trace(self, ids: NDArray[Any]) -> mt.RoutingTrace:
        """Return a step [T,L,K] as a trace."""
        return mt.RoutingTrace.from_arrays(ids, num_experts=self.seen.num_experts)

    def load(self, placement: mt.Placement, steps: NDArray[Any]) -> NDArray[np.int64]:
        """Count tokens, once per expert, of every rank in each step [W,L,D]."""
        at = placement.device_of[np.arange(placement.layers)[:, None], steps]
        return (at[..., None] == np.arange(placement.devices)).sum(axis=(1, 3))

    def ports(self, placement: mt.Placement, steps: NDArray[Any], topology: mt.Topology) -> Floats:
        """Compute bytes there and back at the busiest port of each tier, of steps [W,L,2]."""
        return busiest_ports(self.rows(placement, steps), topology) * sum(self.row_bytes)

    def rows(self, placement: mt.Placement, steps: NDArray[Any]) -> NDArray[np.int64]:
        """Count rows from rank to rank in each step [W,L,D,D], where tokens have homes in turns."""
        home = np.arange(steps.shape[1]) % placement.devices
        tables = []
        for ids in steps:
            trace = self.trace(ids)
            if self.regime == "follow":
                pairs = mt.evaluate(placement, trace, mixed=False).traffic["follow"]
                tables.append(np.concatenate([pairs, np.zeros_like(pairs[:1])]))
            else:
                tables.append(mt.dispatch_rows(placement, trace, home))
        rows = np.stack(tables).astype(np.int64)
        own = np.arange(placement.devices)
        rows[..., own, own] = 0
        return rows


@dataclass(frozen=True)
class Times:
    """Milliseconds of steps, placements and layers [W,P,L], as `__main__` explains them."""

    processing: Floats
    exchange: Floats
    exchange_mean: Floats
    layer: Floats

    @classmethod
    def of(cls, stamps: list[dict[str, Any]]) -> Times:
        """Compute times of all ranks' stamps."""
        exchanges, computed, ends = (
            1e3 * np.stack([stamp[name] for stamp in stamps])
            for name in ("exchanges", "computed", "ends")
        )
        # Nobody leaves an exchange before the last has come, but where nothing is exchanged.
        spans = np.maximum(exchanges[..., 1] - exchanges[..., 0].max(axis=0), 0)
        return cls(
            (computed[..., 1] - computed[..., 0]).max(axis=0),
            spans.max(axis=0).sum(axis=-1),
            spans.mean(axis=0).sum(axis=-1),
            np.diff(ends.max(axis=0), axis=-1),
        )


def typical(times: Floats) -> Floats:
    """Return the mean over layers of the medians over steps [W,P,L], for each placement [P]."""
    return np.median(times, axis=0).mean(axis=-1)


class Rank:
    """The process of one rank.

    Parameters
    ----------
    stdin, stdout
        For tasks, and for what it says once one is done.

    Attributes
    ----------
    number
        Of the process; 0 before the first task.
    returncode
        With which it has ended; None as long as that is not known.
    """

    def __init__(self, stdin: TextIO, stdout: TextIO) -> None:
        self.stdin, self.stdout = stdin, stdout
        self.number = 0
        self.returncode: int | None = None

    def kill(self) -> None:
        """Kill it; of one that has ended nothing is left to kill."""
        with suppress(ProcessLookupError):
            os.kill(self.number, signal.SIGKILL)


class Ranks:
    """The processes of all ranks.

    Parameters
    ----------
    network
        Where they run.
    folder
        For what they are given and answer.
    """

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder, self.processes = network, folder, list[Rank]()
        self._parent: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start every rank: forks of one process, which imports once what takes seconds."""
        environment = {"GLOO_SOCKET_IFNAME": self.network.interface, "OMP_NUM_THREADS": "1"}
        worker = [sys.executable, str(Path(__file__).with_name("worker.py"))]
        pipes = [(*os.pipe(), *os.pipe()) for _ in range(self.network.ranks)]
        theirs = [(tasks, answers) for tasks, _, _, answers in pipes]
        words = [f"{pair[0]},{pair[1]},{self.network.space(n)}" for n, pair in enumerate(theirs)]
        # A signal within would leave a process that nobody knows.
        with postponed():
            self._parent = subprocess.Popen(
                [*worker, str(self.folder), str(PACE), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                bufsize=0,  # no line is read before it is waited for
                env=os.environ | environment,
                pass_fds=[end for pair in theirs for end in pair],
                start_new_session=True,  # Ctrl-C is for the benchmark, which ends them
            )
            for tasks, sends, receives, answers in pipes:
                os.close(tasks)
                os.close(answers)
                self.processes.append(Rank(os.fdopen(sends, "w"), os.fdopen(receives)))

    def replay(
        self, work: Work, steps: NDArray[Any], placements: list[mt.Placement], **more: Any
    ) -> list[dict[str, Any]]:
        """Run steps [W,T,L,K] under all placements in turns; gives every rank's answer."""
        slots, path = (
            np.stack([placement.slots for placement in placements]),
            self.folder / "task.npz",
        )
        np.savez(path, ids=steps, slots=slots, experts=work.seen.num_experts)
        task = {"file": str(path), "regimes": [work.regime], "check": False}
        task |= {"hidden": work.hidden, "inner": work.inner, **more}
        for process in self.processes:
            process.number = process.number or int(self._line())
            with suppress(BrokenPipeError):  # one that has ended does not answer, either
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
        if any(process.stdout.readline() != "done\n" for process in self.processes):
            raise RuntimeError(self._first_failure())
        answers = [self.folder / f"answer{rank}.npz" for rank in range(len(self.processes))]
        return [dict(np.load(answer)) for answer in answers]

    def _first_failure(self) -> str:
        """Write which rank failed first, and its own error: the others only lost a peer."""
        self._wait(ENDS)  # one that waits for another rank may not end
        failed = {}
        for rank, process in enumerate(self.processes):
            path = self.folder / f"failed{rank}"
            if path.exists():
                failed[rank] = json.loads(path.read_text())
            elif process.returncode is not None:  # killed, which no rank survives
                errors = (self.folder / f"errors{rank}").read_text()
                message = f"ended with status {process.returncode} {errors}"
                failed[rank] = {"at": 0.0, "error": message.strip()}
        first = min(failed, key=lambda rank: failed[rank]["at"])
        return f"rank {first} failed first: {failed[first]['error']}"

    def _wait(self, seconds: float) -> None:
        """Wait until all ranks have ended, or for so many seconds."""
        assert self._parent is not None
        until = time.monotonic() + seconds
        while any(rank.returncode is None for rank in self.processes):
            left = max(until - time.monotonic(), 0.0)
            if not select.select([self._parent.stdout], [], [], left)[0]:
                break
            number, status = map(int, self._line().split())
            self.processes[number].returncode = status

    def _line(self) -> bytes:
        """Read a line of what the parent of all ranks says of them."""
        assert self._parent is not None
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline()
        if not line:
            raise RuntimeError("no ranks: their parent has ended")
        return line

    def stop(self) -> None:
        """End all ranks, and their parent."""
        if self._parent is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._parent.pid, signal.SIGKILL)
        self._parent.communicate()
        for process in self.processes:
            process.stdout.read()  # to its end, which is that of the process
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()


@contextmanager
def ranks_in(network: Network) -> Iterator[Ranks]:
    """Give the ranks of a network, and end them."""
    ranks = Ranks(network, Path(tempfile.mkdtemp(prefix=own_prefix())))
    try:
        ranks.start()
        yield ranks
    finally:
        with undisturbed():
            ranks.stop()
            shutil.rmtree(ranks.folder)


def line(x: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
    """Return slope and start of a line through small and large measurements, by their medians."""
    large = x > (x.min() + x.max()) / 2
    (a, b), (c, d) = ((np.median(x[half]), np.median(y[half])) for half in (~large, large))
    slope = max((d - b) / (c - a), 1e-9)
    return slope, b - slope * a


@dataclass(frozen=True)
class Fit:
    """What a few seen steps of the contiguous placement tell.

    Parameters
    ----------
    topology, cost_model
        Of this machine at this link.
    ms_per_byte
        Of links, those inside a node where others are shaped.
    """

    topology: mt.Topology
    cost_model: mt.CostModel
    ms_per_byte: float

    @classmethod
    def of(
        cls, ranks: Ranks, work: Work, contiguous: mt.Placement, inside: float | None, count: int
    ) -> Fit:
        """Fit lines to steps of two sizes; without ``inside`` all links are alike."""
        parts = []
        network = ranks.network
        plain = mt.Topology(network.ranks, network.devices_per_node)
        # Sizes far apart: what noise there is then bends the lines least.
        for tokens in (work.tokens // 16, work.tokens):
            steps = work.steps(work.seen, tokens, count)
            answers = ranks.replay(work, steps, [contiguous])
            times = Times.of(answers)
            rest = (times.layer - times.processing - times.exchange)[:, 0]
            each = np.stack(
                [np.diff(answer["computed"][:, 0])[..., 0] for answer in answers], axis=-1
            )
            load = work.load(contiguous, steps)
            ports = work.ports(contiguous, steps, plain)
            parts.append((load, 1e3 * each, ports, times.exchange[:, 0], rest))
        load, each, ports, exchange, rest = (
            np.concatenate(arrays) for arrays in zip(*parts, strict=True)
        )
        token, start = line(load.ravel(), each.ravel())
        moved = ports.sum(axis=-1) > 0
        x, y = ports.sum(axis=-1), exchange
        if inside is not None:
            x, y = ports[..., 1], exchange - inside * ports[..., 0]
        slope, latency = line(x[moved], y[moved])
        inside = slope if inside is None else inside
        times_paid = 2 if work.regime == "follow" else 4  # two tiers, there and back
        out, back = work.row_bytes
        seconds = max(latency, 0.0) / times_paid / 1e3
        topology = replace(
            plain,
            intra_node_bandwidth=1e3 / inside,
            inter_node_bandwidth=1e3 / slope,
            intra_node_latency=seconds,
            inter_node_latency=seconds,
        )
        # What the ports let through in a burst makes the exchange's line start below zero.
        fixed = 1e3 * max(start + np.median(rest[-count:]) + min(latency, 0.0), 0.0)
        model = mt.CostModel(0, 0, fixed, 1e3 * token, out, combine_bytes=back)
        return cls(topology, model, inside)
