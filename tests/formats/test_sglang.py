"""SGLang: what its recorder dumped is read, slots become experts, and nonsense is named."""

import base64
import json

import numpy as np
import pytest
from damage import check_reading
from engines_files import GOLDEN as OF_ALL
from engines_files import save_torch as dump
from engines_files import sglang_pass as of_tokens
from engines_files import truth, write_sglang
from hypothesis import given, settings
from hypothesis import strategies as st
from make import random_ids
from targets import HINTS

import moetuner as mt
from moetuner.files.opened import Opened
from moetuner.formats import find_reader, pickled, sglang, write_placement

GOLDEN = OF_ALL / "sglang"


def bag(ids):
    """Expert sets of all tokens, in any order."""
    return sorted(np.sort(ids, axis=2).reshape(len(ids), -1).tolist())


def test_responses():
    """What the engine answered: the router's experts, best first."""
    ids, lengths = truth("sglang")
    path = GOLDEN / "responses.json"
    assert find_reader(path) == "sglang-responses"
    trace = mt.open_input(path, num_experts=16, top_k=4)
    assert np.array_equal(trace.expert_ids, ids)
    assert np.bincount(trace.sequence).tolist() == lengths.tolist()
    with pytest.raises(ValueError, match="top_k is needed"):
        mt.open_input(path, num_experts=16)
    with pytest.raises(ValueError, match="must fill tokens x layers x top-k"):
        mt.open_input(path, num_experts=16, top_k=7)


@pytest.mark.parametrize(
    "ranks", [["one-rank-per_token-0"], ["two-ranks-per_token-0", "two-ranks-per_token-1"]]
)
def test_tokens(ranks):
    """Slots are translated, and tokens that two ranks recorded are counted once."""
    ids, lengths = truth("sglang")
    files = [GOLDEN / f"{name}.pt" for name in ranks]
    assert {find_reader(file) for file in files} == {"sglang"}
    trace = mt.open_input(files)
    assert bag(trace.expert_ids) == bag(ids)
    assert sorted(np.bincount(trace.sequence)) == sorted(lengths)
    for label, length in enumerate(np.bincount(trace.sequence)):
        one = trace.select(sequences=[label]).expert_ids
        first = int(np.cumsum([0, *lengths])[lengths.tolist().index(length)])
        assert np.array_equal(np.sort(one, axis=2), np.sort(ids[first : first + length], axis=2))


@pytest.mark.parametrize("mode", ["stat", "per_pass"])
@pytest.mark.parametrize("name", ["one-rank", "two-ranks"])
def test_counts(mode, name):
    """Loads of all steps are those of the tokens, as far as the buffer kept them."""
    files = sorted(GOLDEN.glob(f"{name}-{mode}*.pt"))
    counted = mt.open_input(files)
    ids, _ = truth("sglang")
    load = np.stack([np.bincount(layer.ravel(), minlength=16) for layer in np.moveaxis(ids, 1, 0)])
    total = counted.total_load.astype(int)
    if name == "one-rank":
        assert np.array_equal(total, load)
    elif mode == "per_pass":
        assert np.array_equal(total, load * len(files))  # every rank counts every token
    else:
        assert (total <= 2 * load).all()
    assert counted.window_load.any(axis=(1, 2)).all()


def test_buffer(tmp_path):
    """Unused steps are left out, and so are rows of dense layers; dumps are joined."""
    count = np.zeros((5, 3, 4), dtype=np.int32)
    count[1, 1:] = [[1, 2, 3, 4], [4, 3, 2, 1]]
    count[4, 1:] = [[5, 5, 5, 5], [0, 0, 0, 20]]
    path = dump(tmp_path / "a.pt", {"rank": 0, "logical_count": count})
    assert mt.open_input(path).window_load.tolist() == count[[1, 4], 1:].tolist()
    assert mt.open_input(path, dense_layers=[]).layers == 3
    assert mt.open_input([path, path]).windows == 4
    with pytest.raises(ValueError, match="num_experts must be 4"):
        mt.open_input(path, num_experts=8)
    dump(path, {"rank": 0, "logical_count": count[0, 0]})
    with pytest.raises(ValueError, match=r"logical_count must be \[layers, experts\], or"):
        mt.open_input(path)
    dump(path, {"rank": 0, "logical_count": count[:1]})
    with pytest.raises(ValueError, match="every count is zero, so nothing was recorded"):
        mt.open_input(path)


