"""Megatron-Core's router trace and RouterReplay: rows of the same tokens, and what is missing."""

from functools import partial

import numpy as np
import pytest
from engines_files import GOLDEN, megatron_lines, save_torch
from engines_files import write_megatron as write
from make import random_ids

import moetuner as mt
from moetuner.formats import find_reader

LAYERS = (1, 2, 4)  # layer 0 is dense, and so is 3
lines_of = partial(megatron_lines, layers=LAYERS)


@pytest.fixture
def recorded(tmp_path):
    """Two ranks, three steps, two microbatches in each; the ids of all in order of time."""
    rng = np.random.default_rng(0)
    lines, expected = {0: [], 1: []}, []
    for step in range(3):
        for turn in range(2):
            for rank in lines:
                ids = random_ids(int(rng.integers(3, 7)), 3, 2, 8, seed=10 * step + turn + rank)
                lines[rank] += lines_of(ids, step, rank)
                expected.append((rank, ids))
    for rank, of in lines.items():
        write(tmp_path, rank, of)
    return tmp_path, lines, expected


def test_microbatches_line_up(recorded):
    """Rows of all layers are those of the same tokens; sequences and ranks are kept."""
    folder, _, expected = recorded
    assert find_reader(folder) == "megatron"
    actual = mt.open_input(folder, num_experts=8)
    assert np.array_equal(actual.expert_ids, np.concatenate([ids for _, ids in expected]))
    sizes = [len(ids) for _, ids in expected]
    assert actual.sequence.tolist() == np.repeat(np.arange(12), sizes).tolist()
    assert actual.group.tolist() == np.repeat([rank for rank, _ in expected], sizes).tolist()
    assert actual.group_names == ("rank 0", "rank 1")
    files = [folder / f"router_trace_rank{rank}.jsonl" for rank in (1, 0)]
    assert np.array_equal(mt.open_input(files, num_experts=8).expert_ids, actual.expert_ids)
    one = mt.open_input(files[0], num_experts=8)
    assert one.group_names == ("rank 1",)
    assert np.array_equal(one.expert_ids, actual.select(groups="rank 1").expert_ids)


def test_lines_of_prediction_are_apart(recorded):
    """Layers of multi-token prediction, and lines that Python alone can read, change nothing."""
    folder, lines, _ = recorded
    before = mt.open_input(folder, num_experts=8)
    mtp = megatron_lines(random_ids(4, 1, 2, 8), 0, 0, [0], "mtp")[0] | {"mtp_idx": 0}
    odd = [dict(line, extra=float("nan")) for line in lines[0]]
    write(folder, 0, [mtp, *odd, mtp])
    assert np.array_equal(mt.open_input(folder, num_experts=8).expert_ids, before.expert_ids)


def test_steps_without_tokens(tmp_path):
    """A rank may have had no tokens."""
    empty = lines_of(np.zeros((0, 3, 2), int), 0, 0)
    write(tmp_path, 0, [*empty, *lines_of(random_ids(3, 3, 2, 8), 1, 0)])
    assert mt.open_input(tmp_path, num_experts=8).tokens == 3


def test_stages_of_a_pipeline(tmp_path):
    """Ranks with other layers of the same tokens are joined, in the order of ranks."""
    ids = {rank: random_ids(5 + rank, 3, 2, 8, seed=rank) for rank in range(2)}
    for rank, of in ids.items():
        for stage, layers in enumerate((LAYERS[:1], LAYERS[1:])):
            at = slice(0, 1) if stage == 0 else slice(1, 3)
            number = rank + 2 * stage
            write(tmp_path, number, megatron_lines(of[:, at], 0, number, layers))
    actual = mt.open_input(tmp_path, num_experts=8)
    assert np.array_equal(actual.expert_ids, np.concatenate([ids[0], ids[1]]))
    assert actual.group_names == ("rank 0", "rank 1")
    write(tmp_path, 3, megatron_lines(ids[0][:, 1:], 0, 3, LAYERS[1:]))
    with pytest.raises(ValueError, match="step 0, rank 1: layers must have the same tokens"):
        mt.open_input(tmp_path, num_experts=8)
    (tmp_path / "router_trace_rank3.jsonl").unlink()
    with pytest.raises(ValueError, match=r"must have ids of each of layers .1, 2, 4., got none"):
        mt.open_input(tmp_path, num_experts=8)


def test_missing_ranks_and_experts(recorded):
    """A gap among ranks is a missing file; the number of experts must be given."""
    folder, lines, _ = recorded
    with pytest.raises(ValueError, match="num_experts is needed: the file does not say it"):
        mt.open_input(folder)
    write(folder, 3, [line | {"rank": 3} for line in lines[1]])
    with pytest.raises(ValueError, match="files of ranks 0 to 3, one of each, got none of rank 2"):
        mt.open_input(folder, num_experts=8)
    text = (folder / "router_trace_rank3.jsonl").read_text()
    (folder / "router_trace_rank2.jsonl").write_text(text[:-40])
    with pytest.raises(ValueError, match=r"rank2.jsonl: line 18: must be JSON"):
        mt.open_input(folder, num_experts=8)


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_replay(tmp_path, kind):
    """Arrays [T,K] of every layer, in both containers."""
    ids = random_ids(9, 3, 2, 8, dtype=np.int64)
    arrays = [np.ascontiguousarray(ids[:, layer]) for layer in range(3)]
    path = tmp_path / f"replay.{kind}"
    if kind == "npz":
        np.savez(path, *arrays)
    else:
        save_torch(path, arrays)
    assert find_reader(path) == "megatron"
    assert np.array_equal(mt.open_input(path, num_experts=8).expert_ids, ids)
    if kind == "npz":
        np.savez(path, arrays[0], arrays[1][:-1])
        with pytest.raises(ValueError, match="layers must have the same tokens"):
            mt.open_input(path, num_experts=8)


def test_what_megatron_wrote():
    """The tracer's files of two ranks say what RouterReplay recorded, in the order of experts."""
    folder = GOLDEN / "megatron"
    trace = mt.open_input(folder, num_experts=8)
    assert (trace.tokens, trace.layers, trace.top_k) == (72, 2, 2)
    files = [folder / f"replay-{rank}.npz" for rank in range(2)]
    replays = [mt.open_input(file, num_experts=8) for file in files]
    both = mt.open_input(files, num_experts=8)
    assert both.group_names == ("rank 0", "rank 1")
    for rank, replay in enumerate(replays):
        assert np.array_equal(both.select(groups=f"rank {rank}").expert_ids, replay.expert_ids)
        mine = trace.select(groups=f"rank {rank}")
        assert np.array_equal(mine.expert_ids, np.sort(replay.expert_ids))
        assert replay.sequence.tolist() == np.repeat([0, 1, 2], 12).tolist()
    assert not np.array_equal(*(replay.expert_ids for replay in replays))
