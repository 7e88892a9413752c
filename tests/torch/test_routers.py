"""Recording where routers are unusual: ids, runs, places, copies, and waiting for the device."""

import copy

import numpy as np
import pytest
from moe_models import WATCHERS, build, choices, ending, prompts, recorded, refused, torch
from waiting import waiting

import moetuner as mt
from moetuner.torch import RoutingCounters, capture, moe_layers


@WATCHERS
def test_a_router_that_runs_twice_is_refused(observe):
    """One block at two places has no single choice per token; the other layers can be named."""
    model, tokens = build("mixtral"), prompts()
    expected = choices(model, tokens)[:, :, 0]
    model.model.layers[2].mlp = model.model.layers[1].mlp

    def counts(routers=None):
        watcher = recorded(model, observe=observe, routers=routers)
        if observe is capture:
            return np.bincount(watcher.trace().expert_ids.ravel(), minlength=8)
        return watcher.statistics().total_load[0]

    refused("layers.1.mlp.gate ran more than once in a forward pass", counts)
    right = np.bincount(expected.ravel(), minlength=8)
    assert counts(["model.layers.0.mlp.gate"]).tolist() == right.tolist()


def test_zero_computation_experts():
    """LongCat's router also chooses rows without experts: counters leave them out."""
    model, tokens = build("longcat_flash"), prompts()
    layers = moe_layers(model)
    assert layers[0].choices > 256 > layers[0].num_experts
    for layer in layers:
        layer.router.e_score_correction_bias[:8] += 0.2  # some of both kinds are chosen
    counters = recorded(model, observe=RoutingCounters.attach, window=10)
    ids = choices(model, tokens).reshape(tokens.numel(), len(layers), -1)
    load = counters.statistics().window_load
    for window, layer in np.ndindex(load.shape[:2]):
        part = ids[10 * window :][:10, layer].ravel()
        assert load[window, layer].tolist() == np.bincount(part[part < 8], minlength=8).tolist()
    assert 0 < load.sum() < ids.size
    refused("256 zero-computation experts: RoutingCounters counts the", recorded, model)


class Fixed(torch.nn.Module):
    """A router that returns its input as ids."""

    top_k, num_experts = 2, 250

    def forward(self, ids):
        return ids.long(), torch.zeros_like(ids)


def fixed(ids, **options):
    """Record the ids as a model's only router gives them."""
    model = torch.nn.Sequential(Fixed())
    return recorded(model, lambda: model(torch.tensor(ids).float()), routers=["0"], **options)


TEXT = r"expert ids must be from 0 to 249, got others in layer 0 \(0\)"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        # What one or two bytes would make another id.
        *(([3, number], TEXT) for number in (250, 256 + 3, 65536 + 3, -1)),
        # A trace of it could not be read again.
        ([7, 7], "token 1, layer 0"),
    ],
)
def test_ids_that_cannot_be_are_errors(wrong, text, tmp_path):
    """Ids are never taken for others, nor twice; other tokens are in a file."""
    ids = [[1, 2], wrong, [5, 6]]
    with ending(ValueError, "the 2 tokens until then", text):
        fixed(ids, path=tmp_path / "t.safetensors")
    trace = mt.RoutingTrace.load(tmp_path / "t.partial.safetensors")
    assert trace.expert_ids[:, 0].tolist() == [[1, 2], [5, 6]]
    if text == TEXT:
        with pytest.raises(ValueError, match=text):
            fixed(ids, observe=RoutingCounters.attach).statistics()


def test_a_trace_that_cannot_be_written_is_not_lost(tmp_path):
    """What was recorded is in a file beside it, and the error comes out of the block."""
    path = tmp_path / "t.safetensors"
    path.mkdir()
    with ending(IsADirectoryError, "partial.safetensors has the 2 tokens"):
        fixed([[1, 2], [5, 6]], path=path)
    assert mt.RoutingTrace.load(tmp_path / "t.partial.safetensors").tokens == 2


@pytest.mark.filterwarnings("ignore:a forward pass is not recorded")  # meta has no autocast
def test_counters_follow_a_model_that_moves():
    """After ``to`` their tables are where the model runs."""
    model = torch.nn.Sequential(Fixed())
    places = ("cpu", "meta")
    passes = [lambda device=device: model(torch.zeros(6, 2, device=device)) for device in places]
    counters = recorded(model, *passes, observe=RoutingCounters.attach, routers=["0"])
    assert counters.device.type == "meta"
    assert {table.device.type for table in counters._tables.values()} == {"meta"}


def test_a_copy_of_a_recorded_model_is_not_recorded(tmp_path):
    """It generates with its own weights; afterwards neither is changed."""
    model, tokens = build("mixtral"), prompts()
    own = set(model.__dict__)
    with torch.no_grad(), capture(model, path=tmp_path / "t.safetensors") as recorder:
        model(input_ids=tokens)
        other = copy.deepcopy(model)
        other(input_ids=tokens)
        other.generate(tokens, max_new_tokens=3)
    assert (recorder.trace().tokens, recorder.dropped) == (21, 0)
    assert set(model.__dict__) == own
    assert other.prepare_inputs_for_generation.__self__ is other


def test_recorders_of_one_model_end_in_any_order():
    """Both record generate, and nothing stays behind."""
    model, tokens = build("mixtral"), prompts()
    own, given = set(model.__dict__), {"max_new_tokens": 3, "do_sample": False, "use_cache": False}
    with torch.no_grad():
        first, second = (RoutingCounters.attach(model) for _ in range(2))
        for counters in (first, second):
            model.generate(tokens, **given)
            counters.detach()
    assert set(model.__dict__) == own
    loads = [counters.statistics().total_load[0].sum() for counters in (first, second)]
    assert loads == [2 * 3 * (7 + 2), 2 * 2 * 3 * (7 + 2)]


@WATCHERS
def test_no_pass_waits_for_the_device(observe):
    """A pass and a step of generate ask the device for nothing that they did not ask before."""
    model, tokens = build("mixtral"), prompts()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0

    def waits():
        with waiting() as names, torch.no_grad():
            model(input_ids=tokens, attention_mask=mask)
            for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
                own = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, **more}
                model.generate(tokens, **own)
        return sorted(names)

    model.generate(tokens, max_new_tokens=2)  # what is asked for once only
    without = waits()
    assert without
    with observe(model):
        assert waits() == without
