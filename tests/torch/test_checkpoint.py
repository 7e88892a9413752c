"""permute_state_dict: the same for weights on disk as apply_placement for a model in memory."""

import json
import re

import numpy as np
import pytest
from moe_models import build, placement_for, refused, same, tensors_of, torch, transformers
from safetensors.torch import load_file, save_file

import moetuner as mt
from moetuner.torch import apply_placement, permute_state_dict


def test_a_folder_of_many_files(tmp_path):
    """Each file of the index becomes one with the same tensors by new names, the index too."""
    model = build("gpt_oss")
    placement = placement_for(model)
    model.save_pretrained(tmp_path / "old", max_shard_size="20KB")
    names = {file.name for file in (tmp_path / "old").iterdir()} | {"tokenizer.json"}
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    # Weights in other formats, and files that the index does not name.
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"old")
    saved(tmp_path / "old", other={"layers.0.feed_forward.experts.w1": torch.zeros(2)})
    with pytest.warns(UserWarning, match="not copied: other.safetensors, pytorch_model.bin "):
        out = permute_state_dict(tmp_path / "old", placement, tmp_path / "new")
    apply_placement(model, placement)
    model.save_pretrained(tmp_path / "expected", max_shard_size="20KB")
    assert same(tensors_of(out), tensors_of(tmp_path / "expected"))
    assert len(list(out.glob("*.safetensors"))) > 3
    assert {file.name for file in out.iterdir()} == names
    for file in ("config.json", "tokenizer.json"):
        assert (out / file).read_bytes() == (tmp_path / "old" / file).read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for file in out.glob("*.safetensors"):
        assert set(load_file(file)) == {key for key, where in index.items() if where == file.name}


def checkpoint(layers=(0, 1, 2), experts=4, prefix="model.layers"):
    """Make a small checkpoint with one tensor per expert, each of its own value."""
    tensors = {"model.embed.weight": torch.zeros(3, experts)}
    for layer in layers:
        block = f"{prefix}.{layer}.mlp"
        for expert in range(experts):
            tensors[f"{block}.experts.{expert}.w"] = torch.full((2, 3), 10.0 * layer + expert)
        rows = torch.arange(experts * 3).reshape(experts, 3)
        tensors[f"{block}.gate.weight"] = rows + 100.0 * layer
    return tensors


def expert_in(tensors, layer, position=0, prefix="model.layers"):
    """Return the value of the expert at a position."""
    return tensors[f"{prefix}.{layer}.mlp.experts.{position}.w"][0, 0]


def saved(folder, **files):
    """Save tensors in a folder, and return it."""
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


ORDER = mt.Placement([[[3, 1], [0, 2]]] * 3)


@pytest.mark.parametrize(("first", "prefix"), [(3, "model.layers"), (0, "net.blocks")])
def test_layers_are_in_order_of_their_numbers(first, prefix):
    """Layer 10 comes after layer 9, and not after layer 1, whatever layers are called."""
    layers = range(first, 14)
    slots = np.tile(np.arange(4).reshape(1, 2, 2), (len(layers), 1, 1))
    slots[10 - first] = [[2, 3], [0, 1]]
    moved = permute_state_dict(checkpoint(layers, prefix=prefix), mt.Placement(slots))
    firsts = [expert_in(moved, layer, prefix=prefix) for layer in layers]
    assert firsts == [10 * layer + (2 if layer == 10 else 0) for layer in layers]


def test_prediction_layers_beyond_the_model_stay():
    """What lies beyond num_hidden_layers keeps its order unless the placement speaks of it."""
    placement = mt.Placement([[[2, 3], [0, 1]]] * 2)
    tensors = checkpoint()
    text = "as many layers as the checkpoint has MoE layers, 3"
    refused(text, permute_state_dict, tensors, placement)
    # A router without groups: configurations have none, or none of them.
    config = {"num_hidden_layers": 2, "n_group": 0}
    moved = permute_state_dict(tensors, placement, config=config)
    assert [expert_in(moved, layer) for layer in (1, 2)] == [12, 20]
    assert moved["model.layers.2.mlp.gate.weight"].equal(tensors["model.layers.2.mlp.gate.weight"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("experts.local_experts.{}.linear_fc1.weight", "router.expert_bias"),
        ("experts.linear_fc1.weight{}", "router.weight"),
    ],
)
def test_names_of_megatron(before, after):
    """Both of Megatron's ways to name experts are understood."""
    block = "decoder.layers.0.mlp"
    tensors = {f"{block}.{before.format(e)}": torch.full((2,), float(e)) for e in range(4)}
    tensors[f"{block}.{after}"] = torch.arange(4.0)
    moved = permute_state_dict(tensors, mt.Placement([[[1, 3], [0, 2]]]))
    assert moved.keys() == tensors.keys()
    assert [int(moved[f"{block}.{before.format(e)}"][0]) for e in range(4)] == [1, 3, 0, 2]
    assert moved[f"{block}.{after}"].tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("prefix", ["mtp", "model.mtp", "model.nextn_predict"])
