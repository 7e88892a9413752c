"""What the processes of the tests of state, movement and gradients do."""

import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_work import single
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moetuner as mt
from moetuner.torch import ExpertParallelMoE, GroupedExperts, swiglu

HERE = np.array([[[0, 1, -1], [2, 3, 0]]])
THERE = np.array([[[3, -1, 0], [1, 3, 2]]])


def numbers(seed, *size):
    """Give the same numbers on all ranks."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def layer_of(slots, rank, *, factor=1.0, device="cpu"):
    """Make a layer whose expert e holds e + 1 everywhere, or zeros."""
    filling = torch.from_numpy(slots[0, rank].astype(np.float32) + 1) * factor
    up, down = (
        filling[:, None, None].expand(3, *size).clone().to(device) for size in ((8, 4), (4, 4))
    )
    return ExpertParallelMoE(GroupedExperts(up, down), mt.Placement(slots, num_experts=4), 0)


def experts_of(layer):
    """Give the experts that a layer's weights are of, by slot."""
    ups, downs = (w.detach()[:, 0, 0].round().int() - 1 for w in layer.experts.weights().values())
    assert ups.equal(downs)
    return ups.tolist()


def saved_and_loaded(rank, folder, high_level):
    """Give what this rank holds after loading in the same placement, and in another one."""
    warnings.filterwarnings("ignore")
    model = torch.nn.ModuleDict({"mlp": layer_of(HERE, rank), "head": torch.nn.Linear(2, 2)})
    state = get_model_state_dict(model) if high_level else model.state_dict()
    dcp.save(state, checkpoint_id=folder)
    results = []
    for slots in (HERE, THERE):
        layer = layer_of(slots, rank, factor=0.0)
        model = torch.nn.ModuleDict({"mlp": layer, "head": torch.nn.Linear(2, 2)})
        state = get_model_state_dict(model) if high_level else model.state_dict()
        # Into new memory, so that it is the loading of the state that counts.
        state = {key: tensor.clone() for key, tensor in state.items()}
        dcp.load(state, checkpoint_id=folder)
        if high_level:
            set_model_state_dict(model, state)
        else:
            model.load_state_dict(state)
        results.append(experts_of(layer))
    return results


