"""Every MoE architecture of the installed transformers: exact in memory and on disk, or refused."""

import contextlib
import warnings

import numpy as np
import pytest
from moe_kinds import EXPERTS, build, kinds, outputs
from moe_models import random_placement, torch, transformers
from safetensors.torch import load_file

from moetuner.torch import apply_placement, capture, moe_layers, permute_state_dict

# What is here must be right, and neither refused nor passed over.
RIGHT = {
    "afmoe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v4",
    "ernie4_5_moe",
    "gemma4",
    "glm4_moe",
    "gpt_oss",
    "kolibri1",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
}
REFUSED = (ValueError, NotImplementedError)


@pytest.fixture(autouse=True)
def quiet():
    """Silence transformers, which has much to say about configurations that nobody would serve."""
    logs = transformers.utils.logging
    before = logs.get_verbosity()
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logs.set_verbosity(before)


def tensors_of(folder):
    """All tensors of a checkpoint."""
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def reaching_experts(model, layers, tokens):
    """Ids [T,K] as they reach the experts, by layer, where they can be seen."""
    found, handles = {}, []

    def listen(number):
        def hook(_, args, named):
            ids = [t for t in (*args, *named.values()) if isinstance(t, torch.Tensor)]
            ids = [t for t in ids if not t.is_floating_point() and t.dim() == 2]
            found.setdefault(number, ids[0].clone() if ids else None)

        return hook

    for number, layer in enumerate(layers):
        if layer.experts is not None:
            handles.append(
                layer.experts.register_forward_pre_hook(listen(number), with_kwargs=True)
            )
    outputs(model, tokens)
    for handle in handles:
        handle.remove()
    return {number: ids.numpy() for number, ids in found.items() if ids is not None}


@pytest.mark.parametrize("kind", kinds())
def test_right_or_refused(kind, tmp_path):
    """What reaches the experts is recorded; outputs stay in memory and files are permuted alike."""
    tokens = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    why = None
    try:
        model = build(kind)
        before = outputs(model, tokens)
        layers = moe_layers(model)
    except Exception as error:
        why = f"cannot be tried: {type(error).__name__}: {error}".splitlines()[0]
    if why is not None:
        assert kind not in RIGHT, why
        pytest.skip(why)
    groups = layers[0].expert_groups
    placement = random_placement(len(layers), layers[0].num_experts, 2, groups=groups)
    old, new, saved = (tmp_path / name for name in ("old", "new", "saved"))
    with contextlib.suppress(NotImplementedError, RuntimeError):  # some cannot be saved at all
        model.save_pretrained(old)
    refused = []
    try:
        with capture(model) as recorder:
            outputs(model, tokens)
    except REFUSED as error:
        refused.append(f"capture: {error}")
    else:
        recorded = np.sort(recorder.trace().expert_ids, axis=2)
        for number, ids in reaching_experts(model, layers, tokens).items():
            assert np.array_equal(np.sort(ids, axis=1), recorded[:, number]), number
    try:
        apply_placement(model, placement)
    except REFUSED as error:
        refused.append(f"apply_placement: {error}")
    gap = float((outputs(model, tokens) - before).abs().max())
    assert gap < 1e-4, f"outputs differ by {gap}"
    on_disk = any(old.glob("*.safetensors")) if old.exists() else False
    if on_disk:
        try:
            permute_state_dict(old, placement, new)
        except REFUSED as error:
            refused.append(f"permute_state_dict: {error}")
            assert not new.exists()
        else:
            assert not any("apply_placement" in why for why in refused), (
                "what the model refuses is done to its files"
            )
            model.save_pretrained(saved)
            found, expected = tensors_of(new), tensors_of(saved)
            assert found.keys() == expected.keys()
            assert [key for key in found if not found[key].equal(expected[key])] == []
    assert not refused or kind not in RIGHT, refused
    if refused or not on_disk:
        pytest.skip("; ".join(refused) or "cannot be saved")


def test_groups_that_would_be_split_are_seen():
    """Where a router chooses among groups first, an order across groups is refused or the same."""
    tokens = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    seen = 0
    for kind in ("deepseek_v3", "glm4_moe", "deepseek_v2", "axk1", "beam", "solar_open"):
        if kind not in kinds():
            continue
        model = build(kind)
        layers = moe_layers(model)
        before = outputs(model, tokens)
        with contextlib.suppress(*REFUSED):
            apply_placement(model, random_placement(len(layers), EXPERTS, 2, seed=5))
        assert np.abs((outputs(model, tokens) - before).numpy()).max() < 1e-4
        seen += layers[0].expert_groups > 1
    assert seen > 1
