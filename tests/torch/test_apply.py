"""apply_placement: the model computes what it did, with its experts in another order."""

import numpy as np
import pytest
from moe_models import Block, build, outputs, placement_for, prompts, refused, torch
from transformers import MixtralForCausalLM

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


def in_order(layers, experts):
    """Return the placement that every model has: the first half of the experts on one device."""
    return mt.Placement(np.arange(experts).reshape(1, 2, -1).repeat(layers, 0))


def unchanged(model, placement, text):
    """Expect a refusal with a reason, and an unchanged model."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    refused(text, apply_placement, model, placement)
    state = model.state_dict().items()
    assert all(tensor.is_meta or tensor.equal(before[key]) for key, tensor in state)


def alike(model):
    """Make two router rows equal."""
    weight = moe_layers(model)[1].router.weight
    with torch.no_grad():
        weight[6] = weight[2]


def packed(model):
    """Give experts a weight that has no row for each of them."""
    moe_layers(model)[2].experts.down_proj = torch.nn.Parameter(torch.zeros(64, 32))


def strange(model):
    """Give a router a table of an unknown kind."""
    moe_layers(model)[0].router.register_buffer("table", torch.zeros(5, 8))


ONE = "placement must have one copy of each expert to become an order of experts, got 2 of expert 0"
EQUAL = "placement must have 8/2 experts on every device to become an order of experts, got 5 on "
SIZES = "placement must have 3 layers of 8 experts as the model has, got "
GROUPS = (
    "model.layers.2.mlp.gate: its router chooses among 4 groups of 2 experts first, so groups must "
    "stay whole, but positions 2 to 3 would hold experts of groups [1, 2]"
)


@pytest.mark.parametrize(
    ("name", "change", "placement", "text"),
    [
        ("mixtral", None, mt.Placement([[[0, 1, 2, 3, 4], [5, 6, 7, 0, -1]]] * 3), ONE),
        ("mixtral", None, mt.Placement([[[0, 1, 2, 3, 4], [5, 6, 7, -1, -1]]] * 3), EQUAL),
        ("mixtral", None, in_order(2, 8), f"{SIZES}2 of 8"),
        ("mixtral", None, in_order(3, 16), f"{SIZES}3 of 16"),
        (
            "deepseek_v3_groups",
            None,
            mt.Placement([[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 4], [3, 5, 6, 7]]]),
            GROUPS,
        ),
        ("olmoe", alike, None, "model.layers.1.mlp: experts 2 and 6 have the same router rows"),
        ("mixtral", packed, None, "model.layers.2.mlp.experts.down_proj: must be [8, ..], experts"),
        ("mixtral", strange, None, "model.layers.0.mlp.gate.table: [5, 8] may depend on the order"),
    ],
)
def test_what_cannot_be_exact_is_refused(name, change, placement, text):
    """Orders that are none, split groups, ties, weights and state of unknown kinds."""
    model = build(name)
    if change is not None:
        change(model)
    unchanged(model, placement or placement_for(model), text)


def test_what_does_not_change_the_order_is_free():
    """Within a device groups can always be whole, and equal rows that stay do not matter."""
    apply_placement(build("deepseek_v3_groups"), mt.Placement([[[4, 0, 5, 1], [7, 3, 6, 2]]] * 2))
    model = build("olmoe")
    alike(model)
    apply_placement(model, in_order(3, 8))


def test_models_that_are_not_there():
    """A dense model is refused, a module that it does not have, and weights without memory."""
    dense = torch.nn.Sequential(torch.nn.Linear(2, 2))
    text = "model must have MoE layers, Sequential has no module with 'experts' and a router"
    unchanged(dense, in_order(1, 4), text)
    refused("routers must be modules of the model, got 'gate'", moe_layers, dense, ["gate"])
    with torch.device("meta"):
        model = MixtralForCausalLM(build("mixtral").config)
    text = "weights must be in memory, some are on the meta device"
    refused(text, apply_placement, model, in_order(3, 8))


@pytest.mark.parametrize("memory", [False, True])
def test_weights_of_two_layers_move_once_or_not_at_all(memory):
    """Tied weights, or those in the same memory: once for one order, refused for two or a part."""
    model = build("mixtral")
    first, second, _ = moe_layers(model)
    tied = first.experts.down_proj
    second.experts.down_proj = torch.nn.Parameter(tied.data) if memory else tied
    text = "layers.1.mlp.experts.down_proj: must not share memory with model.layers.0.mlp.experts."
    unchanged(model, placement_for(model), text)
    before, placement = outputs(model), mt.Placement([[[3, 1, 7, 5], [0, 2, 4, 6]]] * 3)
    apply_placement(model, placement)
    assert torch.allclose(outputs(model), before, rtol=0, atol=1e-4)
    model.register_parameter("other", torch.nn.Parameter(first.router.weight.data[1:]))
    unchanged(model, placement, "must not share memory with")


def test_lists_and_blocks():
    """Experts in lists move with their rows, of a block that runs twice once; none are shared."""
    torch.manual_seed(0)
    block, other, placement = Block(), Block(), mt.Placement([[[3, 1], [0, 2]], [[2, 0], [3, 1]]])
    model, x = torch.nn.Sequential(block, block, other), torch.randn(50, 6)
    before = model(x)
    apply_placement(model, placement)
    assert torch.allclose(model(x), before, rtol=0, atol=1e-4)
    other.experts = block.experts
    unchanged(model, mt.Placement(placement.slots[:1]), "must not share memory with 0.experts.")


class Held:
    """A holder of a tensor, as Triton has."""

    __slots__ = ("data",)

    def __init__(self, data):
        self.data = data


def take_out(hold):
    """Return what takes a weight of the last layer out of the parameters, as quantisers do."""

    def change(model):
        experts = moe_layers(model)[2].experts
        experts.packed = hold(experts._parameters.pop("down_proj").detach())

    return change


def scale(model):
    """Give a weight a tensor of its own."""
    moe_layers(model)[2].experts.down_proj.scales = torch.ones(8, 4)


def count(model):
    """Let a router hold a tensor that is no buffer."""
    moe_layers(model)[2].router.favours = torch.ones(8)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (take_out(lambda weight: weight), "experts.packed: weights must be parameters or buffers"),
        (take_out(lambda weight: [{"w": Held(weight)}]), "experts.packed.0.w.data: weights must"),
        (take_out(lambda weight: weight.numpy()), "experts.packed: weights must be parameters"),
        (take_out(lambda _: [torch.nn.Linear(4, 4)]), "experts.packed.0.weight: weights must be"),
        (scale, "experts.down_proj.scales: weights must be parameters or buffers"),
        (count, ".favours: weights must be parameters or buffers"),
    ],
)
def test_weights_outside_the_parameters_are_refused(change, what):
    """What a quantiser keeps as an attribute cannot be moved; the message names it."""
    model = build("mixtral")
    change(model)
    unchanged(model, placement_for(model), what)


def test_attributes_that_do_not_depend_on_the_order_are_no_reason():
    """A view of a parameter moves with it, shared experts compute the same for every order."""
    model = build("qwen2_moe")
    layer = moe_layers(model)[0]
    layer.experts.turned = layer.experts.down_proj.data.mT
    layer.block.shared_expert.up_proj.scales = torch.ones(8, 4)
    before = outputs(model)
    apply_placement(model, placement_for(model))
    assert torch.allclose(outputs(model), before, rtol=0, atol=1e-4)


class Wrapped(torch.Tensor):
    """A quantised tensor: it has another one in it, and no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        how = {"strides": inner.stride(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **how)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, _, args=(), kwargs=None):
        plain = [of.inner if isinstance(of, Wrapped) else of for of in args]
        return cls(function(*plain, **(kwargs or {})))