class Routed(torch.nn.Module):
    """A layer whose tokens choose by themselves, between other modules."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(1)
        self.gate, self.moe = torch.nn.Linear(4, 4, bias=False), layer

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(dim=-1).topk(2)
        return self.moe(x, chosen, weights)


def gathered(rank):
    """Give what every expert is in a full state, and what another placement holds of it."""
    full = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(Routed(layer_of(HERE, rank)), options=full)
    results = {name: tensor.flatten()[0].item() - 1 for name, tensor in state.items()}
    del results["gate.weight"]
    whole = all(tensor.shape[0] in (4, 8) for tensor in state.values())
    other = Routed(layer_of(THERE, rank, factor=0.0))
    set_model_state_dict(other, state, options=full)
    return results, whole, experts_of(other.moe)


def optimised(rank, folder):
    """Whether an optimizer's state comes back on every rank, and what other slots say to it."""
    warnings.filterwarnings("ignore")

    def trained(slots, learn):
        model = Routed(layer_of(slots, rank, factor=0.1))
        optimizer = torch.optim.AdamW(model.parameters())
        if learn:
            model(numbers(7, 6, 4)).square().sum().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = trained(HERE, True)
    dcp.save(dict(zip("mo", get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)
    right = optimizer.state[model.moe.experts.up]["exp_avg"]
    model, optimizer = trained(HERE, False)
    state = dict(zip("mo", get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["m"], optim_state_dict=state["o"])
    same = torch.equal(optimizer.state[model.moe.experts.up]["exp_avg"], right)
    model, optimizer = trained(THERE, False)
    try:
        state = dict(zip("mo", get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder)
    except BaseException as error:
        return same and bool(right.any()), str(error)
    return same, "no error"


def wrapped(rank, how):
    """Give what a model says that is wrapped whole, and how far it is off with experts left out."""
    x = numbers(rank, 6, 4)
    expected = Routed(layer_of(HERE, rank))(x).detach()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def wrap(model, ignore):
        if how == "fully_shard":
            ignored = set(model.moe.experts.parameters()) if ignore else None
            return fully_shard(model, mesh=mesh, ignored_params=ignored)
        if ignore:
            names = [name for name, _ in model.named_parameters() if "experts_" in name]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return DistributedDataParallel(model)

    try:
        wrap(Routed(layer_of(HERE, rank)), False)(x)
        said = "no error"
    except ValueError as error:
        said = str(error)
    model = wrap(Routed(layer_of(HERE, rank)), True)
    out = [model(x) for _ in range(2)][1]
    out.sum().backward()
    return said, float((out.detach() - expected).abs().max())


def states(rank):
    """Give names of a state and what loading other ones says."""
    layer = layer_of(HERE, rank)
    names = sorted(layer.state_dict())
    here = sorted(name for name, w in layer.state_dict().items() if len(w.to_local()))
    said = []
    whole = {f"expert.{e}.{n}": torch.full(s, e + 1.0) for e in range(4) for n, s in SIZES}
    for state in (
        whole,
        {**whole, "expert.4.up": whole["expert.3.up"]},
        {k: v for k, v in whole.items() if k != f"expert.{2 * rank}.up"},
        {**whole, f"expert.{2 * rank}.up": torch.zeros(3, 4)},
        {**whole, "experts.up": torch.zeros(3, 8, 4)},
    ):
        try:
            layer.load_state_dict(state)
        except RuntimeError as error:
            said.append(" ".join(str(error).split("\n")[1:]).strip())
        else:
            said.append("")
    empty = layer_of(HERE, rank, device="meta")
    empty.load_state_dict(whole, assign=True)
    weights = empty.experts.weights().values()
    assert all(isinstance(weight, torch.nn.Parameter) for weight in weights)
    return names, here, said, experts_of(empty)


SIZES = (("up", (8, 4)), ("down", (4, 4)))


def forward(layer, device="cpu", dtype=torch.float32):
    """Run a layer on tokens that need all its experts, two of which have copies."""
    hidden = numbers(1, 6, 4).to(device, dtype)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 3], [3, 0], [2, 1]]).to(device)
    weights = torch.ones(6, 2, device=device, dtype=dtype)
    with torch.no_grad():
        return layer(hidden, chosen, weights, first_token=0)


def moved(rank):
    """Give how far a layer is from itself after moving: other types, and by the meta device."""
    expected = forward(layer_of(HERE, rank))

    def filled(layer):
        layer.to_empty(device="cpu")
        right = layer_of(HERE, rank).experts.weights()
        with torch.no_grad():
            for name, weight in layer.experts.weights().items():
                weight.copy_(right[name])
        return layer

    results = [
        forward(layer_of(HERE, rank).bfloat16(), dtype=torch.bfloat16),
        forward(layer_of(HERE, rank).double(), dtype=torch.float64),
        forward(filled(layer_of(HERE, rank, device="meta"))),
        forward(filled(layer_of(HERE, rank).to("meta"))),
    ]
    return [float((out.float() - expected).abs().max() / expected.abs().max()) for out in results]


def trained(rank, node, learns):
    """Give how far gradients are from those of one process, where rank 0 alone is visited.

    ``learns`` says what needs gradients: only experts, only those of the last rank, or only
    the tokens of rank 0.
    """
    ranks = dist.get_world_size()
    slots = np.arange(2 * ranks).reshape(1, ranks, 2)
    up, down = numbers(10, 2 * ranks, 8, 4), numbers(20, 2 * ranks, 4, 4)
    experts = GroupedExperts(up[2 * rank : 2 * rank + 2], down[2 * rank : 2 * rank + 2])
    experts.requires_grad_(learns == "experts" or (learns == "last" and rank == ranks - 1))
    layer = ExpertParallelMoE(experts, mt.Placement(slots), 0, devices_per_node=node)
    tokens = numbers(rank, 5, 4).requires_grad_(learns == "tokens" and rank == 0)
    chosen, weights = torch.tensor([[0, 1]] * 5), torch.ones(5, 2)
    layer(tokens, chosen, weights).square().sum().backward()
    own = tokens.detach().clone().requires_grad_(True)
    single(own, chosen, weights, up, down, swiglu).square().sum().backward()
    up.requires_grad_(True)
    down.requires_grad_(True)
    for sender in range(ranks):
        rows = numbers(sender, 5, 4)
        single(rows, chosen, weights, up, down, swiglu).square().sum().backward()
    here = slice(2 * rank, 2 * rank + 2)
    pairs = [(tokens, own.grad), (experts.up, up.grad[here]), (experts.down, down.grad[here])]
    # Nobody who visits no expert has a gradient; who needs none has none.
    pairs = [(of, right if of.requires_grad else 0 * right) for of, right in pairs]
    pairs = [(0 * right if of.grad is None else of.grad, right) for of, right in pairs]
    return max(float((x - y).abs().max() / (1 + y.abs().max())) for x, y in pairs)


def modes_differ(rank):
    """Give what every rank says if the last one has gradients disabled, and then none has."""
    layer = layer_of(HERE, rank)
    hidden, chosen, weights = numbers(1, 2, 4), torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    said = ""
    try:
        with torch.set_grad_enabled(rank == 0):
            layer(hidden, chosen, weights)
    except RuntimeError as error:
        said = str(error)
    with torch.no_grad():
        layer(hidden, chosen, weights)
    return said


def states_and_gradients(rank, folder):
    """Give what becomes of states, wrappers, moves and gradients, by name."""
    return {
        "saved": [saved_and_loaded(rank, f"{folder}/{high}", high) for high in (False, True)],
        "states": states(rank),
        "gathered": gathered(rank),
        "optimised": optimised(rank, f"{folder}/optimised"),
        "wrapped": {how: wrapped(rank, how) for how in ("DistributedDataParallel", "fully_shard")},
        "moved": moved(rank),
        "modes": modes_differ(rank),
    }


def all_gradients(rank):
    """Give the largest difference of gradients, whoever learns."""
    return max(
        trained(rank, node, learns)
        for node in (None, 2)
        for learns in ("experts", "last", "tokens")
    )
