"""What engines do, as settings of a problem: they can load what comes out."""

import numpy as np
import pytest

import moetuner as mt
from moetuner.formats import WRITERS, write_placement
from moetuner.formats.engines import ENGINES
from moetuner.formats.hints import Hints
from moetuner.formats.layout import check_placement

STATISTICS = mt.RoutingStatistics.from_load(np.random.default_rng(0).integers(1, 99, (2, 3, 12)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["joint", "eplb", "contiguous"])
def test_an_engine_can_load_it(tmp_path, engine, method):
    """Placements of problems with an engine's settings break none of its constraints."""
    spare = {"slots_per_device": 4} if ENGINES[engine].may_copy else {}
    topology = mt.Topology(4)
    actual = mt.engine_settings(engine, STATISTICS, topology, **spare)
    problem = mt.Problem(STATISTICS, topology, objective="balance", **actual)
    result = mt.solve(problem, method, iterations=200)
    check_placement(result.placement, engine)
    for name, writer in WRITERS.items():
        if writer.engine == engine:
            path = tmp_path / f"map{writer.suffixes[0]}"
            write_placement(result.placement, name, path, Hints(dense_layers=()))


def test_facts():
    """The regime of all; the splits that engines have."""
    splits = {"vllm": "even", "sglang": "nearest", "tensorrt-llm": "round_robin"}
    for engine in ENGINES:
        actual = mt.engine_settings(engine, STATISTICS, mt.Topology(4))
        assert actual["regime"] == "dispatch"
        assert actual["split"] == splits.get(engine, "even")
        serves = engine not in ("megatron", "deepspeed", "transformers")
        assert actual["arrival"] == ("mixed" if serves else "bursts")
        assert actual["fill_slots"] is serves
        assert actual["slots_per_device"] == 3


def test_slots_over_all_layers():
    """As many as make equal slots are taken as those."""
    actual = mt.engine_settings("vllm", STATISTICS, mt.Topology(4), extra_slots=12)
    assert actual["slots_per_device"] == 4
    topology = mt.Topology(4, slots_per_device=[5, 5, 5, 5])
    assert mt.engine_settings("vllm", STATISTICS, topology)["slots_per_device"] == 5


def test_groups_of_the_router():
    """They stay whole where experts are renumbered, and are nobody's business elsewhere."""
    topology = mt.Topology(4)
    actual = mt.engine_settings("megatron", STATISTICS, topology, router_groups=2)
    result = mt.solve(mt.Problem(STATISTICS, topology, objective="balance", **actual))
    assert np.array_equal(result.placement.device_of // 2, np.tile(np.arange(12) // 6, (3, 1)))
    assert "forbidden" not in mt.engine_settings("vllm", STATISTICS, topology, router_groups=2)
