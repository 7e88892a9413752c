"""Ids in files: what is read ahead is what is read in turn."""

import threading

import numpy as np
import pytest

import moetuner as mt


@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_what_is_read_ahead_is_what_is_in_the_file(make_trace, tmp_path, tokens):
    """Every shard once and in order, selected or not; who stops early leaves no thread behind."""
    trace = make_trace(tokens)
    trace.save(tmp_path / "t.safetensors")
    stored = mt.RoutingTrace.load(tmp_path / "t.safetensors")
    row = trace.layers * trace.top_k
    for one, other in ((stored, trace), (stored.select(layers=[1]), trace.select(layers=[1]))):
        shards = [*one.shards(3 * row)]
        assert (np.concatenate(shards) == other.expert_ids).all()
    threads = threading.active_count()
    shards = stored.shards(row)
    next(shards)
    shards.close()
    assert threading.active_count() == threads


def test_what_is_wrong_ahead_is_said_when_it_is_its_turn(make_trace, tmp_path):
    """A file that was cut off: what comes before is read, then the error names the file."""
    path = tmp_path / "t.safetensors"
    make_trace(100).save(path)
    stored = mt.RoutingTrace.load(path)
    row, tokens = stored.layers * stored.top_k, []

    def read():
        for shard in stored.shards(10 * row):
            tokens.extend(shard)
            if len(tokens) == 20:
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size - 30 * row)

    with pytest.raises(ValueError, match=r"t\.safetensors: file shrank"):
        read()
    assert len(tokens) == 70
