"""Megatron-Core routes on two ranks: its trace is read, a permuted checkpoint computes the same."""

from __future__ import annotations

import numpy as np
import pytest
from serving import folder_of, free_port, moetuner, order_of, program

import moetuner as mt

EXPERTS, RANKS, STEPS, LAYERS = 8, 2, 3, (1, 3)


@pytest.fixture(scope="module")
def recorded():
    folder = folder_of("megatron")
    program("megatron_route.py", [folder, free_port()], {}, folder)
    return folder


@pytest.fixture(scope="module")
def trace(recorded):
    out = recorded / "trace.safetensors"
    files = sorted(recorded.glob("router_trace_rank*.jsonl"))
    moetuner("convert", *files, "--num-experts", EXPERTS, "--out", out)
    return mt.RoutingTrace.load(out)


def replayed(folder) -> np.ndarray:
    """Return the replay's ids [D,W,T,L,K] by rank and step."""
    actual = []
    for rank in range(RANKS):
        with np.load(folder / f"replay-{rank}.npz") as steps:
            names = [[f"step{step}.layer{layer}" for layer in LAYERS] for step in range(STEPS)]
            actual.append([np.stack([steps[name] for name in of], axis=1) for of in names])
    return np.array(actual)


def test_trace_is_what_the_replay_recorded(recorded, trace):
    """The tracer's lines are read as the ids that RouterReplay keeps; a rank is a group."""
    assert trace.num_experts == EXPERTS
    assert len(trace.group_names) == RANKS
    actual = np.sort(np.asarray(trace.expert_ids), axis=2)
    by_step = replayed(recorded).swapaxes(0, 1)  # the ranks of a step one after the other
    assert actual.tolist() == np.sort(by_step, axis=4).reshape(actual.shape).tolist()


def test_arrays_of_the_replay_are_read(recorded, trace):
    """RouterReplay's arrays hold the same routing as the trace, in the order of time."""
    out = recorded / "replay.safetensors"
    files = sorted(recorded.glob("replay-*.npz"))
    moetuner("convert", *files, "--num-experts", EXPERTS, "--out", out)
    actual = np.asarray(mt.RoutingTrace.load(out).expert_ids)
    by_step = replayed(recorded).swapaxes(0, 1)
    assert actual.tolist() == by_step.reshape(actual.shape).tolist()


def test_permuted_checkpoint_computes_the_same(recorded, trace):
    """Experts renumbered over both ranks: the same states come out, and ids map back."""
    statistics = mt.RoutingStatistics.from_trace(trace, window=12, sets=True)
    placement = mt.solve(mt.Problem(statistics, mt.Topology(devices=RANKS))).placement
    folder = folder_of("megatron-permuted")
    placement.save(folder / "placement.json")
    arguments = [folder, free_port(), folder / "placement.json"]
    program("megatron_route.py", arguments, {}, folder)
    order = order_of(placement)
    assert (order != np.arange(EXPERTS)).any()
    back = order[np.arange(placement.layers)[:, None], replayed(folder)]
    assert back.tolist() == replayed(recorded).tolist()
    for rank in range(RANKS):
        before, after = (np.load(of / f"states-{rank}.npy") for of in (recorded, folder))
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
