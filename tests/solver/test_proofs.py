"""Nobody is told "optimal" or "no placement is below" when it is not so; proofs can be checked."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from unittest import mock

import expectation
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from brute_force import every_layer, small_problem
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make import random_ids, trace_of
from staged import staged
from test_visits import problem_of, proven_by, searched

import moetuner as mt
from moetuner import solver
from moetuner.solver import effort
from moetuner.solver.bounds import pairs
from moetuner.solver.bounds.caps import describe_scope
from moetuner.solver.bounds.loads import LOAD_BOUND
from moetuner.solver.bounds.pairs import pad_layers
from moetuner.solver.bounds.verification import verify
from moetuner.solver.budget import Budget
from moetuner.solver.result import CapsDetails
from moetuner.solver.run import Bound, Stage
from moetuner.statistics.sets import ExpertSets

HUGE = 2**62
# Placements that are held against a claim.
TRIED = 200


def tiny(seed: int) -> mt.Problem:
    """Make a problem whose placements are few enough to be tried, with whatever breaks proofs."""
    rng = np.random.default_rng(seed)
    layers, (experts, devices) = 2, ((2, 2), (3, 2), (4, 2), (2, 3), (3, 3))[rng.integers(5)]
    load = rng.integers(0, 30, (2, layers, experts)).astype(np.uint64)
    load[:, rng.integers(layers), 0] *= np.uint64(rng.choice([1, 10]))
    goal = str(rng.choice(["traffic", "traffic", "traffic", "balance", "time"]))
    if goal == "traffic" and rng.random() < 0.4:
        load *= np.uint64(HUGE // max(int(load.sum()), 1))
    table = rng.integers(0, 9, (layers - 1, experts, experts))
    half = np.triu(rng.integers(0, 9, (layers, experts, experts)), 1)
    sets = None
    if rng.random() < 0.3:
        ids = np.stack([rng.permutation(experts)[:2] for _ in range(4)]).astype(np.uint16)
        sets = (ExpertSets(ids, np.arange(1, 5, dtype=np.uint64)),) * layers
    statistics = mt.RoutingStatistics(load, table, half + half.transpose(0, 2, 1), sets=sets)
    fewest = -(-experts // devices)
    slots = [None, fewest, fewest + 1, [experts] + [1] * (devices - 1)]
    cost = np.triu(rng.integers(0, 4, (devices, devices)), 1)
    cost[0, 1] += not cost.any()
    return mt.Problem(
        statistics,
        mt.Topology(devices, link_cost=cost + cost.T if rng.random() < 0.2 else None),
        slots_per_device=slots[rng.integers(4)],
        regime=str(rng.choice(["follow", "dispatch"])),
        max_imbalance=[None, 1.0, 1.1, 1.3, 1.6][rng.integers(5)],
        objective=goal,
        split=str(rng.choice(["even", "nearest"])),
    )


def some_placements(problem: mt.Problem, seed: int) -> Iterator[mt.Placement]:
    """Give all placements of a problem, or as many as can be tried in a moment."""
    rng = np.random.default_rng(seed)
    layers = [np.array(list(every_layer(problem, rooms))) for rooms in problem.capacity.tolist()]
    if not problem.may_copy:
        layers = [of[(of >= 0).sum(axis=(1, 2)) == problem.num_experts] for of in layers]
    sizes = [len(of) for of in layers]
    chosen = np.arange(np.prod(sizes)) if np.prod(sizes) <= TRIED else None
    if chosen is None:
        chosen = rng.integers(0, np.prod(sizes), TRIED)
    for number in chosen:
        at = np.unravel_index(number, sizes)
        slots = np.stack([of[i] for of, i in zip(layers, at, strict=True)])
        yield mt.Placement(slots, num_experts=problem.num_experts)


def imbalances(problem: mt.Problem, placement: mt.Placement) -> np.ndarray:
    """Largest load over the mean of every layer [L]; copies share as the problem's rule says."""
    load = problem.load.astype(np.float64)
    on = np.einsum(
        "lde,le->ld", expectation.shares(placement, problem.topology, problem.split), load
    )
    return on.max(axis=1) / np.maximum(on.mean(axis=1), 1e-300)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