def test_prediction_layers_of_their_own_numbers_are_last(prefix):
    """Blocks named mtp.layers.0 get the last rows, or none; config need not count layers."""
    tensors = checkpoint() | checkpoint((0, 1), prefix=f"{prefix}.layers")
    slots = np.stack([np.roll(np.arange(4), number) for number in range(5)]).reshape(5, 2, 2)
    slots = np.sort(slots, axis=2)
    names = [("model.layers", n) for n in range(3)] + [(f"{prefix}.layers", n) for n in range(2)]
    moved = permute_state_dict(tensors, mt.Placement(slots))
    for row, (stack, number) in enumerate(names):
        expected = 10 * number + slots[row, 0, 0]
        assert expert_in(moved, number, prefix=stack) == expected, (stack, number)
    moved = permute_state_dict(tensors, mt.Placement(slots[2:]))
    assert expert_in(moved, 0) == slots[2, 0, 0]
    assert expert_in(moved, 1, prefix=f"{prefix}.layers") == 10


def test_two_stacks_of_layers_are_refused():
    """An encoder and a decoder have layers of the same numbers, and no order by their names."""
    tensors = checkpoint((0,), prefix="decoder.layers") | checkpoint((0,), prefix="encoder.layers")
    text = "must be about one stack of layers, got decoder.layers.0.mlp and encoder.layers.0.mlp"
    refused(text, permute_state_dict, tensors, mt.Placement(ORDER.slots[:2]))


@pytest.mark.parametrize("digits", [2, 3])
def test_numbers_with_leading_zeros_keep_them(digits):
    """Experts named 007 stay so, and are taken for the same numbers as 7."""
    tensors = checkpoint(experts=12)
    padded = {
        re.sub(r"experts\.(\d+)", lambda of: f"experts.{int(of[1]):0{digits}}", name): tensor
        for name, tensor in tensors.items()
    }
    placement = mt.Placement(
        np.stack([np.random.default_rng(0).permutation(12)] * 3).reshape(3, 2, 6)
    )
    expected, moved = (permute_state_dict(of, placement) for of in (tensors, padded))
    assert padded.keys() == moved.keys()
    assert all(moved[old].equal(expected[new]) for new, old in zip(tensors, padded, strict=True))
    assert same(permute_state_dict(moved, placement, inverse=True), padded)
    refused("one name each", permute_state_dict, tensors | padded, placement)


def changed(**tensors):
    """Make a checkpoint with other tensors in its layers, or without those that are None."""
    tensors = checkpoint() | {f"model.layers.{name}": of for name, of in tensors.items()}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


GATE, BIAS = "0.mlp.gate", {"0.mlp.gate.e_score_correction_bias": torch.zeros(4)}
ALIKE, TABLE = torch.tensor([[0.0], [1], [2], [1]]), torch.tensor([[0, 1], [3, 2], [2, 2]])