def test_sequences_and_padding(tmp_path):
    """Prompts go on as their positions say; slots of copies are one expert; layer 0 is dense."""
    slots = np.array([[[0, 5], [4, 3], [1, 2]]] * 3)
    records = [
        of_tokens(0, 0, slots, [0, 1, 0], [2, 1]),
        of_tokens(1, 0, slots[:, :2], [1, 2], None),
        of_tokens(1, 1, slots[:, :1], [7], None),
    ]
    path = write_sglang(tmp_path / "a.pt", records)
    trace = mt.open_input(path)
    assert trace.sequence.tolist() == [0, 0, 1, 1, 0, 2]
    assert (trace.layers, trace.top_k, trace.num_experts) == (2, 2, 4)
    assert trace.expert_ids[:3].tolist() == [[[0, 1], [3, 2]], [[0, 3], [3, 0]], [[1, 2], [2, 1]]]
    records[0]["topk_ids_of_layer"][1, 1, 0] = 6
    write_sglang(path, records)
    with pytest.raises(ValueError, match="slots must be below 6, got 6"):
        mt.open_input(path)


def test_sequences_of_one_length_go_on_in_their_order():
    """Which of two that end alike a token belongs to is not known; the older one comes first."""
    sequences = sglang._Sequences()
    assert sequences.assign([0, 1, 0, 1, 0], [2, 2, 1]) == [0, 0, 1, 1, 2]
    assert sequences.assign([2, 2, 1], []) == [0, 1, 2]
    assert sequences.assign([3, 3, 2], []) == [0, 1, 2]
    # A prompt that begins where none ended had its beginning in a cache.
    assert sequences.assign([9, 10, 3], [2, 1]) == [3, 3, 2]


def test_passes_of_ranks(tmp_path):
    """Counts of a pass are added over ranks, slot by slot of every rank's own map."""
    files = []
    for rank in range(2):
        count = np.zeros((3, 6), dtype=np.int32)
        count[1, rank * 4], count[2, 0] = 3, 1 + rank
        about = {"forward_pass_id": 5, "rank": rank, "gatherer_key": "primary"}
        records = [about | {"global_physical_count": count}]
        files.append(write_sglang(tmp_path / f"x_{rank}.pt", records))
    counted = mt.open_input(files)
    assert counted.window_load.tolist() == [[[6, 0, 0, 0], [0, 0, 0, 3]]]
    assert mt.open_input(tmp_path).fingerprint == counted.fingerprint
    stat = dump(tmp_path / "y.pt", {"rank": 0, "logical_count": np.ones((1, 3, 4), np.int32)})
    with pytest.raises(ValueError, match="must be of one mode"):
        mt.open_input([*files, stat])


def test_shapes_of_responses(tmp_path):
    """Of OpenAI's route, and cut at a start that the request asked for."""
    ids = random_ids(5, 3, 2, 8).astype("<i4")
    ids[:, 0] = 0
    text = base64.b64encode(ids.tobytes()).decode()
    usage = {"prompt_tokens": 4, "completion_tokens": 2}
    path = tmp_path / "r.json"
    for content in (
        {"choices": [{"text": ""}], "usage": usage, "sglext": {"routed_experts": text}},
        {"choices": [{"sglext": {"routed_experts": text}}], "usage": usage},
        {"text": "", "meta_info": usage | {"routed_experts": text}},
    ):
        path.write_text(json.dumps(content))
        assert np.array_equal(mt.open_input(path, num_experts=8, top_k=2).expert_ids, ids[:, 1:])
    path.write_text(json.dumps({"meta_info": {"routed_experts": text}}))
    with pytest.raises(ValueError, match="hidden_layers is needed"):
        mt.open_input(path, num_experts=8, top_k=2)


