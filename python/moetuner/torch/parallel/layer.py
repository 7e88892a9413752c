"""ExpertParallelMoE: the experts of one layer, spread over ranks by any placement.

Takes what the router decided (hidden states, experts, weights) and gives the weighted sum of the
experts' results. It does not route, and adds no shared expert.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moetuner._checks import whole_number
from moetuner.evaluation.rows import LayerSplit, check_node_size, check_split
from moetuner.placement import EMPTY, Placement
from moetuner.serving.splits import RULES
from moetuner.torch.parallel import exchange
from moetuner.torch.parallel.copies import hash_positions, list_copies
from moetuner.torch.parallel.experts import Experts


class ExpertParallelMoE(nn.Module):
    """One MoE layer on all ranks of a group.

    A token is sent once to each distinct device among those of its experts; the device sums its
    experts' results in the order of the token's choices, and the token's own rank sums the devices'
    in ascending order. Both orders are fixed, so two runs agree to the last bit.

    Parameters
    ----------
    experts
        The experts of this rank's slots, in their order: ``GroupedExperts``, or anything with its
        two methods.
    placement
        One for all layers, with as many devices as the group has ranks; replicas and empty slots
        are allowed.
    layer
        The layer's number in the placement.
    group
        The ranks; None for all.
    devices_per_node
        Exchange hierarchically: a token crosses to each distinct node once, to the rank with its
        own number there, and is fanned out inside. None sends straight to every device.
    split
        ``"even"``: copies share an expert's tokens by position, as ``moetuner.evaluate`` assumes.
        ``"nearest"``: own device, own node, then by position.

    Attributes
    ----------
    experts
        The experts of this rank's slots.
    placement
        The placement in force.
    traffic
        Rows and bytes exchanged with every peer; ``moetuner.dispatch_rows`` predicts them.

    Notes
    -----
    The state has the weights of experts one by one, as ``expert.3.up``. With several ranks they are
    DTensors, so ``torch.distributed.checkpoint`` loads what all ranks saved into any other
    placement, and ``full_state_dict`` gathers them. The state of an optimizer follows the slots:
    parameters are named by them, as ``experts_0_2_4.up``, and every rank saves and loads its own.

    Wrappers that take all ranks for equal (``DistributedDataParallel``, ``fully_shard``) must leave
    out the experts; a forward pass that finds them inside is refused. The gradient of an expert is
    the sum over the tokens of all ranks, where those wrappers take means: divide it by the ranks.

    Raises
    ------
    ValueError
        If placement, layer, group and experts do not fit together.
    """

    experts: Experts

    def __init__(
        self,
        experts: Experts,
        placement: Placement,
        layer: int,
        *,
        group: dist.ProcessGroup | None = None,
        devices_per_node: int | None = None,
        split: LayerSplit = "even",
    ) -> None:
        super().__init__()
        self.group, self.devices_per_node, self.split = group, devices_per_node, check_split(split)
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        vars(self)["experts"] = experts  # so that no name without slots is registered
        self.layer = whole_number("layer", layer, lowest=0, highest=placement.layers - 1)
        self.node_size = check_node_size(self.ranks, devices_per_node)
        self.traffic = exchange.TrafficCounters(self.ranks)
        self._served = 0  # tokens of this rank so far: where its positions run on
        self._name = ""
        self._last_ddp: Any = None
        self._make_tables(placement)

    def _make_tables(self, placement: Placement) -> None:
        """Make tables of the copies of every expert, where the experts' weights are."""
        experts, device = placement.num_experts, self.device
        # As many copies as an expert can have in slots of this number, whatever the placement.
        most_copies = placement.slots[0].size - experts + 1
        self._table = torch.zeros(experts, most_copies, dtype=torch.int32, device=device)
        self._count = torch.ones(experts, dtype=torch.int64, device=device)
        # A number that ranks with the same slots and rules share, and others do not.
        self._fingerprint = torch.zeros((), dtype=torch.int64, device=device)
        self.switch(placement)

    def switch(self, placement: Placement) -> None:
        """Put another placement in force; the experts' weights must be in its slots already."""
        width, experts = placement.slots_per_device, placement.num_experts
        if placement.devices != self.ranks:
            rule = f"{self.ranks} devices, the ranks of the group"
            raise ValueError(f"placement must have {rule}, got {placement.devices}")
        for name, weight in self.experts.weights().items():
            if len(weight) != width:
                rule = f"{name} must have the placement's {width} slots"
                raise ValueError(f"experts: {rule}, got {list(weight.shape)}")
        slots = placement.slots[self.layer]
        home = self.rank if RULES[self.split].by_home else None
        table, count = list_copies(slots, experts, home=home, node=self.node_size)
        rules = (slots.shape, experts, self.layer, self.devices_per_node, self.split)
        digest = hashlib.sha256(repr(rules).encode() + slots.astype("<i4").tobytes()).digest()
        # Tables stay where they are, so that captured CUDA graphs follow.
        self._table[:, : table.shape[1]].copy_(torch.from_numpy(table))
        self._count.copy_(torch.from_numpy(count))
        self._fingerprint.fill_(int.from_bytes(digest[:8], "little", signed=True))
        self.placement = placement
        if isinstance(self.experts, nn.Module):
            # Named by what is in its slots, so that nothing takes the parameters of different
            # experts for one: a checkpoint of an optimizer keeps those of every rank, and is not
            # loaded into other slots.
            self._modules.pop(self._name, None)
            names = ("none" if expert == EMPTY else str(expert) for expert in self._slots())
            self._name = f"experts_{'_'.join(names)}"
            self.add_module(self._name, self.experts)

    def _slots(self) -> list[int]:
        slots: list[int] = self.placement.slots[self.layer, self.rank].tolist()
        return slots

    @property
    def device(self) -> torch.device:
        """Device of the experts' weights."""
        return next(iter(self.experts.weights().values())).device

    @property
    def expert(self) -> Any:
        """The weights of all experts one by one, as the state names them."""
        return _states().nest(_states().list_expert_weights(self))

    def _names(self) -> dict[int, str]:
        """Return names in the state by tensor, where experts are a module."""
        if not isinstance(self.experts, nn.Module):
            return {}
        kinds = (self.experts.named_parameters, self.experts.named_buffers)
        named = (kind(self._name, remove_duplicate=False) for kind in kinds)
        return {id(tensor): name for name, tensor in itertools.chain(*named)}

    def state_dict(
        self, *args: Any, prefix: str = "", keep_vars: bool = False, **options: Any
    ) -> Any:
        """Return the state, with the weights of the experts one by one."""
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **options)
        names = self._names()
        for weight in self.experts.weights().values():
            for part in (weight, weight._base):
                state.pop(f"{prefix}{names.get(id(part))}", None)
        for key, weight in _states().list_expert_weights(self).items():
            state[f"{prefix}expert.{key}"] = weight if keep_vars else weight.detach()
        return state

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *reports: list[str]
    ) -> None:
        missing_keys, unexpected_keys, error_msgs = reports
        expert_prefix, weights, names = f"{prefix}expert.", self.experts.weights(), self._names()
        keys = [key for key in state if key.startswith(expert_prefix)]
        stored = {key.removeprefix(expert_prefix): state.pop(key) for key in keys}
        old = [key for key in state if key.startswith(f"{prefix}experts.")]
        error_msgs += [f"{key} is of slots, and must be of experts one by one" for key in old[:1]]
        for name, weight in weights.items():
            full, missing, wrong = _states().stack(name, weight, self._slots(), stored)
            missing_keys += [expert_prefix + key for key in missing]
            error_msgs += [expert_prefix + message for message in wrong]
            key = names.get(id(weight))
            if key is None:
                with torch.no_grad():
                    weight.copy_(full)
                key, full = names.get(id(weight._base)), weight._base
            if key is not None:  # the experts load what is theirs
                state[prefix + key] = full
        every = {
            f"{expert}.{weight_name}"
            for expert in range(self.placement.num_experts)
            for weight_name in weights
        }
        unexpected_keys += [
            expert_prefix + key for key in sorted(stored) if strict and key not in every
        ]
        super()._load_from_state_dict(state, prefix, metadata, strict, *reports)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        first_token: int | Tensor | None = None,
    ) -> Tensor:
        """Run the experts of this rank's tokens; every rank of the group takes part.

        Parameters
        ----------
        hidden_states
            Tokens of this rank [T,H]; T may differ between ranks and be 0, H and type may not.
        top_k_index
            Experts of each token [T,K], as the checkpoint numbers them.
        top_k_weights
            The router's weights [T,K].
        first_token
            Position of the first token among those of all ranks, or the position of every token
            [T]; decides between copies of an expert. By default positions run on from step to step,
            rank by rank in each, as if every rank had as many tokens; where gradients are wanted
            every step begins at 0 instead, since its recomputation must find the same copies.

        Returns
        -------
        Tensor
            Weighted sums of the experts' results [T,H].

        Raises
        ------
        ValueError
            On every rank if the input of one has wrong sizes, types, experts or weights.
        RuntimeError
            On every rank if their placements differ.
        """
        if self._table.device != self.device:
            # The weights have moved, or got memory: the placement is known here, wherever they are.
            self._make_tables(self.placement)
        rows, weights = hidden_states, top_k_weights
        if misfit := self._shared() or self._misfit(rows, top_k_index, weights, first_token):
            self._refuse(misfit)
        learn = self._learn(rows, weights)
        chosen = top_k_index.long().clamp(0, self.placement.num_experts - 1)
        bits = torch.where(torch.isfinite(weights).all(), learn, learn | exchange.NOT_FINITE)
        bits = bits + torch.where((chosen == top_k_index).all(), 0, exchange.NO_EXPERT)
        if not isinstance(first_token, Tensor):
            if first_token is None:
                begin = 0 if learn & exchange.LEARN else self._served
                first_token = begin * self.ranks + self.rank * len(rows)
            first_token = torch.arange(len(rows), device=self.device) + first_token
        # Slots travel as 32 bits beside their row.
        slots = self._table[:, 0][chosen]
        if self._table.shape[1] > 1:
            hashed = hash_positions(first_token.long())[:, None]
            slots = self._table[chosen, hashed % self._count[chosen]]
        results = self._exchange_rows(rows, slots, weights, bits)
        self.traffic.steps += 1
        self._served += len(rows)
        return results

    def _exchange_rows(self, rows: Tensor, slots: Tensor, weights: Tensor, bits: Tensor) -> Tensor:
        """Send rows to the ranks of their slots, compute there, and sum what comes back."""
        width, hops = self.placement.slots_per_device, []
        row, top_k = rows.shape[1] * rows.element_size(), weights.shape[1]
        row_bytes = row + top_k * (4 + weights.element_size())
        # Rows of equal length could still be cut differently.
        header = self._header(row_bytes | top_k << 40, bits)
        for size in (self.node_size, 1) if self.devices_per_node else (1,):
            # First to the rank with this one's number in each node, then to each device.
            target = slots.long() // (width * size) * size + self.rank % size
            target = torch.where(slots < 0, -1, target)
            hop = exchange.Hop(target, header, self.group, experts=self.placement.num_experts)
            self.traffic.count(self.rank, hop.splits, dispatch_row=row_bytes, combine_row=row)
            rows, slots, weights = hop.send(rows, slots, weights)
            is_local = slots.long() // (width * size) == self.rank // size
            slots = torch.where(is_local, slots, -1)
            hops.append(hop)
        results = self._compute(rows, slots - self.rank * width, weights, is_local, hop.visits)
        for hop in reversed(hops):
            results = hop.gather(results)
        return results

    def _header(self, layout: int, bits: Tensor) -> Tensor:
        """Return what every other rank must mean as well, and bits of faults and gradients [3]."""
        return torch.stack([self._fingerprint, torch.full_like(bits, layout), bits])

    def _refuse(self, reason: str) -> None:
        """Raise on this rank and on all others, which wait for it."""
        nothing = torch.empty(0, 1, dtype=torch.int64, device=self.device)
        header = self._header(0, torch.full_like(self._fingerprint, exchange.MISFIT))
        try:
            exchange.Hop(nothing, header, self.group, experts=self.placement.num_experts)
        except ValueError:
            raise ValueError(reason) from None

    def _learn(self, *tokens: Tensor) -> int:
        """Return bits that say whether tokens or experts of this rank need gradients."""
        if not torch.is_grad_enabled():
            return exchange.NO_GRADIENTS
        weights = [*self.experts.weights().values()]
        if isinstance(self.experts, nn.Module):
            weights += self.experts.parameters()
        return exchange.LEARN if any(tensor.requires_grad for tensor in (*tokens, *weights)) else 0

    def _compute(
        self, rows: Tensor, slots: Tensor, weights: Tensor, is_local: Tensor, n: int
    ) -> Tensor:
        """Sum the results of a row's slots [R,K] in their order: the ``n`` of this rank."""
        width, top_k = self.placement.slots_per_device, slots.shape[1]
        flat = torch.where(is_local, slots.long(), width).reshape(-1)
        chosen = flat.argsort(stable=True)[:n]
        # Neither ``bincount`` nor a sum that the host must wait for.
        counts = flat.new_zeros(width + 1).scatter_add_(0, flat, torch.ones_like(flat))[:width]
        # Experts under autocast, or without a row, may give another type: ranks must send alike.
        values = self.experts(rows[chosen // top_k], counts).to(rows.dtype)
        which = torch.full_like(flat, n)
        which[chosen] = torch.arange(n, device=flat.device)
        return exchange.sum_rows(values, which.view_as(slots), weights)

    def _misfit(
        self, hidden: Tensor, index: Tensor, weights: Tensor, position: int | Tensor | None
    ) -> str | None:
        """Return what is wrong with the input, as far as sizes and types show it."""
        dtype = next(iter(self.experts.weights().values())).dtype
        shapes = [list(tensor.shape) for tensor in (hidden, index, weights)]
        tokens = len(hidden) if hidden.ndim == 2 else -1
        if index.ndim != 2 or shapes[1] != shapes[2] or shapes[1] != [tokens, max(shapes[1][1], 1)]:
            rule = "hidden_states, top_k_index and top_k_weights must be [T,H], [T,K] and [T,K]"
            return f"{rule}, got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        if hidden.dtype != dtype:
            return f"hidden_states must be {dtype} like the experts, got {hidden.dtype}"
        if index.is_floating_point() or not weights.is_floating_point():
            rule = "top_k_index must be integers and top_k_weights floats"
            return f"{rule}, got {index.dtype} and {weights.dtype}"
        devices = {tensor.device for tensor in (hidden, index, weights)}
        if devices != {self.device}:
            places = ", ".join(sorted(map(str, devices)))
            return f"hidden_states must be on {self.device} like the experts, got {places}"
        if isinstance(position, Tensor):
            rule = f"an integer or integers [{len(hidden)}] on {self.device}"
            shape = f"{position.dtype} {list(position.shape)} on {position.device}"
            is_right = position.shape == hidden.shape[:1] and position.device == self.device
            if position.is_floating_point() or not is_right:
                return f"first_token must be {rule}, got {shape}"
        return None

    def _shared(self) -> str | None:
        """Return what is wrong if a wrapper takes the experts of several ranks for one."""
        experts = self.experts
        if self.ranks == 1 or not isinstance(experts, nn.Module):
            return None
        wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is not None and (self._last_ddp is None or self._last_ddp() is not wrapper):
            named = wrapper.module.named_parameters()
            seen = {id(p) for name, p in named if name not in wrapper.parameters_to_ignore}
            ranks = dist.get_process_group_ranks(wrapper.process_group)
            if self._others(ranks) and any(id(p) in seen for p in experts.parameters()):
                return (
                    "DistributedDataParallel gave all ranks the experts of its first one and would "
                    "average their gradients; build the model again, and before wrapping it call "
                    "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, "
                    "[n for n, _ in model.named_parameters() if 'experts_' in n])"
                )
            self._last_ddp = weakref.ref(wrapper)
        for hook in experts._load_state_dict_post_hooks.values():
            if not str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp"):
                continue
            # The hook of a sharded parameter; where its mesh cannot be known, it is refused.
            cells = (cell.cell_contents for cell in getattr(hook, "__closure__", None) or ())
            meshes = [cell.mesh_info.mesh for cell in cells if hasattr(cell, "mesh_info")]
            if not meshes or any(self._others(mesh.mesh.flatten().tolist()) for mesh in meshes):
                return (
                    "fully_shard took the experts of several ranks for shards of the same ones; "
                    "build the model again, and call fully_shard(model, "
                    "ignored_params={*layer.experts.parameters()}) with those of every layer"
                )
        return None

    def _others(self, ranks: Sequence[int]) -> bool:
        """Return whether other ranks of the group are among global ranks."""
        own_ranks = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        return len(set(own_ranks) & set(ranks)) > 1


def _states() -> Any:
    """Return the module of states: imported late, since it takes a while, and few ask for them."""
    from moetuner.torch.parallel import state

    return state
