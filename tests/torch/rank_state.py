"""Checks of states, movement and gradients of ExpertParallelMoE, which processes run."""

import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_layer import message, on
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moetuner as mt
from moetuner.torch import ExpertParallelMoE, GroupedExperts

SIZES = (("up", (8, 4)), ("down", (4, 4)))
HERE = np.array([[[0, 1, -1], [2, 3, 0]]])
THERE = np.array([[[3, -1, 0], [1, 3, 2]]])


def numbers(seed, *size):
    """Draw the same numbers on all ranks."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def layer_of(slots, rank, *, factor=1.0, device="cpu"):
    """Make a layer whose expert e holds e + 1 everywhere, or zeros."""
    filling = torch.from_numpy(slots[0, rank].astype(np.float32) + 1) * factor
    filling = filling[:, None, None].to(device)
    up, down = (filling.expand(3, *size).clone() for _, size in SIZES)
    return ExpertParallelMoE(GroupedExperts(up, down), mt.Placement(slots, num_experts=4), 0)


def experts_of(layer):
    """Return the experts whose weights a layer has, by slot."""
    ups, downs = (w.detach()[:, 0, 0].round().int() - 1 for w in layer.experts.weights().values())
    assert ups.equal(downs)
    return ups.tolist()


class Routed(torch.nn.Module):
    """A model with a router and a layer."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(1)
        self.gate, self.moe = torch.nn.Linear(4, 4, bias=False), layer

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(dim=-1).topk(2)
        return self.moe(x, chosen, weights)


@on(2)
def test_a_checkpoint_has_every_expert(rank, folder):
    """All ranks load their own experts, copies too, in the placement that was saved and another."""
    warnings.filterwarnings("ignore")

    def model_of(slots, factor=1.0):
        layer = layer_of(slots, rank, factor=factor)
        return torch.nn.ModuleDict({"mlp": layer, "head": torch.nn.Linear(2, 2)})

    for high_level in (False, True):
        state_of = states.get_model_state_dict if high_level else torch.nn.Module.state_dict
        load = states.set_model_state_dict if high_level else torch.nn.Module.load_state_dict
        dcp.save(state_of(model_of(HERE)), checkpoint_id=f"{folder}/{high_level}")
        for slots in (HERE, THERE):
            model = model_of(slots, factor=0.0)
            # Into new memory, so that it is the loading of the state that counts.
            state = {key: tensor.clone() for key, tensor in state_of(model).items()}
            dcp.load(state, checkpoint_id=f"{folder}/{high_level}")
            load(model, state)
            assert experts_of(model["mlp"]) == slots[0, rank].tolist()


@on(2)
def test_a_full_state_has_every_expert(rank):
    """It is gathered from all ranks, copies once, and loads into any placement."""
    full = states.StateDictOptions(full_state_dict=True)
    state = states.get_model_state_dict(Routed(layer_of(HERE, rank)), options=full)
    assert len(state) == 1 + 4 * len(SIZES)
    for expert in range(4):
        for name, size in SIZES:
            weight = state[f"moe.expert.{expert}.{name}"]
            assert weight.shape == size
            assert (weight == expert + 1).all()
    other = Routed(layer_of(THERE, rank, factor=0.0))
    states.set_model_state_dict(other, state, options=full)
    assert experts_of(other.moe) == THERE[0, rank].tolist()


@on(2)
def test_an_optimizer_is_not_loaded_into_other_slots(rank, folder):
    """A checkpoint keeps the state of every rank's experts; where they moved it has none."""
    warnings.filterwarnings("ignore")

    def trained(slots, learn):
        model = Routed(layer_of(slots, rank, factor=0.1))
        optimizer = torch.optim.AdamW(model.parameters())
        if learn:
            model(numbers(7, 6, 4)).square().sum().backward()
            optimizer.step()
        return model, optimizer

    def state_of(*parts):
        return dict(zip("mo", states.get_state_dict(*parts), strict=True))

    def moment(model, optimizer):
        return optimizer.state[model.moe.experts.up]["exp_avg"]

    folder, (model, optimizer) = f"{folder}/optimizer", trained(HERE, True)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    right = moment(model, optimizer)
    model, optimizer = trained(HERE, False)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    parts = {"model_state_dict": state["m"], "optim_state_dict": state["o"]}
    states.set_state_dict(model, optimizer, **parts)
    assert right.any()
    assert torch.equal(moment(model, optimizer), right)
    parts = trained(THERE, False)
    error = message(BaseException, lambda: dcp.load(state_of(*parts), checkpoint_id=folder))
    assert "experts_" in error


