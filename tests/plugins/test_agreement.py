"""Ranks agree on a map, or all take the engine's own: processes with a store of torch's."""

import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from multiprocessing import forkserver
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest

import moetuner as mt
from moetuner.plugins import agreement, consensus, verdicts
from moetuner.plugins.agreement import MapAgreement
from moetuner.plugins.balancer import Balancer
from moetuner.plugins.log import Log
from moetuner.plugins.rounds import Group
from moetuner.plugins.settings import Settings
from moetuner.plugins.verdicts import (
    FAILED,
    NO_DRAFT,
    SILENT,
    VERSION,
    Post,
    Verdict,
    judge,
    name_ranks,
    read_post,
    to_json,
)

distributed = pytest.importorskip("torch.distributed")

# Ranks are forked from a server that has torch already.
FORKED = multiprocessing.get_context("forkserver")
LOAD = np.random.default_rng(0).integers(1, 99, (2, 4))
# Seconds that ranks wait for each other: longer than a rank of a busy machine is late.
WAIT = 3600.0


class Lines:
    """A logger that keeps its lines."""

    def __init__(self):
        self.lines = []

    def log(self, level, text, *arguments):
        """Keep a line of at least INFO."""
        if level >= 20:
            self.lines.append(text % arguments)


def open_store(address):
    """Open a store by its port, or by its file."""
    if isinstance(address, str):
        store = distributed.FileStore(address)
        store.set("used", "by the engine")
        return store
    return distributed.TCPStore("127.0.0.1", address, is_master=False, wait_for_workers=False)


def work(rank, address, tasks):
    """Run tasks as one rank, each with keys of its own in the store."""
    # A process that comes back asks before the others hear of it, and is told to ask again.
    agreement.WAIT_TO_REOPEN = 0.2
    store = open_store(address)
    while True:
        number, size, what = tasks.recv()
        group = Group(distributed.PrefixStore(str(number), store), tuple(range(size)), rank)
        try:
            tasks.send(what(rank, lambda group=group: group))
        except Exception:
            tasks.send(traceback.format_exc())


class World:
    """Processes of ranks that live as long as the tests of this file, and their store.

    The store is a process, or a file where there is a path.
    """

    def __init__(self, size, path=None):
        self.address = path
        if path is None:
            self.store = distributed.TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False
            )
            self.address = self.store.port
        self.tasks, self.processes = {}, {}
        for rank in range(size):
            self.start(rank)
        self.number = 0

    def start(self, rank):
        """Start a process, in the place of the one that had its rank."""
        if rank in self.processes:
            self.processes[rank].kill()
        self.tasks[rank], theirs = FORKED.Pipe()
        arguments = rank, self.address, theirs
        self.processes[rank] = FORKED.Process(target=work, args=arguments, daemon=True)
        self.processes[rank].start()

    def run(self, what, size=2, *, killed=None, ranks=None, again=False):
        """Run ``what(rank, group)`` on ranks; return what they answer, None of who does not.

        With ``again`` in the store of the call before, else in a new one.
        """
        self.number += not again
        ranks = range(size) if ranks is None else ranks
        for rank in ranks:
            self.tasks[rank].send((self.number, size, what))
        answers = dict.fromkeys(range(size))
        for rank in ranks:
            if rank != killed:
                answers[rank] = self.tasks[rank].recv()
        assert not any(isinstance(answer, str) for answer in answers.values()), answers
        if killed is not None:
            self.start(killed)
        return list(answers.values())

    def kill(self):
        """End the processes."""
        for process in self.processes.values():
            process.kill()