def test_map(tmp_path):
    """The engine's own map, as torch.save writes it too, and ours: a row for every hidden layer."""
    placement = mt.read_placement(GOLDEN / "expert_location.json", devices=2)
    assert (placement.layers, placement.devices, placement.num_experts) == (4, 2, 16)
    path = tmp_path / "m.json"
    write_placement(placement, "sglang", path, dense_layers=(0, 3))
    rows = json.loads(path.read_text())
    assert list(rows) == ["physical_to_logical_map"]
    assert len(rows["physical_to_logical_map"]) == 6
    assert mt.read_placement(path, devices=2, dense_layers=[0, 3]) == placement
    for hidden, dense, words in (
        (None, None, "hidden_layers is needed"),
        (6, None, "dense_layers is needed: which 2 of 6"),
        (6, (1,), "must leave 4 layers"),
    ):
        with pytest.raises(ValueError, match=words):
            write_placement(placement, "sglang", path, hidden_layers=hidden, dense_layers=dense)
    dump(path, {"physical_to_logical_map": placement.slots.reshape(4, -1)})
    assert pickled.is_pickled(Opened(path))
    assert mt.read_placement(path, devices=2) == placement


def test_dumps_of_another_model_are_refused():
    """The map of slots and the tokens say how many experts there are."""
    for mode, name, right, words in (
        ("per_token", "num_experts", 16, "num_experts must be 16, got 2"),
        ("per_pass", "num_experts", 16, "num_experts must be 16, got 2"),
        ("per_token", "top_k", 4, "top_k must be above 2: tokens have more experts"),
    ):
        path = GOLDEN / f"two-ranks-{mode}-0.pt"
        mt.open_input(path, **{name: right})
        with pytest.raises(ValueError, match=words):
            mt.open_input(path, **{name: 2})


def test_dumps_of_two_models_are_not_joined(tmp_path):
    """Maps of 4 and of 6 experts are of two models, however alike their passes look."""
    for rank, experts in enumerate((4, 6)):
        record = {"forward_pass_id": rank, "rank": 0, "gatherer_key": "primary"}
        record["global_physical_count"] = np.ones((1, experts), dtype=np.int32)
        write_sglang(tmp_path / f"{rank}.pt", [record], np.arange(experts)[None])
    with pytest.raises(ValueError, match="must be of one model, got 1 x 4 and 1 x 6 layers"):
        mt.open_input(tmp_path)
    assert mt.open_input(tmp_path / "1.pt").num_experts == 6


scalars = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3)
scalars |= st.integers() | st.sampled_from(["AAAA", "=", "k05VTVBZAQB2AHsn"])


def tensors(path):
    """Tensors of small sizes and any types, whose numbers are where the file begins."""
    sizes = st.lists(st.integers(0, 4), max_size=4).map(tuple)

    def make(dtype, shape):
        steps = tuple(int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape)))
        return pickled.Tensor(path, dtype, shape, steps, 0)

    return st.builds(make, st.sampled_from(sorted(pickled.STORAGES.values())), sizes)


def test_nonsense_of_dumps(tmp_path, monkeypatch):
    """Dumps of SGLang with the right keys and any values."""
    path = tmp_path / "d.pt"
    value = scalars | tensors(path) | st.lists(st.integers(-1, 5), max_size=4)
    keys = ["forward_pass_id", "rank", "gatherer_key", "global_physical_count", "positions"]
    keys += ["input_ids", "extend_seq_lens", "topk_ids_of_layer"]
    record = st.dictionaries(st.sampled_from(keys), value, max_size=8).map(
        lambda fields: {"forward_pass_id": 0, "rank": 0, **fields}
    )
    records = st.lists(record, max_size=3) | value
    fields = {"logical_count": value, "records": records, sglang.LAST_MAP: value}

    @settings(max_examples=settings().max_examples * 5)
    @given(st.fixed_dictionaries({}, optional=fields) | value)
    def run(content):
        monkeypatch.setattr(pickled, "load", lambda _: content)
        check_reading(path, bytes(4096), lambda path: sglang.read([Opened(path)], HINTS))

    run()
