"""apply_placement: the model computes what it did, with its experts in another order."""

import numpy as np
import pytest
from moe_models import (
    Block,
    build,
    placement_for,
    random_placement,
    refused,
    torch,
    transformers,
)

import moetuner as mt
from moetuner.torch import apply_placement, moe_layers


def test_positions_are_the_placements():
    """The experts of device d are at positions d*E/D and up, in ascending order, bit by bit."""
    model = build("gpt_oss").to(torch.bfloat16)
    slots = np.array([[[7, 0, -1], [2, -1, 1], [-1, 4, 3], [6, 5, -1]]] * 3)
    old = [layer.experts.gate_up_proj_bias.clone() for layer in moe_layers(model)]
    order = apply_placement(model, mt.Placement(slots))
    assert order[0].tolist() == [0, 7, 1, 2, 3, 4, 5, 6]
    for layer, before in zip(moe_layers(model), old, strict=True):
        assert layer.experts.gate_up_proj_bias.equal(before[order[0]])


def test_lists_of_experts():
    """Experts that are modules of a list change places, together with their router rows."""
    torch.manual_seed(0)
    model, run = running(Block(), Block())
    before = run()
    apply_placement(model, random_placement(2, 4, 2, seed=3))
    assert torch.allclose(run(), before, rtol=0, atol=1e-6)


def unchanged(model, placement, text):
    """Expect a refusal with a reason, and an unchanged model."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    refused(text, apply_placement, model, placement)
    assert all(
        tensor.is_meta or tensor.equal(before[key]) for key, tensor in model.state_dict().items()
    )


def test_groups_must_stay_whole():
    """A group-limited router allows only orders that keep its groups together."""
    model = build("deepseek_v3_groups")
    slots = np.arange(8).reshape(2, 4)
    mixed = [[0, 1, 2, 4], [3, 5, 6, 7]]
    text = (
        "model.layers.2.mlp.gate: its router chooses among 4 groups of 2 experts first, so groups "
        "must stay whole, but positions 2 to 3 would hold experts of groups [1, 2]"
    )
    unchanged(model, mt.Placement(np.stack([slots, mixed])), text)
    # Within a device the order is free, so that groups can always be whole there.
    apply_placement(model, mt.Placement([[[4, 0, 5, 1], [7, 3, 6, 2]]] * 2))


def test_what_is_no_order():
    """Replicas and unequal counts cannot be told to an engine with contiguous experts."""
    model, sizes = build("mixtral"), "placement must have 3 layers of 8 experts as the model has, "
    one = "placement must have one copy of each expert to become an order of experts, got "
    equal = "placement must have 8/2 experts on every device to become an order of experts, got "
    for placement, text in (
        (mt.Placement([[[0, 1, 2, 3, 4], [5, 6, 7, 0, -1]]] * 3), f"{one}2 of expert 0 in layer 0"),
        (
            mt.Placement([[[0, 1, 2, 3, 4], [5, 6, 7, -1, -1]]] * 3),
            f"{equal}5 on device 0 in layer 0",
        ),
        (random_placement(2, 8, 2), f"{sizes}got 2 of 8"),
        (random_placement(3, 16, 2), f"{sizes}got 3 of 16"),
    ):
        unchanged(model, placement, text)


def test_equal_router_rows_always_tie():
    """Where numbers alone decide between two experts, they may not change."""
    model = build("olmoe")
    with torch.no_grad():
        weight = moe_layers(model)[1].router.weight
        weight[6] = weight[2]
    unchanged(
        model,
        placement_for(model),
        "model.layers.1.mlp: experts 2 and 6 have the same router rows",
    )
    apply_placement(model, mt.Placement(np.arange(8).reshape(1, 2, 4).repeat(3, 0)))


def test_weights_must_be_there():
    """Weights that are not in memory, packed or of unknown kinds are refused, not skipped."""
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(build("mixtral").config)
    text = "weights must be in memory, some are on the meta device"
    refused(text, apply_placement, model, random_placement(3, 8, 2))
    model = build("mixtral")
    experts = moe_layers(model)[2].experts
    experts.down_proj = torch.nn.Parameter(torch.zeros(64, 32))
    unchanged(
        model,
        placement_for(model),
        "model.layers.2.mlp.experts.down_proj: must be [8, ..], experts first as in the placement",
    )
    model = build("mixtral")
    moe_layers(model)[0].router.register_buffer("table", torch.zeros(5, 8))
    unchanged(
        model,
        placement_for(model),
        "model.layers.0.mlp.gate.table: [5, 8] may depend on the order of experts",
    )


def test_models_without_moe_layers():
    """A dense model is refused, and a module that it does not have."""
    dense = torch.nn.Sequential(torch.nn.Linear(2, 2))
    unchanged(
        dense,
        random_placement(1, 4, 2),
        "model must have MoE layers, Sequential has no module with 'experts' and a router",
    )
    refused("routers must be modules of the model, got 'gate'", moe_layers, dense, ["gate"])


def running(*blocks):
    """Give a model of blocks, and what it computes."""
    model = torch.nn.Sequential(*blocks)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    return model, lambda: model(x)


@pytest.mark.parametrize("memory", [False, True])
def test_weights_of_two_layers_move_once_or_not_at_all(memory):
    """Tied weights move once where both layers have one order, and are refused where they do not.

    So does memory that two parameters share; memory of which a part would stay is refused.
    """
    torch.manual_seed(0)
    first, second = Block(stacked=True), Block(stacked=True)
    tied = first.experts.weight
    second.experts.weight = torch.nn.Parameter(tied.data) if memory else tied
    model, run = running(first, second)
    before = run()
    differ = mt.Placement([[[3, 1], [0, 2]], [[0, 1], [2, 3]]])
    unchanged(model, differ, "1.experts.weight: must not share memory with 0.experts.weight")
    assert run().equal(before)
    apply_placement(model, mt.Placement([[[3, 1], [0, 2]]] * 2))
    assert torch.allclose(run(), before, rtol=0, atol=1e-4)

    model.register_parameter("other", torch.nn.Parameter(first.gate.weight.data[1:]))
    unchanged(model, mt.Placement([[[3, 1], [0, 2]]] * 2), "must not share memory with")


def test_shared_lists_and_blocks():
    """A block that runs twice is one layer; experts that two routers share are refused."""
    torch.manual_seed(0)
    block, placement = Block(), mt.Placement([[[3, 1], [0, 2]]])
    model, run = running(block, block)
    before = run()
    apply_placement(model, placement)
    assert torch.allclose(run(), before, rtol=0, atol=1e-4)
    other = Block()
    other.experts = block.experts
    text = "must not share memory with 0.experts."
    unchanged(running(block, other)[0], placement, text)
