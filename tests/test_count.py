"""Counted recordings add up, and are as good as what they were counted from."""

from dataclasses import replace
from functools import reduce
from itertools import pairwise, permutations
from operator import add

import make
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import moetuner as mt
from moetuner.counting import total
from moetuner.recording import population

EXPERTS = 5
# Stretches of a known trace that are kept, the hash of the first one and of the trace, and limit.
PLACES = [4, 13]
HASHES = (2321134885634292665, 4273263763078206853, 4476729018262760858)


@pytest.fixture(autouse=True, scope="module")
def short_stretches():
    """Cut recordings into stretches of four tokens, or two windows."""
    before = dict(population.STRETCH)
    population.STRETCH.update(token=4, window=2)
    yield
    population.STRETCH.update(before)


def written(recording, path):
    """Give the bytes of a recording's file."""
    recording.save(path)
    return path.read_bytes()


def in_pieces(recording, cuts):
    """Give runs of rows of a recording that end at the cuts."""
    ends = [0, *sorted(cuts), recording.length]
    rows = np.arange(recording.length)
    return [recording.take(rows[begin:end]) for begin, end in pairwise(ends)]


def rows_of(recording):
    """Give what is in the rows of a recording, without their labels."""
    if recording.ordered:
        return [row.tobytes() for row in recording.expert_ids]
    return [row.astype("<u8").tobytes() for row in recording.window_load]


def choose_rows(shards, sample):
    """Oracle: the stretches of all recordings by their hash, as many whole ones as fit, sorted."""
    rows_of_hash, seen = {}, set()
    for shard in shards:
        everything = mt.count(shard, sample=1 << 20)
        about, rows = everything.population, rows_of(everything)
        if about.recording_hashes[0] in seen:
            continue
        seen.add(about.recording_hashes[0])
        for number, size in zip(about.stretch_hash, about.stretch_rows.astype(int), strict=True):
            rows_of_hash.setdefault(int(number), []).extend(rows[:size])
            del rows[:size]
    kept = []
    for number in sorted(rows_of_hash):
        if kept and len(kept) + len(rows_of_hash[number]) > sample:
            break
        kept += rows_of_hash[number]
    return sorted(kept)


