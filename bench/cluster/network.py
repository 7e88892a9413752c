"""The emulated cluster: network namespaces on this machine, one for each rank, and their links.

Every rank has two interfaces as a GPU has: ``eth0`` to the bridge of its node, and ``up0``, its own
port to the other nodes, shaped by a token bucket on either end, so that both ways are as fast. The
bridges are in a namespace as well: the machine's own network is never touched, and what removes the
namespaces removes everything.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAMESPACES = Path("/run/netns")
# Of the process that made them, so that runs do not meet: its number, and when it started.
NAME = "moetuner-{}-{}-"
OURS = re.compile(r"moetuner-(\d+)-(\d+)-\w+")


class Network:
    """The namespaces of one run; without them all ranks share the loopback device.

    Parameters
    ----------
    nodes, devices_per_node
        Its sizes.
    prefix
        What the names of its namespaces begin with; empty for loopback.
    """

    def __init__(self, nodes: int, devices_per_node: int, prefix: str = "") -> None:
        self.ranks, self.devices_per_node = nodes * devices_per_node, devices_per_node
        self.nodes, self.prefix = nodes, prefix
        self.interface = "eth0" if prefix else "lo"

    def space(self, rank: int) -> str:
        """Return the file of a rank's namespace; empty for that of this process."""
        return str(NAMESPACES / f"{self.prefix}gpu{rank}") if self.prefix else ""

    def build(self) -> None:
        """Make namespaces, bridges, interfaces and routes."""
        fabric = f"{self.prefix}fabric"
        _ip("netns", "add", fabric)
        for bridge in ("spine", *(f"node{node}" for node in range(self.nodes))):
            _ip("-n", fabric, "link", "add", bridge, "type", "bridge")
            _ip("-n", fabric, "link", "set", bridge, "up")
        for rank in range(self.ranks):
            gpu, node = f"{self.prefix}gpu{rank}", rank // self.devices_per_node
            _ip("netns", "add", gpu)
            _ip("-n", gpu, "link", "set", "lo", "up")
            for port, peer, bridge in (("eth0", "near", f"node{node}"), ("up0", "far", "spine")):
                peer = f"{peer}{rank}"
                made = ("link", "add", port, "type", "veth", "peer", "name", peer, "netns", fabric)
                _ip("-n", gpu, *made)
                _ip("-n", fabric, "link", "set", peer, "master", bridge, "up")
                _ip("-n", gpu, "link", "set", port, "up")
            # So that a rank that waits for a core does not leave its port idle.
            for buffer in ("rmem", "wmem"):
                setting = f"/proc/sys/net/ipv4/tcp_{buffer}"
                write = f"echo 4096 4194304 8388608 > {setting}"
                _ip("netns", "exec", gpu, "sh", "-c", write)
            _ip("-n", gpu, "addr", "add", f"{_address(rank)}/32", "dev", "eth0")
            for other in range(self.ranks):
                port = "eth0" if other // self.devices_per_node == node else "up0"
                route = (f"{_address(other)}/32", "dev", port, "src", _address(rank))
                if other != rank:
                    _ip("-n", gpu, "route", "add", *route)

    def shape(self, megabits: int) -> None:
        """Give every port to other nodes so many Mbit/s and direction; 0 takes the limit off."""
        if not self.prefix:
            return
        for rank in range(self.ranks):
            for space, port in ((f"gpu{rank}", "up0"), ("fabric", f"far{rank}")):
                tc = ["tc", "-n", f"{self.prefix}{space}", "qdisc"]
                if megabits:
                    # A burst makes up for what is sent late; with 4 MiB nothing is dropped.
                    shaping = f"root tbf rate {megabits}mbit burst 128k limit 4m".split()
                    _run([*tc, "replace", "dev", port, *shaping])
                else:
                    with suppress(RuntimeError):  # there may be none
                        _run([*tc, "delete", "dev", port, "root"])


def why_not() -> str | None:
    """Return why there can be no namespaces and shaped links here; None if there can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 must be installed"
    if os.geteuid():
        return "network namespaces and tc need root"
    try:
        with cluster(1, 1) as smallest:
            smallest.shape(100)
    except RuntimeError as error:
        return str(error)
    return None


def own_prefix() -> str:
    """Return what the names of this process's namespaces and folders begin with."""
    return NAME.format(os.getpid(), _started(os.getpid()))


@contextmanager
def cluster(nodes: int, devices_per_node: int) -> Iterator[Network]:
    """Give a network of namespaces, and remove it."""
    network = Network(nodes, devices_per_node, own_prefix())
    try:
        network.build()
        yield network
    finally:
        with undisturbed():
            _remove(name for name in _names() if name.startswith(network.prefix))


def remove_leftovers() -> None:
    """Remove what runs left that are gone, as after ``kill -9``: namespaces, processes, folders."""
    temporary = Path(tempfile.gettempdir())
    _remove(name for name in _names() if _is_left(name))
    for folder in (path for path in temporary.glob("moetuner-*") if _is_left(path.name)):
        shutil.rmtree(folder, ignore_errors=True)


def _is_left(name: str) -> bool:
    match = OURS.fullmatch(name)
    return match is not None and _started(int(match.group(1))) != int(match.group(2))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM meanwhile."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def postponed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait meanwhile; a process that starts here never hears of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remove(names: Iterable[str]) -> None:
    for name in list(names):
        with suppress(RuntimeError):
            for process in _ip("netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
        with suppress(RuntimeError):
            _ip("netns", "delete", name)


def _names() -> list[str]:
    return sorted(path.name for path in NAMESPACES.iterdir()) if NAMESPACES.is_dir() else []


def _address(rank: int) -> str:
    return f"10.77.{rank // 250}.{rank % 250 + 1}"


def _started(process: int) -> int:
    """Return when a process started, in ticks since boot; -1 if there is none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return -1
    # The name, in brackets, may hold spaces; the field is number 22 of all.
    return int(stat.rpartition(")")[2].split()[19])


def _ip(*words: str) -> str:
    return _run(["ip", *words])


def _run(command: list[str]) -> str:
    # In a session of its own, so that Ctrl-C does not stop it half way.
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
