"""Ranks agree on a map, or all take the engine's own: processes with a store of torch's."""

import multiprocessing
import os
import signal
import socket
import time
import traceback
from functools import partial

import numpy as np
import pytest

import moetuner as mt
from moetuner.plugins.agreement import Agreement, Group, Post, judge
from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log
from moetuner.plugins.settings import Settings

distributed = pytest.importorskip("torch.distributed")

SPAWN = multiprocessing.get_context("spawn")
LOAD = np.random.default_rng(0).integers(1, 99, (2, 4))


class Lines:
    """A logger that keeps its lines."""

    def __init__(self):
        self.lines = []

    def log(self, level, text, *arguments):
        """Keep a line of at least INFO."""
        if level >= 20:
            self.lines.append(text % arguments)


def work(rank, ranks, port, tasks, answers):
    """Be one rank of a gloo world: run what comes, each with keys of its own in the store."""
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    store = distributed.distributed_c10d._get_default_store()
    while True:
        number, size, what = tasks.get()
        group = Group(distributed.PrefixStore(str(number), store), tuple(range(size)), rank)
        try:
            answers.put((rank, what(rank, lambda group=group: group)))
        except Exception:
            answers.put((rank, traceback.format_exc()))


class World:
    """Processes, one a rank, that live as long as the tests of this file."""

    def __init__(self, size):
        self.answers = SPAWN.Queue()
        self.tasks = [SPAWN.Queue() for _ in range(size)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            SPAWN.Process(target=work, args=(rank, size, port, tasks, self.answers), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()
        self.number = 0

    def run(self, what, size=2, *, killed=None):
        """Run ``what(rank, group)`` on every rank; return what they answer, None of the killed."""
        self.number += 1
        for tasks in self.tasks[:size]:
            tasks.put((self.number, size, what))
        count = size - (killed is not None)
        answers = dict(self.answers.get(timeout=120) for _ in range(count))
        assert not any(isinstance(answer, str) for answer in answers.values()), answers
        return [answers.get(rank) for rank in range(size)]

    def kill(self):
        """End the processes."""
        for process in self.processes:
            process.kill()


@pytest.fixture(scope="module")
def world():
    """Start three ranks."""
    processes = World(3)
    yield processes
    processes.kill()


def serve(rank, group, *, files, wait=20.0, calls=2, **more):
    """Decide some times by ``files[rank]``; return maps, lines and the seconds it took.

    ``raises`` is a rank whose engine refuses the map, ``absent`` one without the plugin, ``dies``
    one that is killed in its second call, ``reload`` a file for each rank, ``later`` their news.
    """
    lines = Lines()
    path, reload = files[rank], more["reload"][rank] if "reload" in more else None
    settings = Settings(() if path is None else (path,), rebalance=path is None, reload=reload)
    balancer = Balancer(settings, Log(lines), Agreement(wait))
    begin, maps = time.monotonic(), []

    def refuse(slots):
        if more.get("raises") == rank:
            raise RuntimeError("refused here")
        return slots

    def lost():
        if more.get("no_group") == rank:
            raise RuntimeError("no group here")
        return group()

    for call in range(calls):
        if more.get("absent") == rank:
            break
        if more.get("dies") == rank and call == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if reload and call in more["later"]:
            for name, content in more["later"][call].get(rank, {}).items():
                name.write_text(content)
            balancer.look_again()
        decided = balancer.decide(LOAD, 6, 1, 1, 2, group=lost, rank=rank, form=refuse)
        maps.append(None if decided is None else decided.tolist())
    return maps, lines.lines, time.monotonic() - begin


@pytest.fixture
def files(tmp_path):
    """Write two placements of 2 layers, 2 ranks x 3 slots and 4 experts, and return their paths."""
    paths = []
    for number, slots in enumerate(([[0, 1, 2], [3, 0, 1]], [[3, 2, 1], [0, 3, 2]])):
        mt.Placement([slots] * 2).save(tmp_path / f"{number}.json")
        paths.append(tmp_path / f"{number}.json")
    return paths


FIRST = [[0, 1, 2, 3, 0, 1]] * 2
OTHER = [[3, 2, 1, 0, 3, 2]] * 2


OWN = "all ranks take the engine's own map"
ALWAYS = f"{OWN} from now on: rank 1"
# Files of the ranks ("none" is not there, "live" follows loads), what else happens, the maps of all
# that are there, and the line of the first of them.
ROUNDS = {
    "the same": (["0", "0"], {}, [FIRST] * 2, "copies move"),
    "missing": (["0", "none"], {}, [None] * 2, f"{ALWAYS}: "),
    "others": (["0", "1"], {}, [None] * 2, f"{ALWAYS} read other files or variables than rank 0"),
    "unreadable": (["0", "bad"], {}, [None] * 2, "not a placement"),
    "live": (["0", "live"], {}, [None] * 2, f"{ALWAYS} read other files or variables than rank 0"),
    "fails alone": (["0", "0"], {"raises": 1}, [None] * 2, f"{OWN}: rank 1: refused here"),
    "no group": (["0", "0"], {"no_group": 1, "wait": 1.0}, [None] * 2, None),
    "no first": (["0"] * 3, {"absent": 0, "wait": 1.0, "calls": 4}, [None] * 4, "rank 0 did not"),
    "no second": (["0"] * 3, {"absent": 1, "wait": 1.0, "calls": 4}, [None] * 4, "rank 1 did not"),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_all_ranks_take_a_map_or_none_does(world, files, tmp_path, name):
    """At once, or after two waits for a rank that does not answer; one line says why."""
    (tmp_path / "bad.json").write_text('{"schema": ')
    stems, more, expected, words = ROUNDS[name]
    paths = [None if stem == "live" else tmp_path / f"{stem}.json" for stem in stems]
    done = world.run(partial(serve, files=paths, **more), len(stems))
    absent = more.get("absent")
    first = int(absent == 0)
    for rank, (maps, lines, seconds) in enumerate(done):
        assert maps == ([] if rank == absent else expected)
        assert seconds < 15
        if rank == first and words is not None:
            assert len(lines) == 1 or more or expected == [FIRST] * 2
            assert words in lines[0]
        elif words is not None:
            assert not lines


def test_files_are_read_again_by_all_or_none(world, files, tmp_path):
    """A change that only one rank saw waits for the other; then both serve the new file at once."""
    shared = [tmp_path / f"{rank}-served.json" for rank in range(2)]
    for path in shared:
        path.write_text(files[0].read_text())
    flags = [tmp_path / f"reload-{rank}" for rank in range(2)]
    new = files[1].read_text()
    later = {rank + 1: {rank: {shared[rank]: new, flags[rank]: "now"}} for rank in range(2)}
    done = world.run(partial(serve, files=shared, reload=flags, later=later, calls=4))
    for maps, *_ in done:
        assert maps == [FIRST, FIRST, OTHER, OTHER]
    assert any("read its files again" in line for line in done[0][1])


def test_a_wrong_file_is_mended_by_a_reload(files, tmp_path):
    """A placement of another shape is refused until the right one is there, without a restart."""
    served, flag = tmp_path / "served.json", tmp_path / "reload"
    mt.Placement([[[0, 1], [2, 3]]]).save(served)
    later = {1: {0: {served: files[0].read_text(), flag: "now"}}}
    maps, lines, _ = serve(0, lambda: None, files=[served], reload=[flag], later=later, calls=3)
    assert maps == [None, FIRST, FIRST]
    assert "2 devices x 2 slots" in lines[0]


def test_the_verdict_is_the_same_for_all_who_give_up():
    """Whoever writes first is believed: a rank that stopped waiting, or rank 0."""
    store = distributed.HashStore()
    for rank in (1, 0):
        group = Group(store, (0, 1), rank)
        assert Agreement(0.0).verdict(lambda group=group: group, Post("a", "b")).do == "own"


@pytest.mark.parametrize(
    ("posts", "do", "words"),
    [
        ([Post("a", "m"), *[Post("a", "n")] * 2], "own", "ranks 1, 2 decided another map"),
        ([Post("a", error="x")] * 2, "own", "x"),
        ([Post(error="x", unread=True, reloads=True)] * 2, "own", "x"),
        ([Post("a"), *[Post("b")] * 20], "off", "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more read"),
    ],
)
def test_verdicts(posts, do, words):
    """What is done, and why, where maps differ, files may be read again, or ranks are many."""
    verdict = judge(posts)
    assert verdict.do == do
    assert verdict.reason.startswith(words)


def test_a_killed_rank_is_not_waited_for_for_ever(world, files):
    """SIGKILL in the middle of a run: the others go on with the engine's own map."""
    done = world.run(partial(serve, files=[files[0]] * 3, dies=2, wait=1.0, calls=3), 3, killed=2)
    for maps, _, seconds in done[:2]:
        assert maps == [FIRST, None, None]
        assert seconds < 10