def test_tensors_without_memory_of_their_own():
    """Those of experts are refused; where they do not move they are no reason, nor the same one."""
    model = build("qwen3_moe")
    layers = moe_layers(model)
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj"):
        weight = torch.nn.Parameter(Wrapped(torch.ones(2, 2)), requires_grad=False)
        getattr(attention, name).weight = weight
    apply_placement(model, placement_for(model))
    for layer in layers:
        inner = Wrapped(layer.experts.down_proj.detach().clone())
        layer.experts.down_proj = torch.nn.Parameter(inner, requires_grad=False)
    same = mt.Placement([[[3, 1, 7, 5], [0, 2, 4, 6]]] * len(layers))
    rule = "must be a whole tensor in memory, in which its elements are as it shows them"
    before = [layer.experts.down_proj.inner.clone() for layer in layers]
    router = layers[0].router.weight.clone()
    refused(f"experts.down_proj: {rule}, got Wrapped", apply_placement, model, same)
    after = [layer.experts.down_proj.inner for layer in layers]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    assert layers[0].router.weight.equal(router)


def test_rows_that_share_memory_are_refused():
    """An expanded weight has one row for all experts, and cannot be written row by row."""
    model = build("mixtral")
    experts = moe_layers(model)[1].experts
    one = experts.down_proj.data[:1].expand(8, -1, -1)
    experts.down_proj = torch.nn.Parameter(one, requires_grad=False)
    unchanged(model, placement_for(model), "experts.down_proj: its elements must not share memory")


