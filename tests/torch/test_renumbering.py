"""Renumbering: one tensor after the other becomes what permute_state_dict makes of all of them."""

import numpy as np
import pytest
from moe_models import (
    build,
    outputs,
    placement_for,
    refused,
    same,
    torch,
)
from test_apply import Wrapped

import moetuner as mt
from moetuner.torch import Renumbering, apply_placement, moe_layers, permute_state_dict

pytestmark = pytest.mark.filterwarnings("ignore")


E, H = 8, 6
ORDER = mt.Placement([[[6, 3, 1, 4], [0, 2, 7, 5]]] * 2)
BLOCK = "model.layers.1.mlp"
NAMES = [
    name
    for layer in range(2)
    for name in (
        f"model.layers.{layer}.mlp.gate.weight",
        f"model.layers.{layer}.self_attn.q_proj.weight",
        *(f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for expert in range(E)),
    )
]
# By the placement, in ascending order within a device.
OLD = [1, 3, 4, 6, 0, 2, 5, 7]


def known(config=None, names=NAMES, placement=ORDER, **options):
    """Make a renumbering by names, without a model."""
    config = {"num_hidden_layers": 2, "n_group": 1} if config is None else config
    return Renumbering(placement, config, names=names, **options)


ROWS = torch.arange(E * 3.0).reshape(E, 3)


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        (f"{BLOCK}.experts.3.up_proj.weight", ROWS, (f"{BLOCK}.experts.1.up_proj.weight", ROWS)),
        (f"{BLOCK}.experts.6.down_proj.weight_scale_inv", ROWS, ("6.down", "3.down")),
        (f"{BLOCK}.experts.gate_up_proj", ROWS, ROWS[OLD]),
        (f"{BLOCK}.experts.gate_up_proj_bias", ROWS.to(torch.float8_e4m3fn), ROWS[OLD]),
        (f"{BLOCK}.experts.down_proj_blocks", ROWS.to(torch.uint8), ROWS[OLD]),
        (f"{BLOCK}.gate.weight", ROWS.bfloat16(), ROWS[OLD]),
        (f"{BLOCK}.gate.e_score_correction_bias", ROWS[:, 0], ROWS[OLD, 0]),
        (f"{BLOCK}.shared_experts.up_proj.weight", ROWS, ROWS),
        ("model.layers.1.self_attn.q_proj.weight", ROWS, ROWS),
        ("model.embed_tokens.weight", ROWS, ROWS),
        # Layers that predict further tokens, of which the placement does not speak.
        ("model.layers.2.mlp.experts.3.up_proj.weight", ROWS, ROWS),
        ("mtp.layers.0.mlp.gate.weight", ROWS, ROWS),
        # Adapters of single experts and of routers, as PEFT names them.
        (
            f"base_model.model.{BLOCK}.experts.6.up_proj.lora_A.weight",
            ROWS,
            ("experts.6.up_proj.lora", "experts.3.up_proj.lora"),
        ),
        (f"base_model.model.{BLOCK}.gate.lora_B.weight", ROWS, ROWS[OLD]),
        (f"base_model.model.{BLOCK}.gate.lora_A.weight", ROWS, ROWS),
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", ROWS, ROWS),
    ],
)
def test_what_becomes_of_one_tensor(name, tensor, expected):
    """Single experts change their name, stacked ones and routers their rows, the rest nothing."""
    new_name, new = known()(name, tensor)
    if isinstance(expected, torch.Tensor):
        assert new_name == name
        assert same({0: new}, {0: expected.to(tensor.dtype)})
    else:
        assert new is tensor
        whole = isinstance(expected[1], torch.Tensor)
        assert new_name == (expected[0] if whole else name.replace(*expected))
    assert same(dict([known(inverse=True)(new_name, new)]), {name: tensor})


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("layers.1.ffn.experts.3.w1.weight", ROWS, "such as model.layers.0.mlp: if its names"),
        (f"actor.{BLOCK}.gate.weight", ROWS, "must be of one of the model's MoE layers"),
        (f"{BLOCK}.experts.8.up_proj.weight", ROWS, "must be of an expert from 0 to 7"),
        (f"{BLOCK}.experts.007.up_proj.weight", ROWS, "leading zeros must be given in names"),
        (f"{BLOCK}.experts.gate_up_proj", ROWS[:4], "gate_up_proj: must be [8, ..], experts first"),
        (f"{BLOCK}.experts.lora_A.weight", ROWS, "an adapter of stacked experts"),
        (f"{BLOCK}.gate.lookup", ROWS, "lookup: [8, 3] may depend on the order of experts"),
        ("model.layers.1.moe.favours", ROWS, "favours: [8, 3] may depend on the order"),
        (f"{BLOCK}.gate.weight", ROWS.to("meta"), "gate.weight: must be a whole tensor in memory"),
        (f"{BLOCK}.gate.weight", ROWS.to_sparse(), "must be a whole tensor in memory"),
        (f"{BLOCK}.gate.weight", Wrapped(ROWS), "a whole tensor in memory, in which"),
        (f"{BLOCK}.gate.tid2eid", torch.tensor([[0, 8]]), "tid2eid: must hold experts 0 to 7"),
    ],
)
def test_one_tensor_that_cannot_be_exact_is_refused(name, tensor, text):
    """A name that is not known, a part of a tensor, an adapter of all experts, memory elsewhere."""
    refused(text, known(), name, tensor)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"config": {}, "names": None}, "names is needed"),
        ({"config": {"model_type": "unheard_of"}, "names": None}, "names is needed"),
        ({"config": 3}, "config must be a configuration or its settings"),
        ({"names": NAMES[:10]}, "as many layers as the checkpoint has MoE layers, 1, got 2"),
        ({"names": "names"}, "names must be a list of names"),
        ({"config": {"num_expert_group": 4}}, "its router chooses among 4 groups of 2 experts"),
        ({"placement": mt.Placement([[[0, 1], [0, 2]]] * 2)}, "must have one copy of each expert"),
    ],
)
def test_what_cannot_be_renumbered_is_refused_at_once(options, text):
    """A placement with copies, groups that it splits, layers that are not there, unknown models."""
    refused(text, known, **options)