@on(2)
def test_wrappers_must_leave_out_the_experts(rank):
    """A model that is wrapped whole is refused on all ranks; with experts left out it is right."""
    x = numbers(rank, 6, 4)
    expected = Routed(layer_of(HERE, rank))(x).detach()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def wrapped(how, ignore):
        model = Routed(layer_of(HERE, rank))
        if how == "fully_shard":
            ignored = set(model.moe.experts.parameters()) if ignore else None
            return fully_shard(model, mesh=mesh, ignored_params=ignored)
        if ignore:
            names = [name for name, _ in model.named_parameters() if "experts_" in name]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return DistributedDataParallel(model)

    for how in ("DistributedDataParallel", "fully_shard"):
        error = message(ValueError, lambda how=how: wrapped(how, False)(x))
        assert error.startswith(how)
        assert "build the model again" in error
        model = wrapped(how, True)
        out = [model(x) for _ in range(2)][1]
        out.sum().backward()
        assert torch.allclose(out, expected, rtol=0, atol=1e-5)


@on(2)
def test_a_state_is_of_experts(rank):
    """Names are of experts; a state of all of them loads; what is missing or strange is error."""
    layer, mine = layer_of(HERE, rank), f"expert.{2 * rank}.up"
    state = layer.state_dict()
    whole = {f"expert.{e}.{n}": torch.full(size, e + 1.0) for e in range(4) for n, size in SIZES}
    assert state.keys() == whole.keys()
    here = {name for name, weight in state.items() if len(weight.to_local())}
    assert here == {f"expert.{e}.{n}" for e in ([0, 1], [0, 2, 3])[rank] for n, _ in SIZES}
    layer.load_state_dict(whole)
    for change, text in (
        ({"expert.4.up": whole["expert.3.up"]}, 'Unexpected key(s) in state_dict: "expert.4.up"'),
        ({mine: None}, f'Missing key(s) in state_dict: "{mine}"'),
        ({mine: torch.zeros(3, 4)}, f"{mine} must be [8, 4], got [3, 4]"),
        ({"experts.up": torch.zeros(3, 8, 4)}, "experts.up is of slots, and must be of experts"),
    ):
        given = {key: tensor for key, tensor in (whole | change).items() if tensor is not None}
        assert text in message(RuntimeError, layer.load_state_dict, given)
    empty = layer_of(HERE, rank, device="meta")
    empty.load_state_dict(whole, assign=True)
    weights = empty.experts.weights().values()
    assert all(isinstance(weight, torch.nn.Parameter) for weight in weights)
    assert experts_of(empty) == HERE[0, rank].tolist()


def forward(layer, device="cpu", dtype=torch.float32):
    """Run a layer on tokens that need all its experts, two of which have copies."""
    hidden = numbers(1, 6, 4).to(device, dtype)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 3], [3, 0], [2, 1]]).to(device)
    weights = torch.ones(6, 2, device=device, dtype=dtype)
    with torch.no_grad():
        return layer(hidden, chosen, weights, first_token=0)


@on(2)
def test_a_layer_moves_as_a_whole(rank):
    """In other types, made on meta and filled, and moved by meta it computes what it did."""
    expected = forward(layer_of(HERE, rank))

    def filled(layer):
        layer.to_empty(device="cpu")
        right = layer_of(HERE, rank).experts.weights()
        with torch.no_grad():
            for name, weight in layer.experts.weights().items():
                weight.copy_(right[name])
        return layer

    for tolerance, out in (
        (0.05, forward(layer_of(HERE, rank).bfloat16(), dtype=torch.bfloat16)),
        (1e-6, forward(layer_of(HERE, rank).double(), dtype=torch.float64)),
        (1e-6, forward(filled(layer_of(HERE, rank, device="meta")))),
        (1e-6, forward(filled(layer_of(HERE, rank).to("meta")))),
    ):
        assert (out.float() - expected).abs().max() < tolerance * expected.abs().max()


@on(2)
def test_gradients_enabled_on_some_ranks_only(rank):
    """That is an error on every rank at once, and the next step works."""
    layer = layer_of(HERE, rank)
    given = numbers(1, 2, 4), torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    with torch.set_grad_enabled(rank == 0):
        error = message(RuntimeError, layer, *given)
    assert error == "ranks [0] need gradients and ranks [1] disable them: nothing was sent"
    with torch.no_grad():
        layer(*given)
