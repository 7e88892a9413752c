"""advise(): right answers where they are known, and what they are made of."""

from dataclasses import replace

import numpy as np
import pytest
from make import random_ids, trace_of

import moetuner as mt
from moetuner import _checks as check
from moetuner.cost.memory import compute_memory
from moetuner.evaluation.samples import Samples
from moetuner.evaluation.samples.holdout import hold_out
from moetuner.report import recording
from moetuner.report.advice import drift
from moetuner.report.advice.copies import NEAR_BEST, Choice, choose_copies, find_copies
from moetuner.report.advice.values import Copies, compute_saved_us
from moetuner.report.words import write
from moetuner.serving.engines import tokens_per_rank

LAYERS, EXPERTS, TOP_K, LENGTH = 3, 8, 2, 50
TWO_NODES = mt.Topology(4, devices_per_node=2)
BLOCKS = mt.Placement(np.tile(np.arange(EXPERTS).reshape(4, 2), (LAYERS, 1, 1)))


def routed(scores, seed=0, **labels):
    """Trace that picks the experts with the highest scores [T,L,E], with noise of its own."""
    ids = random_ids(len(scores), LAYERS, TOP_K, EXPERTS, seed=seed, liking=scores)
    return trace_of(ids, EXPERTS, length=LENGTH, **labels)


def even(tokens=4000):
    """Scores of experts that nobody prefers."""
    return np.zeros((tokens, LAYERS, EXPERTS))


def skewed(tokens=4000):
    """Scores of experts whose first ones are hot: contiguous placements suffer."""
    return even(tokens) + np.linspace(2, 0, EXPERTS)


