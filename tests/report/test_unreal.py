"""Routing that no router made is recognised, and nothing else is."""

from pathlib import Path

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.formats import open_input
from moetuner.report.structure import structure
from moetuner.report.unreal import find_unreal

DATA = Path("/work/shared/data")
RECORDINGS = sorted(DATA.glob("*.npz"))


@pytest.fixture(autouse=True)
def _short_searches(monkeypatch):
    """Structure between layers is measured without a search here."""
    monkeypatch.setattr("moetuner.report.structure.ITERATIONS", 100)


def find(traffic):
    """Return the kind of the finding; None without one."""
    finding = find_unreal(traffic, structure(traffic))
    return None if finding is None else finding.kind


def draw_random(tokens, layers, experts, top_k, seed=0):
    """Draw distinct experts of every token and layer, all equally often."""
    order = np.random.default_rng(seed).random((tokens, layers, experts)).argsort(axis=2)
    return order[..., :top_k]


def deal(tokens, layers, experts, top_k, step=None):
    """Deal experts in turns: a token's begin ``step`` behind those of the one before."""
    first = np.arange(tokens) * (top_k if step is None else step)
    turns = (first[:, None] + np.arange(top_k)) % experts
    return np.repeat(turns[:, None], layers, axis=1)


def label(ids, experts):
    """Make a trace of sequences of 50 tokens."""
    return trace_of(ids, experts, sequence=np.arange(len(ids)) // 50)


SIZES = [
    (20_000, 1, 8, 2),
    (5000, 24, 8, 4),
    (4000, 4, 16, 2),
    (3000, 8, 64, 8),
    (20_000, 4, 128, 8),
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_routing_is_named(sizes, seed):
    """With sequences and without them."""
    ids = draw_random(*sizes, seed)
    assert find(label(ids, sizes[2])) == "random routing"
    assert find(trace_of(ids, sizes[2])) == "random routing"


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("step", [None, 1])
def test_routing_in_turns_is_named(sizes, step):
    """Though neighbouring tokens and layers share experts."""
    assert find(label(deal(*sizes, step), sizes[2])) == "routing in turns"


@pytest.mark.parametrize("tokens", [1, 2, 50, 200])
def test_few_tokens_say_nothing(tokens):
    """Rather than something wrong."""
    for ids in (draw_random(tokens, 2, 64, 2), deal(tokens, 2, 64, 2)):
        assert find(trace_of(ids, 64)) is None


@pytest.mark.parametrize("kind", ["loads", "neighbours", "layers"])
def test_one_thing_beyond_chance_is_enough(kind):
    """Loads that differ, tokens like the ones before, or layers that follow each other."""
    ids = draw_random(8000, 4, 16, 2)
    if kind == "loads":
        ids[:1200, :, 0], ids[:1200, :, 1] = 3, 5
    elif kind == "neighbours":
        ids[1::10] = ids[:-1:10]
    else:
        ids[::5] = ids[::5, :1]
    assert find(label(ids, 16)) is None


def test_all_experts_are_not_dealt_out():
    """Where every token uses all of them, loads are equal in any routing."""
    assert find(trace_of(np.tile(np.arange(4), (5000, 2, 1)), 4)) is None


@pytest.mark.parametrize(
    ("mean", "spread", "expected"),
    [(5000, 0, "even loads"), (215, 0, "even loads"), (195, 0, None), (5000, 0.1, None)],
)
def test_counts_alone_say_that_loads_are_even(mean, spread, expected):
    """Of many tokens; loads that differ by a tenth are not."""
    random = np.random.default_rng(3)
    share = 1 + spread * random.standard_normal((4, 64))
    load = np.maximum(random.poisson(mean / 4 * share, (4, 4, 64)), 0)
    assert find(mt.RoutingStatistics.from_load(load)) == expected


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("shown", [1.0, 0.02])
def test_real_recordings_are_real(path, shown):
    """Nor are their first tokens random, nor their loads."""
    traffic = open_input(path)
    traffic = traffic.take(np.arange(traffic.length) < max(shown * traffic.length, 1))
    if traffic.ordered:
        traffic = traffic.take(np.arange(traffic.length) < 5000)
    assert find(traffic) is None


@pytest.mark.skipif(not RECORDINGS, reason=f"{DATA} has no recordings")
def test_there_are_recordings():
    """So that the test above has cases."""
    assert len(RECORDINGS) > 3


def test_the_bundled_trace_is_real():
    """And so are its loads."""
    trace = mt.RoutingTrace.load(Path(mt.__file__).parent / "data" / "small-moe.safetensors")
    assert find(trace) is None
    assert find(mt.RoutingStatistics.from_trace(trace)) is None
