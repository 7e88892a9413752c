"""Every MoE architecture of the installed transformers: exact in memory and on disk, or refused."""

import contextlib
import json
from functools import partial

import numpy as np
import pytest
from moe_models import build_kind, kinds, outputs, placement_for, recorded, same, tensors_of, torch
from transformers.utils import logging

from moetuner.torch import Renumbering, apply_placement, moe_layers, permute_state_dict

# What is here must be right, and neither refused nor passed over.
NAMES = (
    "afmoe deepseek_v2 deepseek_v3 deepseek_v4 ernie4_5_moe gemma4 glm4_moe gpt_oss kolibri1 "
    "minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe qwen3_next"
)
RIGHT = set(NAMES.split())
pytestmark = pytest.mark.filterwarnings("ignore")
REFUSED = (ValueError, NotImplementedError)


@pytest.fixture(autouse=True)
def quiet():
    """Silence transformers, which has much to say about configurations that nobody would serve."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)


@contextlib.contextmanager
def reaching_experts(layers):
    """Collect ids [T,K] as they reach the experts in one pass, by layer, where they can be seen."""
    seen = {}

    def listen(number, _, args, named):
        ids = [t for t in (*args, *named.values()) if isinstance(t, torch.Tensor)]
        ids = [t for t in ids if not t.is_floating_point() and t.dim() == 2]
        if ids:
            seen.setdefault(number, ids[0].clone().numpy())

    with contextlib.ExitStack() as handles:
        for number, layer in enumerate(layers):
            if layer.experts is not None:
                hook = partial(listen, number)
                handle = layer.experts.register_forward_pre_hook(hook, with_kwargs=True)
                handles.callback(handle.remove)
        yield seen


@contextlib.contextmanager
def skipped_if_unbuildable(kind):
    """Skip a kind of model that cannot be built or run here, unless it must be right."""
    why = None
    try:
        yield
    except Exception as error:
        why = f"cannot be tried: {type(error).__name__}: {error}".splitlines()[0]
    if why is not None:
        assert kind not in RIGHT, why
        pytest.skip(why)


def attempt(call, *arguments):
    """Return the result of a call, and why it refuses."""
    try:
        return call(*arguments), None
    except REFUSED as error:
        return None, f"{call.__name__}: {error}"


def renumber_singly(renumber, tensors):
    """Renumber tensors one by one, in another order."""
    names = sorted(tensors, key=lambda name: name[::-1])
    return dict(renumber(name, tensors[name]) for name in names)


def check_renumbering(placement, configs, weights, old, new):
    """Check that single tensors become what all tensors together do, on disk and in memory."""
    stored, of_model = (Renumbering(placement, about) for about in configs)
    assert same(renumber_singly(stored, old), new)
    expected = permute_state_dict(weights, placement, config=configs[0])
    assert same(renumber_singly(of_model, weights), expected)
    assert same(renumber_singly(Renumbering(placement, configs[0], names=old), old), new)
    assert same(renumber_singly(Renumbering(placement, configs[0], inverse=True), new), old)


@pytest.mark.parametrize("kind", kinds())
def test_right_or_refused(kind, tmp_path):
    """What reaches experts is recorded; outputs stay; disk and single tensors agree by bits."""
    tokens = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    with skipped_if_unbuildable(kind):
        model = build_kind(kind)
        before = outputs(model, tokens)
        layers = moe_layers(model)
    placement = placement_for(model)
    old, new, saved, back = (tmp_path / name for name in ("old", "new", "saved", "back"))
    with contextlib.suppress(NotImplementedError, RuntimeError):  # some cannot be saved at all
        model.save_pretrained(old)
    with reaching_experts(layers) as seen:
        recorder, why = attempt(recorded, model, {"input_ids": tokens})
    refused = [why]
    if recorder is not None:
        ids = np.sort(recorder.trace().expert_ids, axis=2)
        for number, own in seen.items():
            assert np.array_equal(np.sort(own, axis=1), ids[:, number]), number
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    _, why = attempt(apply_placement, model, placement)
    refused.append(why)
    assert float((outputs(model, tokens) - before).abs().max()) < 1e-4
    on_disk = any(old.glob("*.safetensors")) if old.exists() else False
    if on_disk:
        out, why_not = attempt(permute_state_dict, old, placement, new)
        refused.append(why_not)
        config = json.loads((old / "config.json").read_text())
        if out is None:
            assert not new.exists()
            with pytest.raises(REFUSED):
                renumber_singly(Renumbering(placement, config), tensors_of(old))
        else:
            assert why is None, "what the model refuses is done to its files"
            model.save_pretrained(saved)
            assert same(tensors_of(new), tensors_of(saved))
            assert not same(tensors_of(new), tensors_of(old))
            permute_state_dict(new, placement, back, inverse=True)
            assert same(tensors_of(back), tensors_of(old))
            check_renumbering(
                placement, (config, model.config), weights, *map(tensors_of, (old, new))
            )
    reasons = [reason for reason in refused if reason]
    assert kind not in RIGHT or (on_disk and not reasons), reasons
    if kind in RIGHT:
        assert {(layer.num_experts, layer.top_k) for layer in layers} == {(8, 2)}
        in_memory = permute_state_dict(weights, placement, config=model.config.to_dict())
        assert same(in_memory, dict(model.state_dict()))
        loaded = type(model).from_pretrained(new).eval()
        assert float((outputs(loaded, tokens) - before).abs().max()) < 1e-4
        apply_placement(model, placement, inverse=True)
        assert same(model.state_dict(), weights)
        with torch.no_grad():
            moved = next(t for t in layers[0].experts.parameters() if t.dim() >= 3)
            moved.copy_(moved.flip(0))
        assert float((outputs(model, tokens) - before).abs().max()) > 1e-3
    elif reasons or not on_disk:
        pytest.skip("; ".join(reasons) or "cannot be saved")