@pytest.mark.parametrize(
    ("tensors", "text", "config"),
    [
        (changed(**{"1.mlp.experts.2.w": None}), "layers.1.mlp: must have experts 0 to 3 as", None),
        (checkpoint(experts=8), "must have experts 0 to 3 as the placement has, got 8 from", None),
        (changed(**{f"{GATE}.weight": None}), "0.mlp: must have the weights of its router", None),
        (changed(**{f"{GATE}.weight": ALIKE}), "0.mlp: experts 1 and 3 have the same router", None),
        (changed(**{f"{GATE}.table": torch.zeros(7, 4)}), "table: [7, 4] may depend on the", None),
        (changed(**{f"{GATE}.tid2eid": TABLE + 2}), "must hold experts 0 to 3, got 2 to 5", None),
        (changed(**BIAS), "config is needed: a router with e_score_correction_bias", None),
        (
            changed(**BIAS),
            "layer 0: its router chooses among 2 groups of 2 experts first",
            {"n_group": 2, "topk_group": 1},
        ),
        (changed(**BIAS), "config's n_group must be an integer, got '2'", {"n_group": "2"}),
        ({"a.experts.down_proj": torch.zeros(5, 2)}, "MoE layers, 1, got 3", None),
        (changed(**{"1.mlp.gate.inner.weight": torch.ones(4, 3)}), "must be the only weight", {}),
        *(
            (changed(**{f"1.{name}": tensor}), f"model.layers.1.{name}: ", {})
            for name, tensor in {
                "mlp.gate.weight_scale_inv": torch.ones(2, 2),  # of blocks of the router's rows
                "mlp.gate.balancing_biases": torch.ones(5),
                "mlp.gate.norm.weight": torch.ones(4),
                "mlp.moe_statics.usage": torch.ones(7),
                "mlp.moe_statics.e_score_correction_bias": torch.ones(2, 4),  # of two kinds
                "mlp.other.weight": torch.ones(4, 3),
                "mlp.lookup": torch.ones(9, 2, dtype=torch.int64),
                "lookup": torch.ones(9, 2, dtype=torch.int32),
                "moe.choice": torch.ones(9),
            }.items()
        ),
    ],
)
def test_bad_checkpoints(tensors, text, config, tmp_path):
    """What would not be exact is refused with a reason, in memory and before a file is written."""
    old, new = saved(tmp_path / "old", model=tensors), tmp_path / "new"
    refused(text, permute_state_dict, tensors, ORDER, config=config)
    refused(text, permute_state_dict, old, ORDER, new, config=config)
    assert not new.exists()


GROUPS = {"n_group": 2, "topk_group": 1}


@pytest.mark.parametrize(
    "config",
    [
        GROUPS,
        {"text_config": GROUPS},
        {"thinker_config": {"text_config": GROUPS, "n_group": 1}},
        {"language_config": {"num_expert_group": 2, "topk_group": 1}},
        {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
        {"n_expert_groups": 2, "n_limited_groups": 1},
        transformers.BailingHybridConfig(n_group=2, topk_group=1),
        transformers.BailingHybridConfig(n_group=2, topk_group=1).to_diff_dict(),
        # Files leave out defaults, here of two groups.
        {"text_config": {"model_type": "axk1", "topk_group": 1, "n_routed_experts": 4}},
    ],
)
def test_groups_by_any_name(config):
    """A router's groups stay whole under whatever names and wherever a configuration has them."""
    text = "groups of 2 experts first" if "axk1" not in str(config) else "groups must divide"
    refused(text, permute_state_dict, changed(**BIAS), ORDER, config=config)


@pytest.mark.parametrize(
    "config",
    [
        {"n_group": 2, "topk_group": 2},
        {"num_expert_group": 4, "topk_method": "greedy"},
        {"mamba_n_groups": 2, "n_groups": 2, "num_key_value_groups": 2, "layer_group_size": 2},
        {"quantization_config": {"n_group": 2, "group_size": 2}},
        {"use_expert_group": True, "n_group": None},
    ],
)
def test_other_groups_are_no_reason(config):
    """Groups that are all chosen, and those of heads, convolutions and quantised weights."""
    tensors = changed(**BIAS)
    moved = permute_state_dict(tensors, ORDER, config=config)
    assert expert_in(moved, 0) == 1


FOUR, BLOCKS = torch.arange(4.0), torch.arange(24.0).reshape(4, 2, 3)
BIASES = "mlp.moe_statics.e_score_correction_bias mlp.e_score_correction_bias moe.router_bias"
BIASES = ["mlp.experts.e_score_correction_bias", "moe.router.expert_bias", *BIASES.split()]
TYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.uint8, torch.int64, torch.float16)
TAKEN = [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("mlp.gate.weight", BLOCKS.view(4, 6), BLOCKS.view(4, 6)[TAKEN]),
        *(("mlp.experts.blocks", BLOCKS.to(of), BLOCKS[TAKEN].to(of)) for of in TYPES),
        *((name, FOUR, FOUR[TAKEN]) for name in BIASES),
        *((name, FOUR[None], FOUR[None, TAKEN]) for name in BIASES[1:]),
        *(
            ("mlp.gate.tid2eid", TABLE.to(of), torch.tensor([[2, 0], [1, 3], [3, 3]]).to(of))
            for of in (torch.int32, torch.int64)
        ),
        *(
            (name, tensor, None)
            for name, tensor in {
                "mlp.experts.scale": torch.ones(()),
                "mlp.shared_experts.up_proj.weight": torch.ones(4, 3),
                "mlp.shared_expert_gate.weight": torch.ones(1, 4),
                "mlp.share_expert.up_proj.weight": torch.ones(4, 4),
                "mlp.latent_proj.weight": torch.ones(5, 3),
                "mlp.gate.norm.weight": torch.ones(3),
                "mlp.gate.global_scale": torch.ones(1),
                "self_attn.q_norm.weight": FOUR,
                "self_attn.q_proj.weight": torch.ones(4, 4),
                "self_attn.q_proj.qweight": torch.ones(4, 4, dtype=torch.int32),
                "post_moe_norm.weight": torch.ones(3),
                "hc_ffn_base": FOUR,
            }.items()
        ),
    ],
)
def test_what_becomes_of_a_tensor(name, tensor, expected, tmp_path):
    """What depends on experts goes where they go, bit by bit, on disk as in memory, and back."""
    key, how = f"model.layers.1.{name}", {"config": {"n_group": 1}}
    tensors = {**checkpoint(), key: tensor}
    moved = permute_state_dict(tensors, ORDER, **how)
    out = permute_state_dict(saved(tmp_path / "old", model=tensors), ORDER, tmp_path / "new", **how)
    back = permute_state_dict(out, ORDER, tmp_path / "back", inverse=True, **how)
    assert same(moved, tensors_of(out))
    assert same(tensors, tensors_of(back))
    assert [expert_in(moved, 2, position) for position in range(4)] == [21, 23, 20, 22]
    assert moved[key] is tensor if expected is None else same({0: moved[key]}, {0: expected})