def test_a_model_of_other_layers_is_refused():
    """The configuration says how many MoE layers there are."""
    model = build("qwen3_moe")
    text = "placement must have 2 layers as the model has, got 3: with layers beyond it, give"
    placement = mt.Placement(np.arange(8).reshape(1, 2, 4).repeat(3, 0))
    refused(text, Renumbering, placement, model.config)


def test_layers_beyond_the_model_by_their_names():
    """With all names a placement may speak of the layers that predict further tokens too."""
    names = [*NAMES, *(name.replace("model.", "mtp.") for name in NAMES if "layers.0" in name)]
    slots = np.concatenate([np.arange(8).reshape(1, 2, 4).repeat(2, 0), ORDER.slots[:1]])
    renumber = known(names=names, placement=mt.Placement(slots))
    assert renumber("mtp.layers.0.mlp.gate.weight", ROWS)[1].equal(ROWS[OLD])
    assert renumber("model.layers.1.mlp.gate.weight", ROWS)[1].equal(ROWS)


def test_names_with_leading_zeros():
    """Where names have them, they keep them."""
    names = [name.replace("experts.", "experts.00") for name in NAMES]
    name, _ = known(names=names)(f"{BLOCK}.experts.006.up_proj.weight", ROWS)
    assert name == f"{BLOCK}.experts.003.up_proj.weight"


def test_the_whole_of_a_state_dict_is_checked_as_well():
    """Tensors that show what is not in their memory are refused by permute_state_dict."""
    tensors = {name: ROWS.clone() for name in NAMES}
    name = f"{BLOCK}.gate.weight"
    tensors[name] = Wrapped(tensors[name])
    config = {"n_group": 1}
    refused(f"{name}: must be a whole tensor", permute_state_dict, tensors, ORDER, config=config)


def test_a_renumbered_model_is_updated():
    """Weights of a trainer, sent in parts and in any order, give its logits in the placement."""
    running, trained = build("qwen3_moe"), build("qwen3_moe")
    placement = placement_for(running)
    with torch.no_grad():
        for number, weight in enumerate(trained.parameters()):
            weight.mul_(1 + 0.1 * number % 0.7)
    expected = outputs(trained)
    order = apply_placement(running, placement)
    renumber = Renumbering(placement, running.config)
    sent = list(trained.state_dict().items())
    np.random.default_rng(0).shuffle(sent)
    for bucket in (sent[:9], sent[9:]):
        new = dict(renumber(*named) for named in bucket)
        assert not running.load_state_dict(new, strict=False).unexpected_keys
    assert torch.allclose(outputs(running), expected, rtol=0, atol=1e-4)
    layers = zip(moe_layers(running), moe_layers(trained), order, strict=True)
    assert all(a.router.weight.equal(b.router.weight[row]) for a, b, row in layers)