def shifted(tokens=4000, seed=1):
    """Scores whose favourites change in the middle, of sequences that differ from each other."""
    rng = np.random.default_rng(seed)
    liking = 1.5 * rng.normal(size=(2, LAYERS, EXPERTS))
    own = 0.5 * rng.normal(size=(-(-tokens // LENGTH), LAYERS, EXPERTS))
    token = np.arange(tokens)
    return liking[(token >= tokens // 2).astype(int)] + own[token // LENGTH]


def advise(traffic, topology, **options):
    """Advise after short searches, on decode alone where there is too little to judge prefill."""
    is_short = isinstance(traffic, mt.RoutingTrace) and traffic.tokens < 4 * 2048
    if is_short and "prefill_share" not in options:
        options = {"window": 512, **options}
    return mt.advise(traffic, topology, **{"iterations": 200, **options})


def numbers_of(advice, kind):
    """Return the numbers of the finding of a kind; None where there is none."""
    return next((each.numbers for each in advice.findings if each.kind == kind), None)


@pytest.fixture(scope="module")
def strong():
    """Advice on skewed traffic with the sizes of the experts known."""
    return advise(routed(skewed()), TWO_NODES, copies=(0, 1), expert_bytes=1e6, splits=2)


def test_a_strong_skew_is_worth_a_trial(strong):
    """The interval is above the price, and the gain of one size of windows is the headline."""
    gain = strong.judged[0].gain
    assert strong.answer == "worth a trial"
    assert gain.interval[0] > 0.02
    assert gain.interval[0] <= gain.gain <= gain.interval[1]
    assert strong.findings[0].kind == "gain of one size of windows"
    assert strong.main.whole["imbalance"].gain > 0


def test_a_change_of_kind_is_not_enough_evidence():
    """A random split hides it, the halves do not; where the order is no matter it is a warning."""
    options = {"copies": (0,), "splits": 1}
    ordered = advise(routed(shifted()), TWO_NODES, **options, in_order=False)
    assert (ordered.answer, ordered.carried) == ("worth a trial", ())
    assert numbers_of(ordered, "drift in any order") is not None
    advice = advise(routed(shifted()), TWO_NODES, **options)
    assert (advice.answer, len(advice.carried)) == ("not enough evidence", 2)
    assert advice.findings[0].kind == "drift"
    assert numbers_of(advice, "order of the recording") is not None


@pytest.mark.parametrize(("seed", "engine"), [(2, None), (3, "vllm")])
def test_known_answers_are_given_for_every_seed(seed, engine):
    """A flat load, a strong skew and a change of kind, in whatever order the engine serves them."""
    options = {"copies": (0,), "splits": 1, "iterations": 50, "engine": engine}
    flat = advise(routed(even(3000), seed), TWO_NODES, **options)
    assert flat.answer == "not now"
    assert abs(flat.judged[0].gain.gain) < 0.02
    assert not flat.drift.is_beyond_chance
    aspects = numbers_of(flat, "little to gain")["aspects"]
    assert "in traffic between devices" in aspects
    assert ("in balance" in aspects) == (abs(flat.main.gains["imbalance"].gain) < 0.02)
    assert advise(routed(skewed(3000), seed), TWO_NODES, **options).answer == "worth a trial"
    advice = advise(routed(shifted(3000, seed), seed), TWO_NODES, **options)
    assert advice.drift.is_beyond_chance
    # With few experts a placement may happen to suit both halves, which is then said.
    carries = min(advice.carried) >= 0.5 * advice.judged[0].gain.gain > 0
    assert advice.answer == ("worth a trial" if carries else "not enough evidence")
    assert numbers_of(advice, "drift that carries" if carries else "drift") is not None


@pytest.mark.parametrize("expert_bytes", [None, 1e6])
def test_nothing_moves_where_the_answer_is_not_now(expert_bytes):
    """A script that reads the JSON alone would else plan moves that gain nothing."""
    trace, options = routed(even(3000)), {"copies": (0,), "splits": 1, "iterations": 50}
    advice = advise(trace, TWO_NODES, expert_bytes=expert_bytes, **options)
    running, proposed = advice.placements
    assert advice.answer == "not now"
    assert running.diff(proposed).experts_moved > 0
    moving = advice.to_dict()["moving"]
    nothing = None if expert_bytes is None else 0
    assert (moving["experts"], moving["bytes"], moving["seconds"]) == (0, nothing, nothing)
    assert moving["of_experts"] == LAYERS * EXPERTS
    if expert_bytes is not None:
        assert moving["device_bytes"][0] == moving["device_bytes"][1]


def test_groups_that_lose_are_named():
    """Who decides on the mean hears of those that pay for it."""
    liked = np.stack([np.linspace(2, 0, EXPERTS), np.tile([2.0, 0], EXPERTS // 2)])
    group = np.where(np.arange(4000) // LENGTH % 5 < 4, 0, 1)
    scores = np.repeat(liked[group][:, None], LAYERS, axis=1)
    trace = routed(scores, group=group, group_names=["many", "few"])
    advice = advise(trace, TWO_NODES, copies=(0,), splits=1, by_group=True, initial=BLOCKS)
    gains = {of: each[512] for of, each in advice.by_group.items()}
    assert gains["few"].low < 0 < gains["many"].low
    assert numbers_of(advice, "groups apart")["gains"] == gains
    assert [of["group"] for of in advice.to_dict()["by_group"]] == [*gains]
    (loser,) = advice.main.worse(measures=("predicted_layer_us",))
    slower = numbers_of(advice, "slower groups")
    assert slower["groups"] == {"few": loser.change.value}
    assert slower["repeat"]["window"] == 512
    # Experts in blocks, the default of an audit, are not what the losses were counted from.
    (audit,) = [warning for warning in advice.warnings if "Slower in" in warning]
    assert audit.endswith("audit(placement, traffic, window=512, baseline=running).")
    # What is not proposed is written nowhere that an audit could read.
    refused = advise(trace, TWO_NODES, copies=(0,), splits=1, price=0.9, initial=BLOCKS)
    assert refused.answer == "not now"
    assert numbers_of(refused, "slower groups") == slower | {"repeat": None}


def test_one_kind_is_not_enough_evidence():
    """Of other groups nothing is known; of one phase the answer stands, for that phase only."""
    group = np.zeros(4000, dtype=int)
    for name, answer in (("code", "not enough evidence"), ("decode", "worth a trial")):
        trace = routed(skewed(), group=group, group_names=[name])
        advice = advise(trace, TWO_NODES, copies=(0,), splits=1)
        assert advice.answer == answer
        assert numbers_of(advice, "one kind of traffic") == {"shows": advice.one_kind}
        assert advice.to_dict()["one_kind"] == advice.one_kind
        several = replace(trace, group=np.arange(4000) // LENGTH % 2, group_names=(name, "more"))
        advice = advise(several, TWO_NODES, copies=(0,), splits=1)
        assert advice.one_kind is None
        assert numbers_of(advice, "one kind of traffic") is None


def windows(*shares, number=6, tokens=10**6, seed=0, **labels):
    """Load table of windows that choose experts by shares [E] in turns."""
    rng = np.random.default_rng(seed)
    load = [[rng.multinomial(tokens, shares[n % len(shares)])] for n in range(number)]
    return mt.RoutingStatistics.from_load(np.array(load), **labels)


def test_a_recording_shows_one_kind_or_several():
    """Windows that differ, groups and what is judged on are several; small windows do not tell."""
    flat, tilted = np.full(EXPERTS, 1 / EXPERTS), np.linspace(1, 2, EXPERTS) / (1.5 * EXPERTS)
    assert np.abs(flat - tilted).sum() / 2 > recording.ALIKE
    alike, differ = windows(flat), windows(flat, tilted)
    assert recording.find_one_kind(alike).startswith("all windows are alike, within 0.")
    assert recording.find_one_kind(windows(flat, number=1)) == "there is one window"
    assert recording.find_one_kind(differ) is None
    assert recording.find_one_kind(windows(flat, tokens=100)) is None
    # One window among many is another kind.
    load = np.concatenate([windows(flat, number=40).window_load, differ.window_load[1:2]])
    assert recording.find_one_kind(mt.RoutingStatistics.from_load(load)) is None
    other = windows(tilted)
    assert recording.find_one_kind(other).startswith("all windows are alike")
    assert recording.find_one_kind(alike, other) is None
    # Labels know better than windows.
    group = np.arange(6) % 2
    assert recording.find_one_kind(replace(alike, group=group, group_names=("en", "zh"))) is None
    labelled = replace(differ, group=group * 0, group_names=("prefill", "decode"))
    assert recording.find_one_kind(labelled) == "all traffic is prefill"
    decode = replace(differ, group=group * 0 + 1, group_names=("prefill", "decode"))
    assert recording.find_one_kind(labelled, decode) is None
    assert recording.find_one_kind(labelled, alike) is None
    assert recording.find_one_kind(routed(even(200))) is None


def test_phases_are_placed_apart():
    """Where prefill and decode are known, each has a placement, and its cost for the other."""
    phase = np.arange(4000) // LENGTH % 2
    other = skewed()[:, :, ::2].repeat(2, axis=2)[:, ::-1]
    scores, names = np.where(phase[:, None, None], skewed(), other), ["prefill", "decode"]
    trace = routed(scores, group=phase, group_names=names)
    phases = advise(trace, TWO_NODES, copies=(0,), splits=1).phases
    times = phases.microseconds
    assert set(times) == {"both", *names}
    assert set(phases.costs) == set(phases.costs_of_one) == set(names)
    assert phases.costs["prefill"] == times["decode"]["prefill"] / times["prefill"]["prefill"] - 1
    assert phases.costs_of_one["decode"] == times["both"]["decode"] / times["decode"]["decode"] - 1
    assert advise(routed(skewed()), TWO_NODES, copies=(0,), splits=1).phases is None


def test_figures_are_those_of_evaluate(strong):
    """What is told of the first split, evaluate and diff find again."""
    _, unseen = routed(skewed()).split(0.5, seed=0)
    how = {"window": 512, "cost_model": mt.CostModel.preset("h100"), "mixed": False}
    for placement, actual in zip(strong.placements, (strong.running, strong.proposed), strict=True):
        again = mt.evaluate(placement, unseen, TWO_NODES, **how)
        assert again.predicted_layer_us == pytest.approx(actual.predicted_layer_us)
        assert np.mean(again.imbalance_per_window) == pytest.approx(again.imbalance)
        assert np.mean(again.predicted_us_per_layer) == pytest.approx(again.predicted_layer_us)
    gain = 1 - strong.proposed.predicted_layer_us / strong.running.predicted_layer_us
    assert strong.main.gain.splits[0] == pytest.approx(gain, abs=1e-3)
    diff = strong.placements[0].diff(strong.placements[1], topology=TWO_NODES, expert_bytes=1e6)
    assert strong.moving[:2] == (diff.experts_moved, diff.bytes_moved)
    slots = [(of.slots >= 0).sum(axis=(0, 2)) for of in strong.placements]
    assert strong.moving.of_bytes == slots[1].sum() * 1e6
    assert strong.moving.device_bytes == tuple(of.max() * 1e6 for of in slots)
    far = np.not_equal.outer(TWO_NODES.node_of_device, TWO_NODES.node_of_device)
    slowest = 0.0
    for rows, links in ((diff.pairs * ~far, 450e9), (diff.pairs * far, 50e9)):
        slowest += max(rows.sum(axis=0).max(), rows.sum(axis=1).max()) * 1e6 / links
    assert strong.moving.seconds == pytest.approx(slowest, rel=0.2)
    saved = LAYERS * (strong.main.gain.before - strong.main.gain.after)
    assert compute_saved_us(strong.main) == pytest.approx(saved)
    assert strong.moving.steps == np.ceil(strong.moving.seconds * 1e6 / saved)


def test_loads_are_split_by_window():
    """Without tokens there is balance, and traffic is an upper bound; pairs are left out."""
    counted = mt.RoutingStatistics.from_trace(routed(skewed()), window=100)
    how = {"copies": (0,), "splits": 1, "time_limit": None}
    advice = advise(counted, TWO_NODES, **how)
    assert advice.answer == "worth a trial"
    assert "fanout" not in advice.judged[0].gains
    assert numbers_of(advice, "load table") is not None
    alone = mt.RoutingStatistics.from_load(counted.window_load, window=100)
    assert advice.to_dict() == advise(alone, TWO_NODES, **how).to_dict()


def test_a_running_placement_is_the_one_to_beat():
    """What is balanced already has nothing left to win."""
    trace = routed(skewed())
    advice = advise(trace, TWO_NODES, copies=(0,), splits=1)
    again = advise(trace, TWO_NODES, copies=(0,), splits=1, initial=advice.placements[1])
    assert again.answer == "not now"


def test_eplb_may_run():
    """It is computed from what was seen, with redundant experts, and is no row beside itself."""
    trace = routed(skewed(2000))
    how = {"copies": (0,), "splits": 1, "iterations": 50}
    plain = advise(trace, TWO_NODES, **how, initial="eplb", objective="balance")
    assert plain.over_eplb == {}
    assert plain.answer == "not now"
    advice = advise(trace, TWO_NODES, **how, initial="eplb:4")
    assert [row.per_device for row in advice.copies] == [0, 1]
    assert advice.placements[0].slots_per_device == 3
    seen, _ = trace.split(0.5, seed=0)
    counted = mt.RoutingStatistics.from_trace(seen, window=512, sets=True)
    problem = mt.Problem(counted, TWO_NODES, slots_per_device=3)
    assert advice.placements[0] == mt.solve(problem, "eplb").placement


def test_traffic_may_be_given_to_judge_on():
    """What is proposed is computed from all of the one, and judged on all of the other, once."""
    seen, unseen = routed(skewed(1000)), routed(skewed(1500), seed=1)
    advice = advise(seen, TWO_NODES, copies=(0,), unseen=unseen)
    assert advice.judged_on.startswith("1,500 tokens of 30 sequences that the placement was not")
    assert advice.problem.load.sum() == 1000 * LAYERS * TOP_K
    assert advice.proposed.tokens == 1500
    assert len(advice.main.gain.splits) == 1


def test_prefill_and_decode_have_an_answer_each():
    """The headline has both, the greater gain first; a share of prefill makes one of them."""
    trace = routed(skewed(33_000))
    both = advise(trace, TWO_NODES, copies=(0,), splits=2)
    decode, prefill = (each.gain for each in both.judged)
    headline = numbers_of(both, "gains of phases")
    assert [*headline["gains"].items()] == [("prefill", prefill), ("decode", decode)]
    total = advise(trace, TWO_NODES, copies=(0,), splits=2, prefill_share=0.25, time_limit=None)
    decode, prefill = (each.gain for each in total.judged)
    for name in ("gain", "low", "high"):
        weighed = 0.25 * getattr(prefill, name) + 0.75 * getattr(decode, name)
        assert getattr(total.total, name) == pytest.approx(weighed)
    assert numbers_of(total, "gain in total")["prefill_share"] == 0.25


def test_halves_of_other_groups_get_both_answers():
    """A recording sorted by group says what a mix gains, and what one half does for the other."""
    group = np.arange(4000) // 1000
    trace = routed(shifted(), group=group, group_names=["books", "math", "news", "wiki"])
    advice = advise(trace, TWO_NODES, copies=(0,), splits=1)
    numbers = numbers_of(advice, "halves of other groups")
    assert numbers["groups"] == [["books", "math"], ["news", "wiki"]]
    worst, mix = min(gain.gain for gain in advice.halves), advice.main.gain.gain
    assert (numbers["worst"].gain, numbers["mix"].gain) == (worst, mix)
    assert advice.findings[0].numbers["of_groups"] == (worst < mix / 2)


def test_an_engine_decides_copies_and_order():
    """What it cannot load is left out; its windows are of mixed sequences."""
    trace = routed(skewed(2000))
    advice = advise(trace, TWO_NODES, copies=(0, 1), splits=1, engine="megatron")
    assert [each.per_device for each in advice.copies] == [0]
    assert numbers_of(advice, "no copies") == {"engine": "megatron"}
    assert advice.settings["arrival"] == "bursts"
    served = advise(trace, TWO_NODES, copies=(0,), splits=1, engine="sglang")
    assert served.main.gain.before == served.running.predicted_layer_us
    assert served.main.gain.after == served.proposed.predicted_layer_us
    assert (served.settings["arrival"], served.settings["split"]) == ("mixed", "nearest")
    # The same tokens, in windows of others.
    plain = advise(trace, TWO_NODES, copies=(0,), splits=1)
    assert served.running.tokens == plain.running.tokens
    assert served.running.fanout == pytest.approx(plain.running.fanout)
    assert served.running.imbalance_per_window != plain.running.imbalance_per_window


def test_low_latency_buffers_limit_tokens():
    """The limit is that of DeepEP's buffer, told where slots for copies shrink it."""
    # A row of 7168 on 288 slots: the 2,048 tokens that vLLM's documents name; of 5120 on 448: 1,843
    # as reported, in steps of 16.
    assert tokens_per_rank(7168, 288) == 2048
    assert tokens_per_rank(5120, 448) // 16 * 16 == 1840
    large = replace(routed(skewed(2000)), expert_size=(1 << 18, 512))
    advice, other = (
        advise(large, TWO_NODES, copies=(0, 1), splits=1, engine=engine)
        for engine in ("vllm", "tensorrt-llm")
    )
    limits = [each.tokens_per_rank for each in advice.copies]
    assert limits == [tokens_per_rank(1 << 18, 8), tokens_per_rank(1 << 18, 12)]
    assert numbers_of(advice, "low-latency kernels") is not None
    assert all(each.tokens_per_rank is None for each in other.copies)


def in_phases(slots, decode, prefill, share=0.0, **others):
    """Return the gains of a number of slots in both phases, and its share of the KV cache."""
    gains = {512: (decode,), 8192: (prefill,)}
    return Copies(slots, gains, slots * 1e9, cache_share=share, **others)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        # Half a per cent of the cache for 38 and 58 per cent; a second slot gives decode away.
        ([(0, 0.0, 0.0, 0.0), (1, 0.38, 0.58, 0.005), (2, 0.2, 0.6, 0.01)], (1, 0, None)),
        # One phase pays for the other: the user chooses.
        ([(0, 0.067, 0.17, 0.0), (1, 0.025, 0.41, 0.005)], (0, None, 1)),
        # The first slot is most of the gain, but takes more of the cache than it gains.
        ([(0, 0.2, 0.2, 0.0), (1, 0.3, 0.3, 0.13), (2, 0.31, 0.31, 0.26)], (0, None, 1)),
        # Two slots pay where one does not.
        ([(0, 0.0, 0.0, 0.0), (1, 0.0, 0.0, 0.01), (2, 0.2, 0.2, 0.02)], (2, 0, None)),
        # What does not fit is neither proposed nor offered.
        ([(0, 0.0, 0.0, 0.0), (1, 0.1, 0.1, 0.02), (2, 0.9, 0.9, 1.0)], (1, 0, None)),
        # Memory of unknown worth must bring the price; noise is no gain.
        ([(0, 0.0, 0.0, None), (1, 0.02, 0.3, None)], (0, None, 1)),
        ([(0, 0.0, 0.0, None), (1, 0.03, 0.3, None), (2, 0.034, 0.304, None)], (1, 0, None)),
    ],
)
def test_copies_are_proposed_where_they_pay(rows, wanted):
    """The phase that gains least must gain more than the share of the cache that slots take."""
    rows = [in_phases(*row) for row in rows]
    assert choose_copies(rows, 0, price=0.02) == wanted
    assert choose_copies(rows[::-1], 0, price=0.02) == wanted


def test_the_share_of_prefill_and_a_number_asked_for_decide():
    """With a share both phases count together; a single number is proposed whatever it costs."""
    rows = [in_phases(0, 0.0, 0.1), in_phases(1, -0.2, 0.4, 0.01)]
    chosen = [choose_copies(rows, 0, price=0.02, prefill_share=share) for share in (0.3, 0.5, 1.0)]
    assert [choice.chosen for choice in chosen] == [0, 1, 1]
    assert choose_copies(rows, 0, price=0.02, requested=1) == (1, 0, None)
    # Layers that are a tenth of a step gain a tenth of it.
    rows = [in_phases(0, 0.0, 0.0), in_phases(1, 0.1, 0.1, 0.02)]
    parts = [None, {512: 0.1, 8192: 0.1}]
    assert [choose_copies(rows, 0, price=0.02, parts=each).chosen for each in parts] == [1, 0]


def test_memory_that_runs_costs_nothing():
    """Slots for copies that run already are used as far as they gain."""
    rows = [in_phases(0, 0.0, 0.0), in_phases(1, 0.1, 0.1), in_phases(2, 0.102, 0.1)]
    assert choose_copies(rows, 2, price=0.02) == (1, None, None)
    assert choose_copies([*rows, in_phases(4, 0.3, 0.3, 0.01)], 2, price=0.02) == (4, 1, None)


def test_what_copies_gain_stands_beside_what_they_cost():
    """Slots of the chosen number, of fewer without more memory, and of those left to the user."""
    rows = [
        in_phases(0, 0.1, 0.2),
        in_phases(2, 0.3, 0.4, 0.01, cache_tokens=700),
        in_phases(4, 0.2, 0.6, 1.0),
    ]
    memory = compute_memory(
        None, layers=4, slots=1, expert_bytes=1e6, device_bytes=8e10, kv_bytes=1e4
    )
    finding = find_copies(rows, Choice(2, 0, None), 4, running=1, memory=memory)
    chosen = finding.numbers["chosen"]
    assert (chosen["slots"], chosen["more"], chosen["more_bytes"]) == (2, 1, 1e9)
    assert (finding.numbers["too_large"], finding.numbers["device_bytes"]) == (4, 8e10)
    assert write(finding) == (
        "copies, by short searches: 1 more slot per device and layer (1 GB per device) gains "
        "+30.0 % in decode and +40.0 % in prefill, for the room of 700 tokens of KV cache, 1.0 % "
        "of what is left beside the weights of 80 GB; without more memory +10.0 % in decode and "
        "+20.0 % in prefill. 4 slots and more do not fit beside the weights"
    )
    offered = write(find_copies(rows[:2], Choice(0, None, 2), 4))
    assert "without +10.0 % in decode and +20.0 % in prefill. A choice: 2 more slots" in offered
    unknown = [replace(row, cache_share=None, cache_tokens=None) for row in rows]
    assert "memory costs is not known" in write(find_copies(unknown, Choice(2, 0), 4))


@pytest.mark.parametrize(("needed", "spare"), [(1, 3), (4, None), (None, None)])
def test_layers_that_need_no_copies_are_found(needed, spare):
    """Only where many of them do not, with the memory that their copies would take."""
    swept = (
        Copies(0, {None: (0.2,)}, 0.0),
        Copies(2, {None: (0.3,)}, 2e9, None, needed),
    )
    wanted = None if spare is None else {"number": spare, "layers": 4, "bytes_per_device": 1.5e9}
    for choice in (Choice(2), Choice(0, None, 2)):
        assert find_copies(swept, choice, 4).numbers["spare_layers"] == wanted


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("layer", [0, 2])
def test_copies_are_of_use_where_an_expert_is_hot(layer):
    """Where one layer has an expert that a device cannot hold, copies in that one are enough."""
    share = np.full((3, EXPERTS), 1 / EXPERTS)
    share[layer] = 0.5 / (EXPERTS - 1)
    share[layer, 1] = 0.5
    random = np.random.default_rng(0)
    load = np.stack([random.multinomial(100_000, row, 40) for row in share], axis=1)
    traffic = mt.RoutingStatistics.from_load(load)
    advice = mt.advise(traffic, mt.Topology(4), copies=[0, 1], splits=1)
    layers = {row.per_device: row.layers for row in advice.copies}
    assert layers == {0: None, 1: 1}


@pytest.mark.usefixtures("brief")
def test_dispatch_by_a_linear_programme_is_judged_where_the_engine_has_it():
    """The same windows by even shares and divided anew; nothing without copies, or elsewhere."""
    traffic, topology = heavy(), mt.Topology(4)
    options = {"splits": 1, "iterations": 50}
    advice, none, other = (
        mt.advise(traffic, topology, copies=[copies], engine=engine, **options)
        for copies, engine in ((1, "sglang"), (0, "sglang"), (1, "vllm"))
    )
    assert [numbers_of(each, "tokens divided") for each in (none, other)] == [None, None]
    _, unseen = mt.hold_out(traffic)
    divided, even = (
        mt.evaluate(advice.placements[1], unseen, split=split).imbalance for split in ("lp", "even")
    )
    assert divided < even
    assert advice.lp_split == pytest.approx((divided, even))
    assert (none.lp_split, other.lp_split) == (None, None)
    said = numbers_of(advice, "tokens divided")
    assert said == {"engine": "sglang", **advice.lp_split._asdict()}


def heavy():
    """Load table in which one expert has half of the tokens: copies of it pay."""
    share = np.array([0.5, *[0.5 / (EXPERTS - 1)] * (EXPERTS - 1)])
    load = np.random.default_rng(0).multinomial(100_000, share, (40, 2))
    return mt.RoutingStatistics.from_load(load)


def even_load():
    """Load table in which all experts have as many tokens: copies of them are of no use."""
    return mt.RoutingStatistics.from_load(np.full((40, 2, EXPERTS), 6000))


@pytest.mark.parametrize(
    ("table", "initial", "tried"),
    [
        (heavy, "contiguous", [0, 1, 2, 3]),
        (even_load, "contiguous", [0, 1, 4]),
        (even_load, f"eplb:{EXPERTS}", [0, 1, 2, 3, 4]),
    ],
)
@pytest.mark.usefixtures("brief")
def test_numbers_of_copies_are_tried_where_they_may_gain(table, initial, tried):
    """As long as each gains; where neither the next nor the largest does, none between is tried.

    As many as run are tried always.
    """
    how = {"copies": [0, 1, 2, 3, 4], "initial": initial, "splits": 1}
    advice = advise(table(), mt.Topology(4), **how)
    assert [row.per_device for row in advice.copies] == tried


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("initial", ["contiguous", f"eplb:{EXPERTS // 2}"])
@pytest.mark.parametrize("memory", [80e9, 6e6])
def test_copies_that_pay_are_proposed_if_memory_has_room(initial, memory):
    """The headline, the placement and the table are of one number; what does not fit is not it."""
    topology = mt.Topology(4)
    running = EXPERTS // 8 if initial != "contiguous" else 0
    more = running + 2
    how = {"copies": (0, more), "splits": 1, "time_limit": None, "expert_bytes": 1e6}
    advice = advise(heavy(), topology, initial=initial, device_memory=memory, **how)
    _, after = advice.placements
    by_slots = {row.per_device: row for row in advice.copies}
    gained = by_slots[more].mean(None) - by_slots[running].mean(None)
    pays = gained > by_slots[more].cache_share + NEAR_BEST
    assert pays == (memory == 80e9)
    assert (advice.chosen_copies == more) == pays
    assert (advice.fewer_copies is not None) == pays
    assert after.slots_per_device == EXPERTS // 4 + advice.chosen_copies
    assert ("2 more slots per device and layer" in advice.sentence) == pays
    # Of what is left: nine tenths of the memory, less the weights that run.
    left = 0.9 * memory - (EXPERTS // 4 + running) * 2 * 1e6
    assert by_slots[more].cache_share == pytest.approx(
        min(2 * 2 * 1e6 / left, 1) if left > 0 else 1
    )


@pytest.mark.usefixtures("brief")
def test_a_gain_of_a_step_is_a_part_of_the_layers():
    """The answer, its price and the text are of a step where its time is known."""
    how = {"copies": (2,), "splits": 1, "time_limit": None}
    plain = advise(heavy(), mt.Topology(4), **how)
    gain, saved = plain.main.gain, plain.to_dict()["judged"][0]["saved_us_per_step"]
    assert "an MoE layer takes" in plain.sentence
    takes = 2 * gain.before / 1e3
    for factor, answer in ((2, "worth a trial"), (1e3 * gain.gain, "not now")):
        advice = advise(heavy(), mt.Topology(4), step_ms=factor * takes, **how)
        assert advice.answer == answer
        of_step = advice.of_step[None]
        assert of_step.gain == pytest.approx(gain.gain / factor)
        assert (of_step.low, of_step.high) == pytest.approx((gain.low / factor, gain.high / factor))
        assert 1e3 * factor * takes * of_step.gain == pytest.approx(saved)
        assert f"a step takes {100 * of_step.gain:.1f} % less" in advice.sentence
        assert advice.to_dict()["judged"][0]["of_step"]["gain"] == of_step.gain
    # Layers cannot take more than all of a step.
    whole = advise(heavy(), mt.Topology(4), step_ms=takes / 2, **how)
    assert whole.of_step[None].gain == pytest.approx(gain.gain)
    for wrong in (0, -1.0, [1, 2, 3], [], float("nan")):
        with pytest.raises(ValueError, match="step_ms"):
            advise(heavy(), mt.Topology(4), step_ms=wrong, **how)


@pytest.mark.usefixtures("brief")
def test_all_rows_of_copies_are_of_searches_as_short():
    """Each is searched for time alike, judged on the same half; the proposed one's too."""
    topology, table = mt.Topology(4), heavy()
    how = {"copies": (0, 1), "splits": 1, "time_limit": None, "iterations": None}
    advice = advise(table, topology, **how)
    seen, unseen = hold_out(table, 0.5, seed=check.nth_seed(0, 0))
    model = mt.cost.cost_model_of(table)
    gains = []
    for slots in (EXPERTS // 4, EXPERTS // 4 + 1):
        problem = mt.Problem(seen, topology, slots_per_device=slots, cost_model=model)
        found = mt.solve(problem, "heuristic", effort="brief").placement
        time = mt.evaluate(found, unseen, topology, cost_model=model).predicted_layer_us
        gains.append(1 - time / advice.running.predicted_layer_us)
    assert [row.per_device for row in advice.copies] == [0, 1]
    assert [row.mean(None) for row in advice.copies] == pytest.approx(gains)


def test_drift_is_seldom_told_of_one_kind():
    """Of twenty recordings of one kind, none changes it."""
    traces = [routed(skewed(2000), seed) for seed in range(20)] + [routed(shifted(2000))]
    drifts = [drift.measure_drift(trace, Samples("sequence", 40)) for trace in traces]
    assert [of.is_beyond_chance for of in drifts] == [False] * 20 + [True]


@pytest.mark.parametrize("form", ["sequences", "windows", "load tables"])
def test_traffic_leaves_a_profile_if_its_kind_changes(form):
    """Of twenty parts, a third as large, of one kind none has; the distance is as defined."""

    def recorded(scores, seed):
        trace = routed(scores, seed)
        if form == "load tables":
            return mt.RoutingStatistics.from_trace(trace, window=40)
        return trace if form == "sequences" else replace(trace, sequence=None)

    # Windows have 512 tokens, and of eight the second may be like the first by chance.
    tokens = 12_000 if form == "windows" else 4_000
    profile = recorded(skewed(3 * tokens), 0)
    parts = [recorded(skewed(tokens), seed) for seed in range(1, 21)]
    drifts = [mt.drift(profile, part) for part in (*parts, recorded(-skewed(), 0))]
    assert [of.is_beyond_chance for of in drifts] == [False] * 20 + [True]
    assert np.mean([of.chance <= 0.1 for of in drifts[:-1]]) <= 0.3
    load, other = (
        (of if form == "load tables" else mt.RoutingStatistics.from_trace(of)).total_load
        for of in (profile, recorded(-skewed(), 0))
    )
    shares = [of / of.sum(axis=1, keepdims=True) for of in (load, other)]
    by_layer = np.abs(shares[0] - shares[1]).sum(axis=1) / 2
    assert drifts[-1].distance == pytest.approx(by_layer.mean())
    assert drifts[-1].worst_distance == pytest.approx(by_layer[drifts[-1].worst_layer])
    assert by_layer.argmax() == drifts[-1].worst_layer


@pytest.mark.parametrize("initial", ["contiguous", "eplb"])
def test_nothing_moves_where_nothing_is_gained(initial):
    """Loads that are the same for all experts give no reason to move one of them, or a few."""
    flat = mt.RoutingStatistics.from_load(np.full((40, 3, 16), 64))
    advice = advise(flat, mt.Topology(4), copies=(0, 1), initial=initial)
    assert (advice.answer, advice.moving.experts) == ("not now", 0)
    assert advice.step is advice.to_dict()["step"] is None


@pytest.mark.usefixtures("brief")
def test_a_proposal_leaves_as_much_as_can_be_where_it_is():
    """What is proposed is worth what a solve from nothing is, and moves fewer experts."""
    advice = advise(heavy(), mt.Topology(8), copies=(0,), splits=1)
    running, proposed = advice.placements
    anew = mt.solve(advice.problem, seed=0).placement
    value = advice.problem.value
    assert value(proposed) <= value(anew) * (1 + 1e-9)
    assert advice.moving.experts < running.diff(anew).experts_moved


def test_a_further_number_of_copies_is_tried_for_two_per_cent():
    """One expert is a seventh heavier: its device, which holds as many as others, is 3 % slower.

    One slot more gains that, a second one no more, so four are not tried.
    """
    load = np.full((40, 2, 16), 100_000)
    load[..., 0] = 115_000
    counts = mt.RoutingStatistics.from_load(load + np.arange(40)[:, None, None])
    tried = advise(counts, mt.Topology(4), copies=(0, 1, 2, 4), splits=1).copies
    assert [row.per_device for row in tried] == [0, 1, 2]


def test_few_moves_gain_most_of_it():
    """The cheapest useful step moves far fewer experts, and is judged beside the same baseline."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(0, 1, 16)
    load = rng.multinomial(20_000, share / share.sum(), (40, 2))
    counts = mt.RoutingStatistics.from_load(load)
    advice = advise(counts, mt.Topology(4), copies=(0,), splits=1, expert_bytes=10)
    step, main = advice.step, advice.main
    assert step.experts <= 0.6 * advice.moving.experts
    assert step.bytes == 10 * step.experts
    assert step.gain.before == main.gain.before
    assert step.gain.gain > 0.5 * main.gain.gain
    assert advice.to_dict()["step"]["gain"]["gain"] == step.gain.gain


@pytest.mark.usefixtures("brief")
def test_sentences_name_arguments_of_python():
    """Called from Python, reasons and warnings say arguments, and no options of the command."""
    kinds = np.random.default_rng(0).poisson(500, (4, 2, 8))
    alike = mt.RoutingStatistics.from_load(np.repeat(kinds, 3, axis=0))
    for traffic, argument in ((routed(shifted()), "in_order=False"), (alike, "group_names")):
        advice = advise(traffic, mt.Topology(4), copies=(0,), splits=1)
        sentences = " ".join((*advice.reasons, *advice.warnings))
        assert argument in sentences
        assert not {"--any-order", "--group-by"} & {*sentences.replace(".", "").split()}


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(("devices", "top_k", "said"), [(2, 2, True), (4, 2, False), (2, 1, False)])
def test_tokens_that_stay_on_one_of_two_devices_are_said(devices, top_k, said):
    """Experts are chosen in pairs across the cards: none stay, all would; elsewhere not a word."""
    rng = np.random.default_rng(3)
    one = rng.integers(0, 4, (3000, 2, 1))
    ids = np.concatenate([one, one + 4], axis=2)[:, :, :top_k]
    trace = trace_of(ids, length=30)
    advice = advise(trace, mt.Topology(devices), copies=[0], window=512)
    numbers = {"before": "0", "after": "100", "running": "contiguous"}
    assert numbers_of(advice, "tokens on one device") == (numbers if said else None)


@pytest.mark.usefixtures("brief")
def test_what_a_lost_device_does_is_said_where_there_are_copies():
    """Of the proposed placement, as its evaluation has it; of single copies nothing is said."""
    load = np.random.default_rng(5).poisson(1e6, (12, 2, 16))
    load[:, :, 3] *= 12
    table = mt.RoutingStatistics.from_load(load)
    problem = mt.Problem(table, mt.Topology(4), slots_per_device=6)
    running = mt.solve(problem, "quick").placement
    advice = mt.advise(table, mt.Topology(4), initial=running, splits=1)
    losses = {"losses": advice.main.after.losses["device"]}
    assert numbers_of(advice, "lost device") == losses
    single = mt.advise(table, mt.Topology(4), copies=(0,), splits=1)
    assert numbers_of(single, "lost device") is None


@pytest.mark.parametrize(("devices", "per_node", "slots"), [(4, 4, 0), (16, 4, 1), (32, 8, 1)])
def test_what_is_proposed_is_what_one_would_buy(data, devices, per_node, slots):
    """On real routing the answer is of the slots whose worse phase gains most for their memory.

    A slot of gpt-oss-20b is half a per cent of the KV cache of an H100. It is no use on 4 devices,
    and gains 25 and 39 % or more on 16 and 32.
    """
    trace = mt.open_input(data / "gpt-oss-20b.npz")
    machine = mt.Topology(devices=devices, devices_per_node=per_node)
    how = {"engine": "vllm", "in_order": False, "splits": 1, "copies": (0, 1, 2)}
    advice = mt.advise(trace, machine, **how)
    assert advice.answer == "worth a trial"
    assert advice.chosen_copies == slots
    worst = {
        row.per_device: min(map(row.mean, row.gains)) - (row.cache_share or 0)
        for row in advice.copies
    }
    assert worst[slots] >= max(worst.values()) - NEAR_BEST
    assert advice.placements[1].slots_per_device == 32 // devices + slots
    assert ("1 more slot" in advice.sentence) == (slots == 1)
    over_eplb = [judgement.gain.gain for judgement in advice.over_eplb.values()]
    assert min(over_eplb) > 0


@pytest.mark.parametrize(("windows", "stay", "seed"), [(40, 0.7, 0), (40, 0.9, 1), (80, 0.95, 0)])
def test_more_windows_are_asked_for_than_there_are(windows, stay, seed):
    """As many times more as an interval needs more samples than came out."""
    rng, level, loads = np.random.default_rng(seed), np.zeros((2, 16)), []
    for _ in range(windows):
        level = stay * level + (1 - stay**2) ** 0.5 * rng.normal(0, 0.7, level.shape)
        share = np.exp(level) / np.exp(level).sum(axis=1, keepdims=True)
        loads.append(rng.poisson(2000 * share))
    advice = advise(mt.RoutingStatistics.from_load(loads), mt.Topology(4), copies=(0,))
    assert advice.answer == "not enough evidence"
    kind, numbers = advice.findings[0].kind, advice.findings[0].numbers
    assert kind == "neighbouring windows are alike"
    assert numbers["needed"] >= windows * numbers["least"] / numbers["unseen"] > windows


def test_what_places_no_experts_is_answered_by_the_library():
    """Traffic of llama.cpp asks for no placement, so nothing moves; an engine named decides."""
    traffic, topology = routed(skewed()), mt.Topology(4)
    advice = advise(traffic, topology, recorded_by="llama.cpp")
    assert (advice.answer, advice.findings[0].kind) == ("not now", "nothing to place")
    assert (advice.moving.experts, advice.step, advice.say("cost")) == (0, None, ())
    assert advice.sentence.endswith("name it (engine).")
    for options in ({"recorded_by": "vllm"}, {"recorded_by": "llama.cpp", "engine": "vllm"}):
        assert advise(traffic, topology, **options).answer == "worth a trial"
