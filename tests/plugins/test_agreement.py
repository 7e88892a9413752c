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
from moetuner.plugins.agreement import Agreement, Group, Post, judge, ranks_named
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
            answers.put((rank, what(rank, partial(return_, group))))
        except Exception:
            answers.put((rank, traceback.format_exc()))


def return_(group):
    """Return the group, as an engine's file does."""
    return group


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
    one that is killed in its second call, ``reload`` a file and ``later`` what it announces.
    """
    lines = Lines()
    reload = more.get("reload")
    path = files[rank]
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


def test_ranks_with_the_same_file_serve_it(world, files):
    """Both get the map of the file at every call, and rank 0 says so once."""
    (maps, lines, _), (also, silent, _) = world.run(partial(serve, files=[files[0]] * 2))
    assert maps == also == [FIRST, FIRST]
    assert len(lines) == 1 or "copies move" in lines[0]
    assert not silent


@pytest.mark.parametrize("broken", ["missing", "other", "unreadable", "live"])
def test_a_rank_with_other_files_keeps_all_from_them(world, files, tmp_path, broken):
    """All take the engine's own map at once, and rank 0 names the rank and the reason."""
    (tmp_path / "bad.json").write_text('{"schema": ')
    second = {
        "missing": tmp_path / "none.json",
        "other": files[1],
        "unreadable": tmp_path / "bad.json",
        "live": None,
    }[broken]
    (maps, lines, seconds), (also, _, _) = world.run(partial(serve, files=[files[0], second]))
    assert maps == also == [None, None]
    assert seconds < 15
    (line,) = lines
    assert "all ranks take the engine's own map from now on: rank 1" in line
    reasons = {"missing": "none.json", "unreadable": "not a placement"}
    assert reasons.get(broken, "other files or variables than rank 0") in line


def test_a_rank_that_fails_alone_keeps_all_from_the_map(world, files):
    """An error of one rank's decision is the engine's own map for all, each time; one line."""
    done = world.run(partial(serve, files=[files[0]] * 2, raises=1))
    assert [maps for maps, *_ in done] == [[None, None]] * 2
    (line,) = done[0][1]
    assert "own map: rank 1: refused here" in line


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_without_the_plugin_is_not_waited_for_for_ever(world, files, broken):
    """After the wait all others take the engine's own map; after two of them at once."""
    done = world.run(partial(serve, files=[files[0]] * 3, absent=broken, wait=1.0, calls=4), 3)
    for rank, (maps, lines, seconds) in enumerate(done):
        assert maps == ([] if rank == broken else [None] * 4)
        assert seconds < 10
        if rank == (broken == 0):  # the first of those that are there
            assert f"rank {broken} did not answer within 1 s" in lines[0]
        else:
            assert not lines


def test_a_rank_without_a_group_keeps_all_from_the_map(world, files):
    """Where one cannot reach the others it takes the engine's own map, and so do they."""
    done = world.run(partial(serve, files=[files[0]] * 2, no_group=1, wait=1.0))
    assert [maps for maps, *_ in done] == [[None, None]] * 2


def test_files_are_read_again_by_all_or_none(world, files, tmp_path):
    """A change that only one rank saw waits for the other; then both serve the new file at once."""
    shared = [tmp_path / f"{rank}-served.json" for rank in range(2)]
    for path in shared:
        path.write_text(files[0].read_text())
    flags = [tmp_path / f"reload-{rank}" for rank in range(2)]
    new = files[1].read_text()
    later = {rank + 1: {rank: {shared[rank]: new, flags[rank]: "now"}} for rank in range(2)}
    done = world.run(partial(reloaded, served=shared, flags=flags, later=later))
    for maps, *_ in done:
        assert maps == [FIRST, FIRST, OTHER, OTHER]
    assert any("read its files again" in line for line in done[0][1])


def reloaded(rank, group, *, served, flags, later):
    """Serve a file of one's own, which changes when ``later`` says so."""
    return serve(rank, group, files=served, reload=flags[rank], later=later, calls=4)


def test_a_wrong_file_is_mended_by_a_reload(files, tmp_path):
    """A placement of another shape is refused until the right one is there, without a restart."""
    served, flag = tmp_path / "served.json", tmp_path / "reload"
    mt.Placement([[[0, 1], [2, 3]]]).save(served)
    later = {1: {0: {served: files[0].read_text(), flag: "now"}}}
    maps, lines, _ = serve(0, lambda: None, files=[served], reload=flag, later=later, calls=3)
    assert maps == [None, FIRST, FIRST]
    assert "2 devices x 2 slots" in lines[0]


def test_the_verdict_is_the_same_for_all_who_give_up():
    """Whoever writes first is believed: a rank that stopped waiting, or rank 0."""
    store = distributed.HashStore()
    for rank in (1, 0):
        verdict = Agreement(0.0).verdict(
            partial(return_, Group(store, (0, 1), rank)), Post("a", "b")
        )
        assert verdict.do == "own"


@pytest.mark.parametrize(
    ("posts", "do", "words"),
    [
        ([Post("a", "m")] * 2, "take", ""),
        ([Post("a", "m"), Post("b", "m")], "off", "rank 1 read other files"),
        ([Post("a", "m"), Post("a", "n"), Post("a", "n")], "own", "ranks 1, 2 decided another map"),
        ([Post("a", error="x")] * 2, "own", "x"),
        ([Post(error="x", unread=True)] * 2, "off", "x"),
        ([Post(error="x", unread=True, reloads=True)] * 2, "own", "x"),
        ([Post("a", "m", pending="b")] * 2, "reload", ""),
        ([Post("a", "m", pending="b"), Post("a", "m")], "take", ""),
        ([Post("a", "m"), None], "own", "rank 1 did not answer"),
    ],
)
def test_verdicts(posts, do, words):
    """What is done, and why, for what ranks may post."""
    verdict = judge(posts)
    assert verdict.do == do
    assert verdict.reason.startswith(words)


def test_many_ranks_are_not_all_named():
    """A line stays a line on a thousand ranks."""
    assert ranks_named(range(20)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


def test_a_killed_rank_is_not_waited_for_for_ever(world, files):
    """SIGKILL in the middle of a run: the others go on with the engine's own map."""
    done = world.run(partial(serve, files=[files[0]] * 3, dies=2, wait=1.0, calls=3), 3, killed=2)
    for maps, _, seconds in done[:2]:
        assert maps == [FIRST, None, None]
        assert seconds < 10
