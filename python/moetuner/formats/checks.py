"""What an engine could not load of a map or a placement, in words that say what would be right."""

from __future__ import annotations

from typing import Literal

import numpy as np

from moetuner._checks import EXPERT_LIMIT
from moetuner.formats.engines import ENGINES, Engine
from moetuner.formats.hints import Hints
from moetuner.formats.layout import Layout
from moetuner.placement import EMPTY, Placement

# What a format's rows are: layers with experts, numbered from 0; all hidden layers; or layers with
# experts, numbered among the hidden ones.
Rows = Literal["moe", "hidden", "numbered"]


def check_placement(placement: Placement, engine: str) -> None:
    """Raise if an engine could not load a placement.

    Raises
    ------
    ValueError
        Naming the constraint, where it is broken, and the option of ``solve`` that keeps it.
    """
    of = ENGINES[engine]
    option = f'solve with "--for {engine}"'
    if not of.may_copy and placement.has_copies:
        layer, expert = np.argwhere(placement.replicas > 1)[0]
        raise ValueError(
            f"layer {layer}: expert {expert} has {placement.replicas[layer, expert]} copies, and "
            f"{of.title} has none: {option}"
        )
    full = (placement.slots != EMPTY).sum(axis=2)
    if (full == placement.slots_per_device).all():
        return
    layer, device = np.argwhere(full < placement.slots_per_device)[0]
    slot = int(np.argmax(placement.slots[layer, device] == EMPTY))
    equal = f"{of.title} has equal slots on all devices and layers and fills every one"
    raise ValueError(
        f"layer {layer}, device {device}: slot {slot} is empty ({full[layer, device]} experts in "
        f"{placement.slots_per_device} slots), and {equal}: {option}, or with --fill-slots"
    )


def faults(layout: Layout, rows: Rows, engine: str | None, hints: Hints) -> list[str]:
    """List what is wrong with a map; empty if an engine could load it as far as is known.

    Parameters
    ----------
    layout
        The map as it stands.
    rows
        What its rows should be.
    engine
        Name in ``ENGINES``; None for nobody's.
    hints
        What is known of the model and of the devices.
    """
    of = None if engine is None else ENGINES[engine]
    return [
        *layout.remarks,
        *_layer_faults(layout, rows, hints),
        *_device_faults(layout, of, hints),
        *_expert_faults(layout, of, hints),
    ]


def _layer_faults(layout: Layout, rows: Rows, hints: Hints) -> list[str]:
    count = len(layout.experts)
    hidden, dense = hints.hidden_layers, hints.dense_layers
    numbers = list(range(count)) if layout.layers is None else list(layout.layers)
    if rows == "moe" and numbers != list(range(count)):
        return [
            f"layers must be numbered from 0 to {count - 1}, those with experts only, got "
            f"{numbers[0]} to {numbers[-1]}: dense layers are not counted"
        ]
    if dense is not None and rows == "numbered" and set(numbers) & set(dense):
        both = min(set(numbers) & set(dense))
        return [f"layer {both} has no experts: layers must be numbered with the dense ones"]
    if hidden is None:
        return []
    moe = hidden - len(dense or ())
    wanted, other = (hidden, moe) if rows == "hidden" else (moe, hidden)
    if count == wanted:
        return []
    kinds = ("every hidden layer, dense ones too", "layers with experts only")
    want, got = kinds if rows == "hidden" else kinds[::-1]
    if count == other:
        return [
            f"must have {wanted} rows, one for {want}, got {count}, one for {got}: off by the "
            f"{hidden - moe} dense layer{'s' if hidden - moe > 1 else ''}"
        ]
    known = "" if dense is not None else "; which of them are dense is not known (dense_layers)"
    return [f"must have {wanted} rows, one for {want}, got {count}: of another model{known}"]


def _device_faults(layout: Layout, of: Engine | None, hints: Hints) -> list[str]:
    slots = layout.experts.shape[1]
    devices = layout.devices or hints.devices
    if layout.devices and hints.devices and layout.devices != hints.devices:
        return [f"must be for {hints.devices} devices, got {layout.devices}"]
    if devices is not None and slots % devices:
        fit = [n for n in (slots // devices * devices, -(-slots // devices) * devices) if n]
        return [
            f"must have a multiple of {devices} slots, as many on every device, got {slots}: "
            f"{' or '.join(map(str, fit))} would fit"
        ]
    if devices is None or of is None or of.may_repeat:
        return []
    held = np.sort(layout.experts.reshape(len(layout.experts), devices, -1), axis=2)
    twice = np.argwhere((held[:, :, 1:] == held[:, :, :-1]) & (held[:, :, 1:] != EMPTY))
    if not len(twice):
        return []
    row, device, slot = twice[0]
    once = of is ENGINES["sglang"]
    what = "loads one of them and sends tokens to both" if once else "refuses it"
    return [
        f"row {row}, device {device}: expert {held[row, device, slot]} is there twice"
        f"{_more(len(twice))}: {of.title} {what}"
    ]


def _expert_faults(layout: Layout, of: Engine | None, hints: Hints) -> list[str]:
    table = layout.experts
    experts = hints.num_experts or layout.num_experts or int(table.max(initial=0)) + 1
    if layout.num_experts and hints.num_experts and layout.num_experts != hints.num_experts:
        return [f"must have {hints.num_experts} experts, got {layout.num_experts}: another model"]
    experts = min(experts, EXPERT_LIMIT)
    wrong = np.argwhere((table >= experts) | (table < EMPTY))
    if len(wrong):
        row, slot = wrong[0]
        return [
            f"row {row}, slot {slot}: expert {table[row, slot]} is not below {experts}"
            f"{_more(len(wrong))}: of another model, or damaged"
        ]
    found = []
    empty = np.argwhere(table == EMPTY)
    if len(empty):
        row, slot = empty[0]
        found.append(f"row {row}: slot {slot} is empty{_more(len(empty))}: every slot must be full")
    for row, held in enumerate(table):
        missing = np.flatnonzero(np.bincount(held[held >= 0], minlength=experts) == 0)
        if len(missing):
            found.append(
                f"row {row}: expert {missing[0]} has no slot{_more(len(missing))}: every expert "
                "must have at least one"
            )
            break
    if of is not None and not of.may_copy and table.shape[1] > experts:
        found.append(
            f"must have {experts} slots, as {of.title} has no copies, got {table.shape[1]}"
        )
    return found


def _more(count: int) -> str:
    return f", and {count - 1} more" if count > 1 else ""
