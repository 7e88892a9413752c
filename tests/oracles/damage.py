"""What holds of every file that is read: all of it is valid, or one line says what is not."""

import re

import numpy as np
import pytest

import moetuner as mt


def check_line(error, path=""):
    """Assert that an error is one line of readable length that names the file."""
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) < 600, text
    assert str(path) in text


def check_reading(path, content, read):
    """Read a file and everything in it: all of it is valid, or one line says what is not."""
    path.write_bytes(content)
    try:
        traffic = read(path)
        if isinstance(traffic, mt.RoutingTrace):
            check_trace(traffic)
        else:
            assert traffic.window_load.dtype == np.uint64
            assert 0 not in traffic.window_load.shape
            assert len(traffic.fingerprint) == 16
    except (ValueError, OSError) as error:
        check_line(error, path.parent)
    else:
        return True


def check_trace(trace):
    """Assert that every rule of traces is kept, whatever the file said."""
    shards = list(trace.shards(64))
    tokens = sum(len(shard) for shard in shards)
    assert tokens == trace.tokens
    for shard in shards:
        assert shard.dtype in (np.uint8, np.uint16)
        assert int(shard.max(initial=0)) < trace.num_experts
        assert (np.diff(np.sort(shard, axis=2)) != 0).all()
    for labels in (trace.sequence, trace.group):
        assert labels is None or labels.shape == (tokens,)
    if trace.group is not None and tokens:
        assert 0 <= trace.group.min() <= trace.group.max() < len(trace.group_names)
    if trace.num_experts <= 512 and trace.layers <= 64:
        counted = mt.RoutingStatistics.from_trace(trace, window=7)
        assert counted.window_load.sum() == tokens * trace.layers * trace.top_k


def refused(words, path, act):
    """Assert that an act is refused by these words, in one line that names the file first."""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        act()
    check_line(caught.value, path)