def test_weights_of_inference_mode():
    """What was loaded in inference mode is moved like any other, all of it or a part."""
    placement = mt.Placement([[[3, 1, 7, 5], [0, 2, 4, 6]]] * 3)
    with torch.inference_mode():
        whole = build("mixtral")
    part = build("mixtral")
    with torch.inference_mode():
        weight = moe_layers(part)[2].experts.down_proj.detach().clone()
    moe_layers(part)[2].experts.down_proj = torch.nn.Parameter(weight, requires_grad=False)
    for model in (whole, part):
        before = outputs(model)
        apply_placement(model, placement)
        assert torch.allclose(outputs(model), before, rtol=0, atol=1e-4)


def test_gradients_move_with_their_weights():
    """The next step of an optimizer changes the experts that the gradients are of."""
    model, other = build("mixtral"), build("mixtral")
    for of in (model, other):
        of(input_ids=prompts()).logits.square().sum().backward()
    apply_placement(model, placement_for(model))
    for of in (model, other):
        torch.optim.SGD(of.parameters(), lr=1e-3).step()
    assert torch.allclose(outputs(model), outputs(other), rtol=0, atol=1e-4)
    before = outputs(build("mixtral"))
    assert not torch.allclose(outputs(other), before, rtol=0, atol=1e-2)


class Stacked(torch.nn.Module):
    """MoE block of four experts in one tensor, with a table of experts by token."""

    def __init__(self):
        super().__init__()
        self.top_k, self.gate, self.experts = 2, torch.nn.Linear(6, 4), torch.nn.Module()
        self.experts.up = torch.nn.Parameter(torch.randn(4, 3, 2))
        self.gate.register_buffer("tid2eid", torch.tensor([[0, 1], [3, 2]]))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("writes", [False, True])
def test_an_error_in_the_middle_undoes_everything(error, writes, monkeypatch):
    """Wherever a write fails, before or after it wrote, every weight and expert is as before."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(), Stacked(), Block())
    placement = mt.Placement([[[3, 1], [0, 2]], [[2, 0], [3, 1]], [[1, 2], [0, 3]]])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    copy, put = torch.Tensor.copy_, torch.nn.ModuleList.__setitem__
    left = 0

    def failing(write):
        def call(*arguments):
            nonlocal left
            left -= 1
            if left == 0 and not writes:
                raise error
            result = write(*arguments)
            if left == 0:
                raise error
            return result

        return call

    monkeypatch.setattr(torch.Tensor, "copy_", failing(copy))
    monkeypatch.setattr(torch.nn.ModuleList, "__setitem__", failing(put))
    for number in range(1, 100):
        left = number
        try:
            apply_placement(model, placement)
        except error:
            state = model.state_dict()
            assert all(tensor.equal(before[name]) for name, tensor in state.items())
            assert [id(of) for of in model.modules()] == [id(of) for of in modules]
        else:
            break
    assert 20 < number < 99
    assert not model.state_dict()["1.experts.up"].equal(before["1.experts.up"])