def test_bad_folders(tmp_path):
    """Folders without weights, damaged files and places that are taken are refused."""
    source, new = saved(tmp_path / "old"), tmp_path / "new"

    def wrong(out, text, given=source):
        refused(text, permute_state_dict, given, ORDER, out)

    wrong(new, f"{source}: must hold .safetensors files, got none")
    saved(source, model=checkpoint())
    wrong(source, f"{source}: must be a new or an empty folder")
    wrong(None, "out must be a folder to write where source is a folder, got None")
    wrong(new, "out must be left out where source is not a folder", checkpoint())
    (source / "config.json").write_text("{")
    wrong(new, "config.json: ")
    (source / "config.json").unlink()
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    wrong(new, f"{file}: file must have")
    (source / "model.safetensors.index.json").write_text("{}")
    wrong(new, "index.json: must be an object with 'weight_map'")
    (source / "model.safetensors.index.json").unlink()
    header = b'{"x": {"dtype": [], "shape": [0], "data_offsets": [0, 0]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    wrong(new, "old: ")
    assert not new.exists()


def test_files_in_folders(tmp_path):
    """Shards stay in the folders that the index names, other folders are copied whole."""
    old, new = tmp_path / "old", tmp_path / "old" / "placed"
    tensors, files = checkpoint(), {}
    for layer in range(3):
        part = {name: of for name, of in tensors.items() if f"layers.{layer}." in name}
        (old / f"part-{layer}").mkdir(parents=True)
        save_file(part, old / f"part-{layer}" / "model.safetensors")
        files |= dict.fromkeys(part, f"part-{layer}/model.safetensors")
    (old / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (old / "part-1" / "notes.txt").write_text("beside")
    (old / "code" / "inner").mkdir(parents=True)
    (old / "code" / "inner" / "model.py").write_text("code")
    (old / "original").mkdir()
    for name in ("original/model.pth", "original/params.json", "part-2/model.bin"):
        (old / name).write_text("{}")
    (old / "model.bin.index.json").write_text("{}")
    (old / "model.bin").write_text("")
    (old / ".git").mkdir()
    (old / "there").symlink_to(tmp_path)
    text = re.escape("not copied: .git/, model.bin, original/, part-2/model.bin, there/ (hidden")
    with pytest.warns(UserWarning, match=text):
        permute_state_dict(old, ORDER, new)
    moved, index = permute_state_dict(tensors, ORDER), "model.safetensors.index.json"
    assert json.loads((new / index).read_text())["weight_map"].keys() == files.keys()
    for layer in range(3):
        part = load_file(new / f"part-{layer}" / "model.safetensors")
        assert same(part, {name: moved[name] for name in part})
    found = {str(file.relative_to(new)) for file in new.rglob("*") if file.is_file()}
    shards = {f"part-{layer}/model.safetensors" for layer in range(3)}
    assert found == {index, "part-1/notes.txt", "code/inner/model.py", *shards}


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", "a/../../b"])
def test_files_outside_the_folder_are_refused(name, tmp_path):
    """An index that names files elsewhere would have them written elsewhere."""
    old = saved(tmp_path / "old", model=checkpoint())
    (old / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    text = "files of weight_map must be in the folder"
    refused(text, permute_state_dict, old, ORDER, tmp_path / "new")
    assert not (tmp_path / "new").exists()


ONE = "model.layers.1.mlp.experts."


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        # By the placement the experts 3, 1, 0, 2 are now 1, 0, 2, 3.
        (f"{ONE}3.w", f"{ONE}1.w"),
        (f"{ONE}0", f"{ONE}2"),
        ("layers.1.mlp.experts.2.w", "layers.1.mlp.experts.3.w"),
        (
            r"re:^model\.layers\.1\.mlp\.experts\.3\..*",
            r"re:^model\.layers\.1\.mlp\.experts\.1\..*",
        ),
        (r"+:model.layers.1.mlp.experts.3\..*", r"+:model.layers.1.mlp.experts.1\..*"),
        *(
            (name, name)
            for name in ("lm_head", "expert", "re:.*experts.*", "*.experts.*", "w", "3")
        ),
        *((name, name) for name in (r"re:.*\.experts\.\d+\.w", "-:[", "a-experts-8b")),
        (r"re:.*\.experts\.[0-3]\.w", r"re:.*\.experts\.[0-3]\.w"),
        (r"re:.*\.experts\.(0|3)\..*", None),
        ("*.experts.3.*", None),
        (r"re:.*experts.*[02]\.w", None),
        ("model.layers.9.mlp.experts.3.w", None),
        (f"{ONE}4", None),
    ],
)
def test_settings_that_name_experts(before, after, stacked, tmp_path):
    """Names of single experts get the new numbers, patterns that tell experts apart are refused."""
    tensors = checkpoint()
    if stacked:
        for layer in range(3):
            names = [f"model.layers.{layer}.mlp.experts.{expert}.w" for expert in range(4)]
            stack = torch.stack([tensors.pop(name) for name in names])
            tensors[f"model.layers.{layer}.mlp.experts.w"] = stack
    old = saved(tmp_path / "old", model=tensors)
    settings = {"quantization_config": {"ignore": ["a", before], "bits": {before: {"bits": 4}}}}
    for name in ("config.json", "hf_quant_config.json"):
        (old / name).write_text(json.dumps(settings))
    if after is None:
        refused(
            ": must " if before[:5] == "model" else "must not tell",
            permute_state_dict,
            old,
            ORDER,
            tmp_path / "new",
        )
        assert not (tmp_path / "new").exists()
        return
    new = permute_state_dict(old, ORDER, tmp_path / "new")
    for name in ("config.json", "hf_quant_config.json"):
        text = (new / name).read_text()
        about = json.loads(text)["quantization_config"]
        assert about == {"ignore": ["a", after], "bits": {after: {"bits": 4}}}
        assert before != after or text == json.dumps(settings)