@example(seed=0)
@mock.patch.object(effort, "POLISHED_SLOTS", 8)
@mock.patch.object(effort, "POLISHED", 1)
def test_no_placement_refutes_a_claim(seed):
    """Every placement, copies included where they are allowed, is held against what is claimed."""
    problem = tiny(seed)
    result = mt.solve(problem, iterations=100)
    own = imbalances(problem, result.placement)
    cap = np.full(problem.layers, problem.max_imbalance or np.inf)
    allowed, least = np.maximum(cap, own) * (1 + 1e-12), np.full(problem.layers, np.inf)
    best = np.inf
    for placement in some_placements(problem, seed):
        needs = imbalances(problem, placement)
        least = np.minimum(least, needs)
        if (needs <= allowed).all():
            best = min(best, problem.objective_function.value(placement))
    slack = 1e-9 * max(best, 1)
    assert result.bound is None or result.bound <= best + slack
    assert (result.bound is None) == (result.bound_scope is None)
    if result.status == "optimal":
        assert result.objective <= best + slack
        assert (own <= np.maximum(cap, least) * (1 + 2e-9)).all()
    for layer in result.details.caps.infeasible:
        assert least[layer] > cap[layer]
    if result.certificate is not None:
        objective = problem.objective_function
        scale = objective.tokens if objective.has_expert_sets else objective.scale
        assert verify(result.certificate, problem) / scale == pytest.approx(result.bound, rel=1e-12)


