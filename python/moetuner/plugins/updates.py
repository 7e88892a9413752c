"""Load weights that change while vLLM serves into the slots that hold their experts now.

All updates in the checkpoint's format call ``RoutedExperts.weight_loader`` with the slots of vLLM's
first map. Once experts have moved, that writes an expert's weights into the slots of others,
without a message (vLLM issue 55228). The loader here reads the map in force, and waits for no other
rank. Updates that cannot follow experts are refused once experts have moved.

The first load goes through the same loader, by the first map. From a checkpoint with all experts of
a layer in one tensor, vLLM 0.32 loads every expert once, and leaves its copies without weights.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from moetuner.plugins.log import Log
from moetuner.plugins.tensors import changing_in_place, find_process_rank

# Attributes that are added to a layer of experts, an `EplbState` and a worker.
PLACED, MODELS, SAVED = "moetuner_placed", "moetuner_models", "moetuner_kept"
# Arguments of `RoutedExperts.weight_loader`.
TENSOR = ["param", "loaded_weight", "weight_name", "shard_id"]
ARGUMENTS = ["self", *TENSOR, "expert_id", "return_success"]
# Methods of a worker that load weights.
LOADS = "reload_weights", "start_weight_update", "start_draft_weight_update"
# Base class of methods that compute scales when weights are loaded.
ONLINE = "OnlineMoEMethodBase"
# Tensors of a model's state that a sleep of level 2 would lose.
MAPS = (
    "physical_to_logical_map_buffer",
    "physical_to_logical_map",
    "logical_to_physical_map",
    "logical_replica_count",
    "last_expert_load",
)


def wrap(owner: Any, name: str, purpose: str, hook: Callable[..., Any]) -> None:
    """Wrap a function of an engine, once for each purpose; ``hook`` gets it, then arguments."""
    inner, mark = getattr(owner, name), f"moetuner_{purpose}"
    if hasattr(inner, mark):
        return

    @functools.wraps(inner)
    def outer(*arguments: Any, **named: Any) -> Any:
        return hook(inner, *arguments, **named)

    setattr(outer, mark, True)
    setattr(owner, name, outer)


class PlacedModel:
    """The slots of a model's experts, and whether updates of its weights can follow them.

    ``state`` is vLLM's ``EplbModelState``, ``experts`` are without their copies, and
    ``parallel_config`` has the number of workers of this engine.
    """

    def __init__(self, state: Any, experts: int, parallel_config: Any, log: Log) -> None:
        self.state, self.experts = state, experts
        self.parallel_config, self.log = parallel_config, log
        # Reason why updates cannot follow; "" if they can.
        self.unfollowed = ""
        # Whether scales are computed at the load; a later move would not move them.
        self.computes_scales = False
        # Whether weights were loaded after others were staged to be moved.
        self.stale = False
        self._mark: Any = None
        self._slots: list[dict[int, list[int]]] = []
        self._moved = False

    def _read(self) -> None:
        """Read the map in force if it changed, as on a GPU every read waits for the device."""
        running = self.state.physical_to_logical_map
        mark = None
        with suppress(RuntimeError):  # Tensors made in inference mode do not count their changes.
            mark = running.data_ptr(), tuple(running.shape), running._version
        if mark is not None and mark == self._mark:
            return
        self._mark, self._slots, self._moved = mark, [], False
        for row in running.tolist():
            slots: dict[int, list[int]] = defaultdict(list)
            for slot, expert in enumerate(row):
                slots[expert].append(slot)
                self._moved |= expert >= 0 and expert != slot % self.experts
            self._slots.append(slots)

    @property
    def moved(self) -> bool:
        """True if experts are in other slots than those into which vLLM loads them."""
        self._read()
        return self._moved

    def load(self, layer: int, expert: int, is_whole: bool, into: Callable[[int], Any]) -> bool:
        """Load a tensor of an expert into its slots of a layer; return whether one is on this rank.

        ``into(slot)`` loads the tensor into a slot. A tensor that ``is_whole`` has the experts of
        all slots, in the order of the first map.
        """
        self.stale |= bool(getattr(self.state, "rebalanced", False))
        if self.computes_scales:
            self.log.warn(
                "scales that are computed when weights are loaded do not move with their expert "
                "after an update: right until the next rearrangement, not after it",
                find_process_rank(),
            )
        unfollowed = self.unfollowed or ("a tensor of all experts" if is_whole else "")
        if unfollowed and self.moved:
            return self.refuse("load_weights", unfollowed, find_process_rank())
        if unfollowed:
            return bool(into(expert))
        self._read()
        # vLLM's caller goes through the slots of the first map. Slots with the number of an expert
        # load it, with all its copies; slots beyond have the number of no expert and load nothing.
        loaded = [bool(into(slot)) for slot in self._slots[layer].get(expert, [])]
        return any(loaded)

    def refuse(self, what: str, why: str, rank: int) -> bool:
        """Raise an error on the last worker of the engine; on the others do nothing.

        vLLM's executor reads the answers of its workers up to the first error; the next call would
        read the answers behind it.
        """
        workers = getattr(self.parallel_config, "world_size", 1)
        if rank % workers < workers - 1:
            return False
        name = getattr(self.state, "model_name", "the model")
        raise RuntimeError(
            f"moetuner: {what} is refused: experts of {name} have moved since they were loaded, "
            f"and {why} would go to the slots of others; start the engine with the new weights"
        )


def follow_updates(
    states: Any, layers: Any, worker: Any, log: Log, *, rearranges: bool = True
) -> str:
    """Make updates of weights follow the experts; return why they cannot, "" if they do.

    Call it before a model is built, as its parameters keep their loader. ``states`` is vLLM's
    ``EplbState``, ``layers`` its ``RoutedExperts`` and ``worker`` its ``Worker``, None if this
    version has none. ``rearranges`` says whether experts move while the engine serves.
    """
    missing = _find_missing(layers)
    if not missing:
        wrap(layers, "weight_loader", "follows", _load_into_current_slots)

    def add_model(inner: Any, self: Any, *arguments: Any, **named: Any) -> Any:
        added = inner(self, *arguments, **named)
        model = named.get("model", arguments[0] if arguments else None)
        try:
            placed = track_model(self, model, layers, missing, log)
            placed.computes_scales &= rearranges
        except Exception as error:
            log.warn(f"weight updates cannot follow experts: {error!r}", find_process_rank())
        return added

    wrap(states, "add_model", "follows", add_model)
    if hasattr(states, "drain_async"):
        wrap(states, "step", "follows", _step_after_update)
    hooks: dict[str, Callable[..., Any]] = {
        name: functools.partial(_guard_load, name) for name in LOADS
    }
    hooks["sleep"] = functools.partial(_sleep_with_maps, log)
    hooks["discard"] = functools.partial(_discard_without_maps, log)
    hooks["wake_up"] = _wake_up_with_maps
    for name, hook in hooks.items():
        if hasattr(worker, name):
            wrap(worker, name, "follows", hook)
    return missing


def _find_missing(layers: Any) -> str:
    loader = getattr(layers, "weight_loader", None)
    if loader is None:
        return "this version of vLLM has no RoutedExperts.weight_loader"
    if list(inspect.signature(loader).parameters) != ARGUMENTS:
        return "RoutedExperts.weight_loader takes other arguments in this version of vLLM"
    return ""


def _load_into_current_slots(
    load: Any,
    self: Any,
    param: Any,
    loaded_weight: Any,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    tensor = param, loaded_weight, weight_name, shard_id
    is_whole = loaded_weight.dim() >= max(2, param.dim())

    def into(slot: int) -> bool:
        return bool(load(self, *tensor, slot, True))

    if (placed := vars(self).get(PLACED)) is not None:
        model, layer = placed
        is_loaded = model.load(layer, expert_id, is_whole, into)
    else:  # the first load
        slots = [expert_id] if is_whole else first_slots(self, expert_id)
        is_loaded = sum(map(into, slots)) > 0
    return is_loaded if return_success else None


def first_slots(layer: Any, expert: int) -> list[int]:
    """Return the slots that an expert has in the first map of a layer of vLLM.

    Slots of copies have numbers beyond those of experts; a caller with such a number has nothing to
    load. If a layer does not say its number of experts, the slot is the caller's number.
    """
    config = getattr(layer, "moe_config", None)
    experts, slots = (getattr(config, name, 0) for name in ("num_logical_experts", "num_experts"))
    if not 0 < experts < slots:
        return [expert]
    return [*range(expert, slots, experts)] if expert < experts else []


def track_model(states: Any, model: Any, layers: Any, missing: str, log: Log) -> PlacedModel:
    """Let every layer of a model that vLLM has added know the slots of its experts."""
    model_states = list(states.model_states.values())
    state = next(
        (state for state in model_states if getattr(state, "model", None) is model),
        model_states[-1],
    )
    parallel_config = getattr(states, "parallel_config", None)
    placed = PlacedModel(state, model.num_logical_experts, parallel_config, log)
    placed.unfollowed = missing
    if getattr(states, "is_async", False) and not hasattr(states, "drain_async"):
        placed.unfollowed = "weights beside an asynchronous rearrangement"
    experts = [getattr(layer, "routed_experts", layer) for layer in model.moe_layers]
    for layer in experts:
        placed.unfollowed = placed.unfollowed or _find_other_loader(layer, layers)
        kinds = type(getattr(layer, "quant_method", None)).__mro__
        placed.computes_scales |= any(kind.__name__ == ONLINE for kind in kinds)
    if placed.unfollowed:
        log.warn(
            f"weights that change do not follow experts that move ({placed.unfollowed}): "
            f"{' and '.join(LOADS[:2])} are refused from then on",
            find_process_rank(),
        )
    others = [
        other
        for other in find_models(states)
        if other.state is not state and any(other.state is current for current in model_states)
    ]
    vars(states)[MODELS] = [*others, placed]
    for number, layer in enumerate(experts):
        vars(layer)[PLACED] = placed, number
    return placed


def _find_other_loader(experts: Any, layers: Any) -> str:
    """Return which code loads these experts so that updates cannot follow; "" without any."""
    kind = type(experts)
    if not isinstance(experts, layers) or kind.weight_loader is not layers.weight_loader:
        return f"weights of {kind.__name__}, which loads them by code of its own,"
    manager = getattr(experts, "expert_map_manager", experts)
    if getattr(manager, "num_fused_shared_experts", 0):
        return "weights of shared experts that are fused with the others"
    return ""


def find_models(states: Any) -> list[PlacedModel]:
    """Find the models of an ``EplbState``."""
    return list(getattr(states, "__dict__", {}).get(MODELS, []))


def find_models_of_worker(worker: Any) -> list[PlacedModel]:
    """Find the models of a worker."""
    return find_models(getattr(getattr(worker, "model_runner", None), "eplb_state", None))


def _step_after_update(step: Any, self: Any, *arguments: Any, **named: Any) -> Any:
    # An asynchronous rearrangement may have staged weights older than the update. All ranks took
    # the update between the same two steps, so all of them drain it here.
    if any(model.stale for model in find_models(self)):
        self.drain_async()
        for model in find_models(self):
            model.stale = False
    return step(self, *arguments, **named)


def _guard_load(name: str, call: Any, self: Any, *arguments: Any, **named: Any) -> Any:
    checkpoint = named.get("is_checkpoint_format", len(arguments) < 3 or arguments[2])
    kernel = name == "reload_weights" and not checkpoint
    for model in find_models_of_worker(self):
        why = "weights in the kernel's format" if kernel else model.unfollowed
        if why and model.moved:
            return model.refuse(name, why, self.rank) or None
    return call(self, *arguments, **named)


def _sleep_with_maps(
    log: Log, sleep: Any, self: Any, level: int = 1, *arguments: Any, **named: Any
) -> Any:
    if level == 2:
        keep_maps(self, log)
    return sleep(self, level, *arguments, **named)


def _discard_without_maps(
    log: Log, discard: Any, self: Any, tags: Any, *arguments: Any, **named: Any
) -> Any:
    if "weights" in tags:
        keep_maps(self, log)
    return discard(self, tags, *arguments, **named)


def _wake_up_with_maps(
    wake_up: Any, self: Any, tags: Any = None, *arguments: Any, **named: Any
) -> Any:
    woken = wake_up(self, tags, *arguments, **named)
    if tags is None or "weights" in tags:
        bring_maps(self)
    return woken


def keep_maps(worker: Any, log: Log) -> None:
    """Save the maps on the host: they were allocated with the weights, and are freed with them."""
    if SAVED in vars(worker):
        return
    try:
        saved = []
        for model in find_models_of_worker(worker):
            maps = {name: getattr(model.state, name, None) for name in MAPS}
            copies = {
                name: tensor.cpu().clone() for name, tensor in maps.items() if tensor is not None
            }
            saved.append((model.state, copies))
        vars(worker)[SAVED] = saved
    except Exception as error:
        log.warn(f"a sleep of level 2 loses where experts are: {error!r}", find_process_rank())


def bring_maps(worker: Any) -> None:
    """Restore the maps, and set counters of loads to zero."""
    if (maps := vars(worker).pop(SAVED, None)) is None:
        return
    with changing_in_place():
        for state, saved in maps:
            for name, tensor in saved.items():
                getattr(state, name).copy_(tensor)
            for name in ("expert_load_pass_buffer", "expert_load_pass", "expert_load_window"):
                if (counts := getattr(state, name, None)) is not None:
                    counts.zero_()
        states = getattr(getattr(worker, "model_runner", None), "eplb_state", None)
        if (records := getattr(states, "should_record_tensor", None)) is not None:
            records.fill_(True)