def test_export_of_the_command_line(tmp_path, run):
    """Engines without files for placements get a renumbered checkpoint, and only what they run."""
    model = build("mixtral")
    model.save_pretrained(tmp_path / "old")
    placement = placement_for(model)
    placement.save(tmp_path / "p.json")
    arguments = ("export", tmp_path / "p.json", "--to", "megatron", "--out", tmp_path / "new")
    (tmp_path / "old" / "pytorch_model.bin").write_text("")
    status, text, _ = run(*arguments, "--checkpoint", tmp_path / "old")
    assert status == 0
    assert "not copied: pytorch_model.bin (hidden folders" in text
    (tmp_path / "old" / "pytorch_model.bin").unlink()
    expected = permute_state_dict(tmp_path / "old", placement, tmp_path / "expected")
    assert same(tensors_of(tmp_path / "new"), tensors_of(expected))
    mt.Placement(np.arange(8).reshape(1, 1, 8).repeat(2, 1).repeat(3, 0)).save(tmp_path / "p.json")
    arguments = (*arguments[:-1], tmp_path / "newer")
    assert "needs '--checkpoint'" in run(*arguments)[2]
    status, _, error = run(*arguments, "--checkpoint", tmp_path / "old")
    assert status == 2
    assert "as Megatron-Core has no copies, got 16" in error
    assert not (tmp_path / "newer").exists()