def test_caps_of_nodes_are_at_most_the_load():
    """No product of a cap and the devices of a node wraps, however large both are."""
    load = np.full((1, 2, 16), HUGE // 32, dtype=np.uint64)
    table = np.ones((1, 16, 16), dtype=np.uint64)
    topology = mt.Topology(16, devices_per_node=8)
    problem = mt.Problem(mt.RoutingStatistics(load, table), topology, regime="follow")
    for cap in (problem.caps.whole, np.full(2, 2**63, np.uint64), np.full(2, 2**64 - 1, np.uint64)):
        assert (pad_layers(problem, cap, 2)[2] == problem.load.sum(axis=1)).all()
    few = np.full(2, HUGE // 32, np.uint64)
    assert (pad_layers(problem, few, 2)[2] == HUGE // 4).all()


@given(seed=st.integers(0, 2**32), largest=st.sampled_from([9, 1000, HUGE // 8]))
def test_what_has_the_imbalance_of_the_cap_keeps_it(seed, largest):
    """A placement whose imbalance is given as the cap is allowed, and nothing that is above it."""
    load = np.random.default_rng(seed).integers(1, largest, (1, 1, 6))
    heaviest, total = int(load[0, 0, :2].sum()), int(load.sum())
    measured = heaviest / (total / 3)
    if measured < 1:
        return
    problem = mt.Problem(mt.RoutingStatistics(load), mt.Topology(3), max_imbalance=measured)
    assert heaviest <= int(problem.caps.whole[0])
    assert Fraction(int(problem.caps.whole[0]) * 3, total) <= Fraction(measured) * (
        1 + Fraction(1, 2**49)
    )


@pytest.mark.parametrize("regime", ["follow", "dispatch"])
def test_copies_are_searched_and_nothing_false_is_proven(tmp_path, regime):
    """With room for copies the answer is no worse than without, and no bound is of singles."""
    single = small_problem(1, 3, 6, 3, regime=regime, slots=2)
    roomy = replace(single, slots_per_device=4)
    before, result = (mt.solve(problem, iterations=300) for problem in (single, roomy))
    assert result.objective <= before.objective
    assert (result.bound, result.bound_scope, result.status) == (None, None, "feasible")
    assert result.certificate is None
    assert not result.details.caps.infeasible
    assert before.bound_scope == "placements with one copy of each expert under the load cap 1.2"
    before.placement.save(tmp_path / "p.json")
    assert mt.Placement.load(tmp_path / "p.json").bound_scope == before.bound_scope


def test_nothing_is_below_nothing():
    """Where every device can hold all experts no token moves, which is the optimum."""
    problem = small_problem(1, 2, 4, 2, slots=4, max_imbalance=None)
    result = mt.solve(problem, iterations=300)
    assert (result.objective, result.bound, result.status) == (0, 0, "optimal")
    assert result.bound_scope == "placements that may have copies"


@pytest.mark.parametrize("claim", ["above the answer", "none", "under a cap others may keep"])
def test_false_claims_are_taken_back(monkeypatch, claim):
    """Whatever a stage claims, an answer that refutes it goes out without."""
    raised, above = claim.startswith("under"), claim.startswith("above")
    problem = small_problem(1, 2, 4, 2, max_imbalance=1.0 if raised else 2.0)
    slots = mt.Placement.from_assignment([[0, 0, 1, 1]] * 2, 2).slots

    def stage(run, _):
        run.offer(slots, "claim")
        if claim != "none":
            cost = problem.objective_function.cost(mt.Placement(slots))
            run.prove(Bound(10**9 if above else cost, "false"))

    monkeypatch.setitem(solver.METHODS, "joint", (Stage(stage),))
    result = mt.solve(problem)
    assert result.status == "feasible"
    if above:
        assert (result.bound, result.gap, result.placement.bound) == (None, None, None)
        assert result.details.bound.refuted == "false"
    if raised:
        assert result.details.caps.raised


def test_raised_caps_are_told_with_the_bound():
    """The scope names the layers whose cap was raised, a few of them."""
    problem = small_problem(1, 2, 4, 2, max_imbalance=1.2)
    text = describe_scope(problem, CapsDetails(dict.fromkeys(range(5), 1.5)))
    layers = ", ".join(f"1.5000 in layer {layer}" for layer in range(3))
    assert text.endswith(f"1.2, raised to {layers} and in 2 more")


def test_nearly_is_not_optimal():
    """A placement that another betters by a ten-millionth is not called optimal."""
    load = np.array([[[10**8 + 10, 10**8 - 10, 20, 0]]])
    problem = mt.Problem(mt.RoutingStatistics(load), mt.Topology(2), objective="balance")
    for device_of, status in (([0, 1, 0, 1], "feasible"), ([0, 1, 1, 0], "optimal")):
        slots = mt.Placement.from_assignment([device_of], 2).slots
        run = staged(problem, LOAD_BOUND, start=slots)
        assert run.is_proven == (status == "optimal")


# The command line, and certificates.

UNDER_A_CAP = ("--devices", 4, "--objective", "traffic", "--max-imbalance", 1.2)


@pytest.fixture
def certified(run, tmp_path):
    """Solve with a certificate: its path, the placement's, the answer, and `verify` of it."""

    def certified(experts=16, layers=2, *, regime="follow", heavy=1, sets=False):
        rng = np.random.default_rng(1)
        load = rng.integers(90, 110, (1, layers, experts))
        load[0, -1, 0] *= heavy
        table = rng.integers(0, 30, (layers - 1, experts, experts))
        half = np.triu(rng.integers(0, 30, (layers, experts, experts)), 1)
        statistics = mt.RoutingStatistics(load, table, half + half.transpose(0, 2, 1))
        if sets:
            ids = random_ids(300, layers, 2, experts, seed=1)
            trace = trace_of(ids, experts)
            statistics = mt.RoutingStatistics.from_trace(trace, sets=True)
        counts, certificate = tmp_path / "counts.safetensors", tmp_path / "proof.safetensors"
        placement = tmp_path / "placement.json"
        statistics.save(counts)
        files = ("--certificate", certificate, "--out", placement, "--json", "-")
        status, out, _ = run("solve", counts, *UNDER_A_CAP, "--regime", regime, *files)
        assert status == 0
        verify = functools.partial(run, "verify", certificate, counts, "--devices", 4)
        return certificate, placement, json.loads(out), verify

    return certified


@pytest.mark.parametrize(
    ("experts", "regime", "method"),
    [
        (8, "follow", "complete dynamic programme"),
        (16, "follow", "dual point"),
        (8, "dispatch", "complete dynamic programme"),
        (16, "dispatch", "dual point"),
        (14, "dispatch", "visits"),
    ],
)
def test_what_solve_writes_verify_proves(certified, experts, regime, method):
    """A dual point, the complete programme or prices, of either regime: the bound of `solve`."""
    _, placement, solved, verify = certified(experts, regime=regime, sets=method == "visits")
    status, out, err = verify("--placement", placement, "--json", "-")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert answer["bound"] == pytest.approx(solved["bound"], rel=1e-12)
    assert answer["objective"] == pytest.approx(solved["objective"])
    assert (answer["method"], answer["regime"]) == (method, regime)
    assert answer["scope"] == "placements with one copy of each expert"


def test_caps_are_told_by_layer_where_they_differ(certified):
    """A sentence with one imbalance would be false of a layer with another cap."""
    *_, verify = certified(8, 3, heavy=20)
    answer = json.loads(verify("--json", "-")[1])["max_imbalance"]
    assert len(answer) == 3
    assert max(answer[:2]) < 1.2001 < answer[2]
    assert f"{answer[2]:.4f} in layer 2" in " ".join(verify()[1].split())
    # With one cap for all layers there is one number, although tokens are whole.
    *_, verify = certified()
    assert json.loads(verify("--json", "-")[1])["max_imbalance"] == 1.2


MALFORMED = {
    "rank": ({"caps": np.ones((1, 3), np.uint64)}, {}),
    "type": ({"caps": np.array([-1.0, np.nan, 1e30])}, {}),
    "rank of a proof": ({"0.cuts": np.zeros((1, 5), np.int32)}, {}),
    "short caps": ({"caps": np.full(1, 2000, np.uint64)}, {}),
    "infinite level": ({}, {"levels": "[[1e999, 1]]"}),
    "levels of text": ({}, {"levels": '["41"]'}),
    "deep levels": ({}, {"levels": "[" * 100_000}),
    "version": ({}, {"version": "4"}),
    "old version": ({}, {"version": "1"}),
    "regime": ({}, {"regime": "other"}),
    "other regime": ({}, {"regime": "dispatch"}),
    "method": ({}, {"method": "trust me"}),
    "slots": ({}, {"slots": "9" * 5000}),
    "negative cost": ({}, {"cost": "-1"}),
    "complete": ({}, {"method": "complete dynamic programme"}),
    # Under a cap below the mean, or below the heaviest expert, everything would be true.
    "got 0 in layer 1": ({"caps": np.array([2000, 0], np.uint64)}, {}),
    "got 105 in layer 1": ({"caps": np.array([2000, 105], np.uint64)}, {}),
}


def test_malformed_certificates_are_refused_in_one_line(certified):
    """A line that says what is wrong, never that moetuner is."""
    certificate, _, _, verify = certified()
    arrays = safetensors.numpy.load_file(certificate)
    with safetensors.safe_open(certificate, framework="numpy") as file:
        metadata = file.metadata()
    for case, (tensors, texts) in MALFORMED.items():
        safetensors.numpy.save_file(arrays | tensors, certificate, metadata=metadata | texts)
        status, _, err = verify()
        assert (status, err.count("\n")) == (2, 1), case
        assert "certificate" in err, case
        assert "bug" not in err, case
        assert not case.startswith("got") or case in err


def test_a_placement_below_the_bound_fails_loudly(certified, monkeypatch):
    """A proof and a placement that contradict each other are not made to agree."""
    _, placement, solved, verify = certified(8)
    assert verify("--placement", placement)[0] == 0
    monkeypatch.setattr(
        "moetuner.cli.verify.verify", lambda certificate, problem, **_: certificate.cost + 1
    )
    status, _, err = verify("--placement", placement)
    assert (status, err.count("\n")) == (2, 1)
    assert "is below the bound" in err
    assert f"{solved['objective']:.6f}" in err


def test_placements_that_the_bound_is_not_about_are_told_apart(certified):
    """Copies, other sizes, and loads above the caps are not compared with the bound."""
    _, placement, _, verify = certified(8)
    mt.Placement.from_assignment([[0] * 8] * 2, 4).save(placement)
    status, out, _ = verify("--placement", placement)
    assert status == 0
    assert "cannot be compared" in " ".join(out.split())
    for slots in ([[[0, 1, 2, 3], [0, 4, 5, 6], [7, -1, -1, -1], [-1] * 4]] * 2, [[[*range(8)]]]):
        mt.Placement(np.array(slots)).save(placement)
        status, _, err = verify("--placement", placement)
        assert (status, err.count("\n")) == (2, 1)
        assert "must have" in err


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--objective", "balance"), "bounds of balance"),
        (("--method", "lpt"), "method lpt"),
        (("--slots-per-device", 6), "copies"),
        (("--pin", "0:0:0"), "rules"),
        (("--time-limit", 0), "no certificate was written"),
    ],
)
def test_no_older_certificate_is_left_beside_an_answer_without(run, tmp_path, more, why):
    """What cannot be proven is refused before any work, and what was there stays.

    Where a solve ends without a proof the command fails, and an old one is not left as its.
    """
    counts, certificate = tmp_path / "counts.safetensors", tmp_path / "proof.safetensors"
    small_problem(1, 2, 16, 4).statistics.save(counts)
    certificate.write_text("of an older solve")
    placement = tmp_path / "placement.json"
    files = ("--certificate", certificate, "--out", placement)
    status, _, err = run("solve", counts, *UNDER_A_CAP, *files, *more)
    assert (status, err.count("\n")) == (2, 1)
    assert why in err
    begun = "--time-limit" in more
    assert ("'--certificate' needs" in err) == (not begun)
    assert (placement.exists(), certificate.exists()) == (begun, not begun)
    assert begun or certificate.read_text() == "of an older solve"


def some_certificate(kind):
    """Return a problem and a certificate of it by one of the ways to prove."""
    if kind in ("prices", "tangents"):
        problem = problem_of(1, 2, (6, 3, None), 3)
        by_tangents = kind == "tangents"
        return problem, proven_by(problem, *searched(problem), by_tangents=by_tangents).certificate
    problem = small_problem(1, 3, 6, 3, slots=2, max_imbalance=None)
    if kind == "complete":
        return problem, mt.solve(problem).certificate
    return problem, pairs.bound(problem, problem.caps.whole, budget=Budget()).certificate


@pytest.mark.parametrize("kind", ["dual point", "complete", "prices", "tangents"])
def test_certificates_are_of_one_problem(tmp_path, kind):
    """What is saved verifies; another problem's, a cut-off or a forged certificate is refused."""
    problem, certificate = some_certificate(kind)
    path = tmp_path / "proof.safetensors"
    certificate.save(path)
    again = mt.Certificate.load(path)
    assert again == certificate
    assert verify(again, problem) == certificate.cost
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a certificate"):
        mt.Certificate.load(path)
    other = mt.RoutingStatistics(problem.load[None] + 1, problem.statistics.transitions)
    with pytest.raises(ValueError, match="of these statistics"):
        verify(again, replace(problem, statistics=other))
    if again.proofs:
        forged = [{"proofs": ()}, {"proofs": (replace(again.proofs[0], parts=2),)}]
    elif again.visits:
        (level,), short = again.visits, "prices" if kind == "prices" else "slopes"
        wrong = [{"parts": 2}, {short: getattr(level, short)[1:]}]
        forged = [{"visits": ()}, *({"visits": (replace(level, **of),)} for of in wrong)]
    else:
        forged = [{"cost": again.cost + 1}, {"caps": problem.load.sum(axis=1), "cost": 0}]
    for changes in forged:
        with pytest.raises(ValueError, match="certificate must"):
            verify(replace(again, **changes), problem)


def capped(**changes):
    """Make a problem of five experts under a cap, changed."""
    statistics = small_problem(3, 3, 5, 2).statistics
    given = {"regime": "follow", "objective": "traffic", "max_imbalance": 1.2, **changes}
    return mt.Problem(statistics, given.pop("topology", mt.Topology(2)), **given)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"max_imbalance": None}, "caps of at least the problem's"),
        ({"max_imbalance": 1.5}, "caps of at least the problem's"),
        ({"slots_per_device": 3}, "one copy of each expert"),
        ({"pinned": [(0, 1, 0), (0, 1, 1)]}, "one copy of each expert"),
        ({"slots_per_device": 4}, "slots per device"),
        ({"regime": "dispatch"}, "regime"),
        ({"topology": mt.Topology(2, speed=[1, 2])}, "equal devices"),
        ({"max_imbalance": 1.0}, None),
        ({"pinned": [(0, 1, 0)]}, None),
    ],
)
def test_a_certificate_is_of_the_placements_that_it_covers(changes, why):
    """Those of tighter caps or with pins are among them; of other caps, copies or devices not."""
    certificate = mt.solve(capped()).certificate
    assert mt.verify(certificate, capped()) == certificate.cost
    if why is None:
        assert mt.verify(certificate, capped(**changes)) == certificate.cost
        return
    with pytest.raises(ValueError, match=why):
        mt.verify(certificate, capped(**changes))