def test_a_line_names_eight_ranks_at_most():
    """Of more it has the number."""
    assert name_ranks([3]) == "rank 3"
    assert name_ranks(range(8)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7"
    assert name_ranks(range(10)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


@pytest.fixture(scope="module", autouse=True)
def own_server():
    """Start the server of this module when it is asked; that of other modules is stopped."""
    forkserver._forkserver._stop()
    FORKED.set_forkserver_preload(["torch.distributed", "moetuner.plugins.balancer"])
    yield
    forkserver._forkserver._stop()


@pytest.fixture(scope="module", params=["TCPStore", "FileStore"])
def world(request, tmp_path_factory):
    """Start three ranks, with each of the stores that engines have."""
    is_file = request.param == "FileStore"
    processes = World(3, str(tmp_path_factory.mktemp("store") / "store") if is_file else None)
    yield processes
    processes.kill()


# The balancer of a process that is asked again.
KEPT = {}


@contextmanager
def speaking(how):
    """Let this process write or judge as another version, or a broken one."""
    inner = verdicts.to_json

    def written(said):
        if isinstance(said, Verdict):
            return inner(said)
        more = {"since": "0.2"} if how == "more" else {"version": VERSION + 1}
        return "{" if how == "junk" else json.dumps({**json.loads(inner(said)), **more})

    def judge(posts, wait):
        raise MemoryError("out of memory on purpose")

    changes = {} if how is None else {"judge": judge} if how == "judge" else {"to_json": written}
    with patch.multiple(verdicts, **changes) if changes else nullcontext():
        yield


class Clock:
    """A clock that stands still until all ranks that are there have posted.

    Then the time is over for the first of them, which judges. So nobody gives up on a rank that is
    only slow, and nobody waits for a rank that is not there.
    """

    def __init__(self, ranks):
        self.ranks, self.is_over, self.have_posted = ranks, False, None

    @contextmanager
    def watched(self):
        """Let this process wait by this clock."""

        def agree(store, key, rank, size, **more):
            keys = [consensus.list_keys(key, size)[number] for number in self.ranks]
            self.is_over = False
            self.have_posted = lambda: rank == min(self.ranks) and store.check(keys)
            return consensus.agree(store, key, rank, size, **more)

        with patch.object(consensus, "time", self), patch.object(agreement, "agree", agree):
            yield

    def monotonic(self):
        """Return no time, or more than anybody waits."""
        return 1e9 if self.is_over else 0.0

    def sleep(self, seconds):
        """Sleep, and see who has posted."""
        time.sleep(seconds)
        self.is_over = self.have_posted()


class Older:
    """An agreement as the version before had it: posts have no version, rounds are its own.

    As rank 0 it judges no post that has a field more.
    """

    def __init__(self):
        self.number = 0

    def verdict(self, group, post, wait=None):
        """Post, and return the verdict."""
        ranks, content = group(), asdict(post)
        key = f"moetuner/0-1/{self.number}"
        self.number += 1
        del content["version"]
        ranks.store.set(f"{key}/{ranks.rank}", json.dumps(content))
        if ranks.rank == 0:
            return Verdict("own", "unexpected keyword argument 'version'")
        ranks.store.wait([f"{key}/verdict"])
        said = json.loads(ranks.store.get(f"{key}/verdict"))
        assert set(said) <= {"do", "reason", "silent", "speaker", "speaks"}
        return Verdict(**said)

    def is_off(self, group):
        """Return that what was off stays so."""
        return True


def serve(rank, group, *, files, calls=2, there=None, **more):
    """Decide some times by ``files[rank]``; return maps and lines.

    Ranks wait for each other as long as it takes, or, with ``there``, for these ranks alone.
    ``raises`` is a rank whose engine refuses the map, ``absent`` one without the plugin, ``dies``
    one that is killed in its second call, ``reload`` a file for each rank, ``later`` their news;
    ``strange`` is a rank and how it speaks, ``older`` one of the version before; ``keeps`` says
    that the process decides as in the call before, with what it knows.
    """
    lines = Lines()
    path, reload = files[rank], more["reload"][rank] if "reload" in more else None
    settings = Settings(() if path is None else (path,), rebalance=path is None, reload=reload)
    agreement = Older() if more.get("older") == rank else MapAgreement()
    balancer = Balancer(settings, Log(lines), agreement)
    if more.get("keeps"):
        balancer = KEPT.setdefault("balancer", balancer)
        balancer.log.logger = lines
    strange, how = more.get("strange", (None, None))
    maps = []

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
        waited_for = there
        if "dies" in more and call:
            waited_for = [number for number in range(len(files)) if number != more["dies"]]
        clock = nullcontext() if waited_for is None else Clock(waited_for).watched()
        with speaking(how if rank == strange else None), clock:
            ask = partial(balancer.decide, group=lost, rank=rank, form=refuse, wait=WAIT)
            decided = ask(LOAD, 6, 1, 1, 2)
        maps.append(None if decided is None else decided.tolist())
    balancer.flush()  # what a map changes is said in a thread of its own
    return maps, lines.lines


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
    "no group": (["0", "0"], {"no_group": 1, "there": [0]}, [None] * 2, None),
    "no first": (["0"] * 3, {"absent": 0, "there": [1, 2], "calls": 4}, [None] * 4, None),
    "no second": (["0"] * 3, {"absent": 1, "there": [0, 2], "calls": 4}, [None] * 4, None),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_all_ranks_take_a_map_or_none_does(world, files, tmp_path, name):
    """At once, or after a wait for a rank that does not answer; one line says why."""
    (tmp_path / "bad.json").write_text('{"schema": ')
    stems, more, expected, words = ROUNDS[name]
    paths = [None if stem == "live" else tmp_path / f"{stem}.json" for stem in stems]
    done = world.run(partial(serve, files=paths, **more), len(stems))
    absent = more.get("absent")
    for rank, (maps, lines) in enumerate(done):
        assert maps == ([] if rank == absent else expected)
        if rank == 0 and words is not None:
            assert len(lines) == 1 or more or expected == [FIRST] * 2
            assert words in lines[0]
        elif words is not None:
            assert not lines
    if absent is not None:
        silent = f": rank {absent} did not answer within {WAIT:.0f} s"
        assert any(silent in line for _, lines in done for line in lines)


# A rank, how it speaks, the maps that all get, and a line of the first of them.
OFF = f"{OWN} from now on"
VERSIONS = {
    "more, rank 0": ({"strange": (0, "more")}, FIRST, "copies move"),
    "more, rank 1": ({"strange": (1, "more")}, FIRST, "copies move"),
    "version, rank 0": ({"strange": (0, "version")}, None, f"{OFF}: rank 1 and rank 0 agree by"),
    "version, rank 1": ({"strange": (1, "version")}, None, f"{OFF}: rank 1 and rank 0 agree by"),
    "junk, rank 0": ({"strange": (0, "junk")}, None, f"{OFF}: rank 0: its post cannot be read"),
    "junk, rank 1": ({"strange": (1, "junk")}, None, f"{OFF}: rank 1: its post cannot be read"),
    "judge": ({"strange": (0, "judge")}, None, f"{OFF}: out of memory on purpose"),
    "older, rank 1": ({"older": 1}, None, f"{OFF}: rank 1 and rank 0 agree by"),
    "older, rank 0": ({"older": 0}, None, "unexpected keyword argument"),
}


@pytest.mark.parametrize("name", VERSIONS)
def test_a_rank_of_another_version_is_not_waited_for(world, files, name):
    """What goes wrong in a round is a verdict; a rank that waits would not be back in time."""
    more, expected, words = VERSIONS[name]
    done = world.run(partial(serve, files=[files[0]] * 2, calls=3, **more))
    assert [maps for maps, *_ in done] == [[expected] * 3] * 2
    assert any(words in line for line in done[0][1])


def test_a_process_that_comes_back_agrees_again(world, files):
    """In the store in which the others have counted on, and in a new one where they count anew."""
    ask = partial(serve, files=[files[0]] * 2, keeps=True, calls=3)
    done = [world.run(ask)]
    world.start(1)
    done.append(world.run(ask, again=True))
    world.start(0)
    done += [world.run(ask, again=True), world.run(ask)]
    assert [[maps for maps, *_ in ranks] for ranks in done] == [[[FIRST] * 3] * 2] * 4


def test_a_process_that_comes_back_after_all_gave_up_is_asked_again(world, files):
    """While it was away the others fell silent; with it back all serve the map from then on."""
    ask = partial(serve, files=[files[0]] * 3, keeps=True)
    done = [world.run(ask, 3)]
    alone = world.run(partial(ask, there=[0, 1], calls=4), 3, ranks=[0, 1], again=True)
    world.start(2)
    first = [[None]] * 3
    while first != [[FIRST]] * 3:  # once they hear of each other
        first = [maps for maps, _ in world.run(partial(ask, calls=1), 3, again=True)]
        assert first in ([[None]] * 3, [[FIRST]] * 3)
    done += [world.run(partial(ask, calls=3), 3, again=True)]
    assert [maps for maps, *_ in done[0]] == [[FIRST] * 2] * 3
    assert [maps for maps, *_ in alone[:2]] == [[None] * 4] * 2
    assert any("from now on: rank 2 did not answer" in line for line in alone[0][1])
    assert [maps for maps, *_ in done[1]] == [[FIRST] * 3] * 3


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
    maps, lines = serve(0, lambda: None, files=[served], reload=[flag], later=later, calls=3)
    assert maps == [None, FIRST, FIRST]
    assert "2 devices x 2 slots" in lines[0]


def test_the_verdict_is_the_same_for_all_who_give_up():
    """Whoever writes first is believed: a rank that stopped waiting, or rank 0."""
    store = distributed.HashStore()
    for rank in (1, 0):
        group = Group(store, (0, 1), rank)
        assert MapAgreement(0.0).verdict(lambda group=group: group, Post("a", "b")).do == "own"


def test_a_rank_that_gave_up_takes_the_first_one_for_silent():
    """Whatever that one posts meanwhile: it may have read another verdict."""
    store = distributed.HashStore()
    store.set(consensus.list_keys("question", 2)[0], "late")
    options = {"post": "in time", "judge": json.dumps, "wait": 0.0}
    verdict, _ = consensus.agree(store, "question", 1, 2, **options)
    assert json.loads(verdict) == [None, "in time"]


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


def test_a_draft_model_without_a_file_is_no_failure():
    """All ranks say so in their posts; where one has another error, or none, a rank failed."""
    draft = Post("a", error="nothing for it", no_draft=True)
    assert read_post(0, to_json(draft)) == draft
    assert judge([draft] * 2).cause == NO_DRAFT
    for other in (Post("a", error="nothing for it"), Post("a", "m")):
        assert judge([draft, other]).cause == judge([other, draft]).cause == FAILED
    assert judge([draft, None]).cause == SILENT


def test_a_killed_rank_is_not_waited_for_for_ever(world, files):
    """SIGKILL in the middle of a run: the others go on with the engine's own map."""
    done = world.run(partial(serve, files=[files[0]] * 3, dies=2, calls=3), 3, killed=2)
    assert [maps for maps, _ in done[:2]] == [[FIRST, None, None]] * 2


def keep_store(pipe):
    """Serve a store in this process, and send its port."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    pipe.recv()


@pytest.fixture
def kept_store():
    """Start a store in a process of its own; return the process and a client."""
    pipe, theirs = FORKED.Pipe()
    process = FORKED.Process(target=keep_store, args=(theirs,), daemon=True)
    process.start()
    yield process, distributed.TCPStore("127.0.0.1", pipe.recv(), is_master=False)
    process.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_stands_still_ends_every_round(kept_store, files, rank):
    """SIGSTOP of its process: the engine's own map, soon, and none by this rank's post later."""
    process, store = kept_store
    lines, group = Lines(), Group(store, (0, 1), rank)
    settings = Settings((files[0],))
    balancer = Balancer(settings, Log(lines), MapAgreement(WAIT, answer=0.2))
    ask = partial(balancer.decide, LOAD, 6, 1, 1, 2, group=lambda: group, rank=rank)

    def stop(seconds):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(seconds)

    # The other rank does not come: the first round waits for it when the store stops.
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=stop)
    with patch.object(consensus, "time", clock):
        assert [ask() for _ in range(3)] == [None] * 3
    assert "the store did not answer within 0.2 s" in lines.lines[0]
    assert "from now on" in lines.lines[1]
    os.kill(process.pid, signal.SIGCONT)
    other = Group(store, (0, 1), 1 - rank)
    verdict = MapAgreement(WAIT).verdict(lambda: other, Post("a", "b"))
    assert "the store did not answer" in verdict.reason


@pytest.fixture
def file_stores(tmp_path):
    """Return the file of a store, which an engine has used, and two clients."""
    path = tmp_path / "store"
    clients = [distributed.FileStore(str(path), 2) for _ in range(2)]
    for client in clients:
        client.set("used", "by the engine")
    yield path, clients
    # torch's clients end by reading their file; of another file they would never end.
    path.unlink(missing_ok=True)


def remove(path):
    """Remove a file, as a cleaner of temporary files does."""
    path.unlink()


def replace(path):
    """Remove a file, and let another client begin a new one."""
    path.unlink()
    path.touch()


LOST = {
    "removed": (remove, "was removed"),
    "replaced": (replace, "was replaced"),
    "disk full": (lambda path: None, "is full"),
}


@pytest.mark.parametrize("how", LOST)
def test_a_store_whose_file_is_lost_ends_a_round_at_once(how, files, file_stores):
    """Each rank sees it by itself and names the file; nobody waits, and no thread goes on."""
    path, clients = file_stores
    lose, words = LOST[how]
    lines = [Lines() for _ in clients]
    balancers = [Balancer(Settings((files[0],)), Log(own), MapAgreement(WAIT)) for own in lines]

    def decide(rank):
        group = Group(distributed.PrefixStore("default", clients[rank]), (0, 1), rank)
        decided = balancers[rank].decide(LOAD, 6, 1, 1, 2, group=lambda: group)
        return None if decided is None else decided.tolist()

    full = SimpleNamespace(f_bavail=0, f_frsize=1)
    disk = patch("os.statvfs", return_value=full)
    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(decide, range(2))) == [FIRST] * 2
        size = path.stat().st_size
        lose(path)
        with disk if how == "disk full" else nullcontext():
            for _ in range(3):
                assert list(ranks.map(decide, range(2))) == [None] * 2
    assert path.exists() == (how != "removed")
    assert how != "disk full" or path.stat().st_size == size
    for balancer, written in zip(balancers, lines, strict=True):
        balancer.flush()
        warnings = [line for line in written.lines if "own map" in line]
        assert [words in line and str(path) in line for line in warnings] == [True] * 2
        assert "from now on" in warnings[-1]
    for thread in threading.enumerate():
        if thread.name == "moetuner-store":
            thread.join()


def test_a_verdict_that_is_not_in_the_store_is_of_no_rank(file_stores):
    """A file that is replaced after all have posted: the rank that judges does not go on alone."""
    path, clients = file_stores
    clients[1].set(consensus.list_keys("question", 2)[1], "there")

    def judge_late(posts):
        replace(path)
        return json.dumps(posts)

    options = {"post": "here", "judge": judge_late, "wait": WAIT}
    with pytest.raises(RuntimeError, match="lost what this rank wrote"):
        consensus.agree(clients[0], "question", 0, 2, **options)