@st.composite
def shards(draw):
    """Traces or load tables of one model, labelled or not; some are empty, two may be one."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    is_trace, has_groups = draw(st.booleans()), draw(st.booleans())
    has_sequences, lengths = (
        draw(st.booleans()),
        draw(st.lists(st.integers(0, 40), min_size=2, max_size=4)),
    )
    recordings = []
    for length in lengths:
        labels = {"model": "m"}
        if has_groups:
            labels |= {"group": rng.integers(0, 2, length), "group_names": ["a", "b", "none"]}
        if is_trace:
            ids = rng.random((length, 2, EXPERTS)).argsort(axis=2)[..., :2]
            if has_sequences:
                labels["sequence"] = np.sort(rng.integers(-3, 4, length))
            recordings.append(mt.RoutingTrace.from_arrays(ids, num_experts=EXPERTS, **labels))
        else:
            load = rng.integers(0, 9, (length + 1, 2, EXPERTS))
            labels |= {"group": rng.integers(0, 2, length + 1)} if has_groups else {}
            recordings.append(mt.RoutingStatistics.from_load(load, window=7, **labels))
    return recordings + recordings[:1] * draw(st.booleans())


@pytest.mark.filterwarnings("ignore:recording .* is in both counts")
@settings(max_examples=30)
@given(
    shards(),
    st.integers(1, 60),
    st.sampled_from(["times", "equal times", "none"]),
    st.randoms(use_true_random=False),
)
def test_sums_are_the_same_in_any_order(tmp_path_factory, shards, sample, times, random):
    """Bit by bit, whatever is added first; loads are exact, and the sample is that of all.

    Recordings without a time are in the order of adding, whatever the grouping.
    """
    path = tmp_path_factory.mktemp("counts") / "counts.safetensors"
    time = {"times": lambda n: n // 2, "equal times": lambda _: 7, "none": lambda _: None}[times]
    counted = [
        mt.count(shard, sample=sample, time=time(number)) for number, shard in enumerate(shards)
    ]
    expected = reduce(add, counted)
    for _ in range(4):
        left = counted if times == "none" else random.sample(counted, len(counted))
        while len(left) > 1:
            first = random.randrange(len(left) - 1)
            left = [*left[:first], left[first] + left[first + 1], *left[first + 2 :]]
        assert written(left[0], path) == written(expected, path)
    about = expected.population
    assert about.recordings == len(shards)
    if times != "equal times":
        numbers = {mt.count(shard).population.recording_hashes[0]: 0 for shard in shards}
        place = {number: position for position, number in enumerate(numbers)}
        # Within a time, recordings are in no order of ours.
        places = [place[number] // (1 + (times == "times")) for number in about.stretch_recording]
        assert places == sorted(places)
    loads = np.zeros(about.load.shape, np.int64)
    for shard in shards:
        for row in range(shard.length):
            group = 0 if shard.group is None else shard.group[row]
            for layer in range(shard.layers):
                if shard.ordered:
                    np.add.at(loads[group, layer], shard.expert_ids[row, layer], 1)
                else:
                    loads[group, layer] += shard.window_load[row, layer].astype(np.int64)
    assert np.array_equal(about.load, loads)
    assert about.size == sum(shard.length for shard in shards)
    assert sorted(rows_of(expected)) == choose_rows(shards, sample)
    for shard, of_shard in zip(shards, counted, strict=True):
        assert sorted(rows_of(of_shard)) == choose_rows([shard], sample)


@settings(max_examples=30)
@given(st.data())
def test_pieces_of_a_recording_add_up_to_it(data):
    """Wherever it is cut, also inside a sequence: rows, labels and groups are those it had.

    But for two pieces that have tokens of one and the same sequence alone.
    """
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    sequence = np.repeat(range(len(lengths)), lengths)
    ids = make.random_ids(len(sequence), 2, 2, EXPERTS, seed=len(sequence))
    whole = make.trace_of(
        ids, EXPERTS, sequence=sequence, group=sequence % 2, group_names=["a", "b"], model="m"
    )
    cuts = data.draw(st.sets(st.integers(0, whole.tokens), max_size=3))
    pieces = in_pieces(whole, cuts)
    alone = [piece.sequence[0] for piece in pieces if piece.sequences == 1]
    assume(len(alone) == len(set(alone)))
    counts = [mt.count(piece, time=number) for number, piece in enumerate(pieces)]
    counted = total(data.draw(st.permutations(counts)))
    assert np.array_equal(counted.expert_ids, whole.expert_ids)
    assert np.array_equal(counted.group, whole.group)
    assert np.array_equal(counted.sequence, whole.sequence)


def test_sequences_of_different_recordings_are_different():
    """Recordings that number their sequences from 0 each have sequences of their own in the sum."""
    one, other = (make.trace(40, seed=seed, groups=None) for seed in (0, 1))
    counted = mt.count(one) + mt.count(other)
    assert counted.sequences == counted.population.sequences == 8
    parts = [counted.expert_ids[counted.sequence == label] for label in range(8)]
    expected = [*np.split(one.expert_ids, 4), *np.split(other.expert_ids, 4)]
    assert {part.tobytes() for part in parts} == {part.tobytes() for part in expected}
    assert np.array_equal(
        np.sort(counted.population.find_labels(np.arange(8))), [0, 0, 1, 1, 2, 2, 3, 3]
    )
    # Rows of a recording stay together.
    assert np.count_nonzero(np.diff(counted.population.stretch_recording)) == 1
    # Recordings of one sequence each, as files of requests are, have nothing of each other.
    alone = [make.trace(20, seed=seed, length=20, groups=None) for seed in range(3)]
    assert total(map(mt.count, alone)).sequences == 3
    # Labels of one begin inside those of the other: they are no pieces of one recording.
    shifted = replace(other, sequence=other.sequence + 2)
    assert (mt.count(one) + mt.count(shifted)).sequences == 8
    # Where one has no labels, sequences of the sum are not known.
    unlabelled = mt.count(one) + mt.count(replace(other, sequence=None))
    assert unlabelled.sequences is unlabelled.population.sequences is None
    # Added twice, a recording is no other one.
    with pytest.warns(UserWarning, match="is in both counts"):
        assert (mt.count(one) + mt.count(one)).sequences == 4


def test_a_recording_that_is_added_twice_is_named(ok, tmp_path):
    """By its hash, and by its file; its tokens count twice, and are in the sample once."""
    for number in range(2):
        make.trace(80, seed=number).save(tmp_path / f"{number}.safetensors")
    one, other = (mt.count(make.trace(80, seed=number), sample=48) for number in range(2))
    name = f"{int(one.population.recording_hashes[0]):016x}"
    with pytest.warns(UserWarning, match=f"recording {name} is in both counts") as warned:
        counted = reduce(add, [one, other, one, one])
    assert len(warned) == 2
    assert warned[0].filename == __file__
    assert counted.population.repeated == {name: 3}
    assert counted.tokens <= 48
    assert rows_of(counted) == rows_of(one + other)
    assert (counted.population.load == 3 * one.population.load + other.population.load).all()
    # Recordings without rows are no recording that is there twice.
    empty = mt.count(make.trace(80, seed=0).take(np.arange(0)), sample=48)
    assert (empty + empty).population.repeated == {}
    files = [tmp_path / name for name in ("0.safetensors", "1.safetensors", "counts.safetensors")]
    ok("convert", files[0], "--count", "--out", files[2])
    twice = tmp_path / "twice.safetensors"
    said = ok("convert", files[2], files[1], files[0], "--count", "--out", twice)
    (name,) = mt.RoutingTrace.load(twice).population.repeated
    assert f"! 0.safetensors: recording {name} is in both counts" in said
    assert f"counted more than once: {name} (2 times)" in ok("inspect", twice)
    # Files that are added as they are read: a line of INPUT says it.
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files[2].read_bytes())
    assert f"counted more than once: {name} (2 times)" in ok("inspect", files[2], copy)


def test_names_of_all_recordings_are_remembered():
    """A recording without a name between two models does not let them add up, in any order."""
    recordings = {
        name: mt.count(make.trace(40, seed=seed, model=name))
        for seed, name in enumerate(["a", None, "b"])
    }
    assert (recordings["a"] + recordings[None]).model == "a"
    for order in permutations(recordings):
        with pytest.raises(ValueError, match=r"must have the same model, got '[ab]'"):
            total(recordings[name] for name in order)
    sized = replace(recordings[None], expert_size=(8, 8))
    assert (recordings["a"] + sized).expert_size == (8, 8)


@pytest.mark.parametrize("is_trace", [True, False])
def test_counts_that_contradict_themselves_are_refused(is_trace):
    """Loads and rows are at least those of the sample, and as many where it has all."""
    recording = make.trace(80)
    if not is_trace:
        recording = mt.RoutingStatistics.from_trace(recording, window=4, by_group=True)
    for sample in (40 if is_trace else 4, 4000):
        counted = mt.count(recording, sample=sample)
        about = counted.population
        few, more = {}, {}
        for name in ("load", "rows"):
            table = getattr(about, name)
            few[name], more[name] = 0 * table, 3 * table
            with pytest.raises(ValueError, match=r"(rows|load) of a population must be"):
                replace(counted, population=replace(about, **{name: few[name]}))
        if about.is_whole:
            for name, table in more.items():
                with pytest.raises(ValueError, match="population must"):
                    replace(counted, population=replace(about, **{name: table}))
        else:  # a sample may be of more
            replace(counted, population=replace(about, **more))
    if is_trace:
        # Tokens have as many experts each in every layer.
        load = about.load.copy()
        load[0, 1, 0] += 1
        with pytest.raises(ValueError, match=r"got 81 at \[0, 1\]"):
            replace(counted, population=replace(about, load=load))


def test_sums_that_would_wrap_are_refused():
    """Loads of two recordings that do not fit 63 bits together are not added."""
    load = np.full((1, 1, 2), 1 << 61)
    parts = [mt.count(mt.RoutingStatistics.from_load(load + number)) for number in range(2)]
    with pytest.raises(ValueError, match="must add up to less than"):
        parts[0] + parts[1]
    for name in ("load", "rows", "stretch_rows"):
        table = getattr(parts[0].population, name)
        with pytest.raises(ValueError, match=f"{name} of a population must add up to less than"):
            replace(parts[0].population, **{name: table * 0 + (1 << 63)})


def test_sample_is_of_all_recordings_and_times():
    """Where stretches begin alike, as with a prompt that all share, some of each are drawn."""
    rng = np.random.default_rng(0)
    ids = rng.random((1600, 1, 8)).argsort(axis=2)[..., :2]
    ids[::4] = [[0, 1]]  # the first token of every stretch
    shards = [
        make.trace_of(part, 8, sequence=np.arange(len(part))) for part in np.split(ids, [1200])
    ]
    counted = total(mt.count(shard, sample=400) for shard in shards)
    assert 390 <= counted.tokens <= 400
    assert not counted.population.is_whole
    places = counted.population.stretch_place
    per_recording = np.unique(counted.population.stretch_recording, return_counts=True)[1]
    # 100 of 400 stretches; 75 of them are of the first recording, give or take four deviations.
    assert sorted(per_recording)[0] in range(10, 41)
    assert 70 < np.median(places) < 130  # 100 of the stretches of both are before the 100th


def test_what_is_taken_of_a_sample_is_no_sample():
    """Parts have no population, joining adds, and what was counted stays as it is."""
    counted = mt.count(make.trace(80, model=None))
    assert mt.count(counted) is counted
    for part in (*mt.hold_out(counted), *counted.split(0.5), counted.select(layers=[0])):
        assert part.population is None
    assert counted.select().population is counted.population
    joined = mt.RoutingTrace.concat([counted, mt.count(make.trace(40, seed=1, model=None))])
    assert joined.population.recordings == 2
    table = mt.count(mt.RoutingStatistics.from_trace(make.trace(80), window=4))
    assert table.coactivation is None
    for part in (*mt.hold_out(table), table.joined(8), table.per_step(4), *table.split(0.5)):
        assert part.population is None


@pytest.mark.parametrize("is_trace", [True, False])
def test_files_keep_everything(tmp_path, is_trace):
    """What is read adds up like what was written, with groups, sequences and labels."""
    recordings = [make.trace(80, seed=seed) for seed in range(3)]
    if not is_trace:
        recordings = [
            mt.RoutingStatistics.from_trace(trace, window=4, by_group=True) for trace in recordings
        ]
    counted = (mt.count(recording, sample=40) for recording in recordings)
    one, other, third = (
        replace(count, population=replace(count.population, unreadable=number))
        for number, count in enumerate(counted)
    )
    path = tmp_path / "counts.safetensors"
    (one + other).save(path)
    read = type(one).load(path)
    assert read.population == (one + other).population
    assert (read + third).population.unreadable == 3
    assert written(read + third, path) == written(one + other + third, path)


def test_answers_are_those_of_the_trace(brief, tmp_path):
    """Figures of advise, and the placement of solve on a half, are the same from pieces of it."""
    trace = make.trace(1600, groups=["a", "b", "none"])
    counted = total(mt.count(piece) for piece in in_pieces(trace, [400, 900]))
    answers = [
        mt.advise(recording, mt.Topology(4), window=32, copies=[0], seed=3).to_dict()
        for recording in (trace, counted)
    ]
    assert answers[0] == answers[1]
    placements = [
        mt.solve(mt.Problem(mt.hold_out(recording, seed=1)[0], mt.Topology(4))).placement
        for recording in (trace, counted)
    ]
    assert placements[0] == placements[1]


def test_commands_write_what_python_does(ok, tmp_path):
    """Files of a folder are recordings each, and what was counted before is added as it is."""
    (tmp_path / "shards").mkdir()
    traces = [make.trace(80, seed=seed) for seed in range(4)]
    for number, trace in enumerate(traces[:3]):
        trace.save(tmp_path / "shards" / f"{number}.safetensors")
    before = mt.count(traces[3])
    before = replace(before, population=replace(before.population, unreadable=2))
    before.save(tmp_path / "before.safetensors")
    files = [tmp_path / name for name in ("shards", "before.safetensors", "counts.safetensors")]
    ok("convert", *files[:2], "--count", "--out", files[2])
    expected = total([*map(mt.count, traces[:3]), before])
    assert files[2].read_bytes() == written(expected, tmp_path / "expected.safetensors")
    assert expected.population.unreadable == 2


def test_hashes_are_the_same_on_every_machine():
    """The sample of a known trace is known, whatever type its ids have in the file."""
    ids = (np.arange(60)[:, None, None] + np.arange(2)) % EXPERTS
    for dtype in (np.uint8, np.uint16, np.int64):
        about = mt.count(make.trace_of(ids.astype(dtype), EXPERTS), sample=8).population
        assert about.stretch_place.tolist() == PLACES
        assert (int(about.stretch_hash[0]), int(about.stretch_recording[0]), about.limit) == HASHES
