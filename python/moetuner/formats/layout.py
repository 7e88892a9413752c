"""A map of experts to slots as a file has it, and the faults for which an engine refuses it.

A fault is a sentence that says what would be right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import EXPERT_LIMIT, MissingArgumentError, array_in, shown
from moetuner.files.cells import and_more
from moetuner.formats.hints import Hints
from moetuner.placement import EMPTY, Placement
from moetuner.serving.engines import ENGINES, Engine


@dataclass(frozen=True, eq=False)
class Layout:
    """Experts by slot, before any check whether an engine could load them.

    Parameters
    ----------
    experts
        Expert in every slot of every row [R,P], device by device; -1 is an empty slot.
    devices
        Devices, D; None if the file does not say.
    num_experts
        Experts per layer, E; None if the file does not say.
    layers
        Numbers of the rows among all hidden layers, if the format has them.
    counts_dense
        True if the format has a row for every hidden layer, dense ones too.
    remarks
        Faults of other fields of the file, which contradict the map.
    """

    experts: NDArray[np.int64]
    devices: int | None = None
    num_experts: int | None = None
    layers: tuple[int, ...] | None = None
    counts_dense: bool = False
    remarks: tuple[str, ...] = ()

    @classmethod
    def from_rows(cls, rows: Any, **fields: Any) -> Layout:
        """Make a layout of rows; raise unless they are integers of one width."""
        rows = list(rows) if isinstance(rows, list | tuple | np.ndarray) else []
        for number, row in enumerate(rows):
            slots = len(row) if isinstance(row, list | tuple | np.ndarray) else 0
            if not slots or slots != len(rows[0]):
                like = f"{len(rows[0])} slots like row 0" if number else "expert ids in its slots"
                raise ValueError(f"row {number} must have {like}, got {slots or shown(row)}")
        if not rows:
            raise ValueError("must have at least one row of expert ids, got none")
        table = array_in("rows", rows)
        if table.ndim != 2 or table.dtype.kind not in "iu" or int(table.max()) >= 1 << 63:
            raise ValueError(
                f"rows must be integers below 2**63 [layers, slots], got {shown(table)}"
            )
        return cls(table.astype(np.int64), **fields)

    @classmethod
    def from_placement(cls, placement: Placement) -> Layout:
        """Make the layout of a placement."""
        rows = placement.slots.reshape(placement.layers, -1).astype(np.int64)
        return cls(rows, placement.devices, placement.num_experts)

    def where(self, row: int, slot: int | None = None) -> str:
        """Write the place of a row, and of a slot in it."""
        layer = row if self.layers is None else self.layers[row]
        where = f"row {row}" if self.counts_dense else f"layer {layer}"
        if slot is None:
            return where
        width = self.experts.shape[1]
        if not self.devices or width % self.devices:
            return f"{where}: slot {slot}"
        device, slot = divmod(slot, width // self.devices)
        return f"{where}, device {device}: slot {slot}"

    def _moe_rows(self, hints: Hints) -> list[int]:
        """Return the rows of layers with experts; a dense layer has one expert in all its slots."""
        rows = range(len(self.experts))
        same = (self.experts == self.experts[:, :1]).all(axis=1)
        if self.experts.shape[1] == 1 or 1 in (hints.num_experts, self.num_experts):
            same[:] = False
        moe = hints.moe_layers(len(rows)) if self.counts_dense else None
        if moe is None:
            dense = hints.dense_layers or ()
            moe = [row for row in rows if self.layers is None or self.layers[row] not in dense]
            if self.counts_dense and not same.all():
                moe = np.flatnonzero(~same).tolist()
        for row in moe:
            if same[row]:
                raise ValueError(
                    f"{self.where(row)}: expert {self.experts[row, 0]} is in every slot, so "
                    "nothing is placed there"
                )
        return moe

    def placement(self, hints: Hints) -> Placement:
        """Return the placement of the layers with experts."""
        rows = self.experts[self._moe_rows(hints)]
        devices = self.devices or hints.devices
        if devices is None:
            raise MissingArgumentError(
                "devices must be given: the file does not say how many there are", "devices"
            )
        for fault in _find_device_faults(self, None, hints):
            raise ValueError(fault)
        experts = hints.num_experts or self.num_experts or int(rows.max(initial=EMPTY)) + 1
        slots = rows.reshape(len(rows), devices, -1)
        return Placement(cast(Any, slots), num_experts=experts)


def check_placement(placement: Placement, engine: str) -> None:
    """Raise if an engine could not load a placement."""
    faults = find_faults(Layout.from_placement(placement), engine, Hints())
    if faults:
        raise ValueError(f'{faults[0]}: solve with "--for {engine}"')


def find_faults(layout: Layout, engine: str | None, hints: Hints) -> list[str]:
    """List the faults of a map; empty if the engine, or any for None, could load it."""
    row = None if engine is None else ENGINES[engine]
    return [
        *layout.remarks,
        *_find_layer_faults(layout, hints),
        *_find_device_faults(layout, row, hints),
        *_find_expert_faults(layout, row, hints),
    ]


def _find_layer_faults(layout: Layout, hints: Hints) -> list[str]:
    """List the faults in the number of rows and in the numbers of layers."""
    count = len(layout.experts)
    hidden, dense = hints.hidden_layers, hints.dense_layers
    wrong = set(layout.layers or ()) & set(dense or ())
    if wrong:
        return [f"layer {min(wrong)} has no experts: layers must be numbered with the dense ones"]
    if hidden is None:
        return []
    moe = hidden - len(dense or ())
    kinds = {hidden: "every hidden layer, dense ones too", moe: "layers with experts only"}
    right, other = (hidden, moe) if layout.counts_dense else (moe, hidden)
    if count == right:
        return []
    rule = f"must have {right} rows, one for {kinds[right]}, got {count}"
    if count == other:
        layers = f"{hidden - moe} dense layer{'s' if hidden - moe > 1 else ''}"
        return [f"{rule}, one for {kinds[other]}: off by the {layers}"]
    unknown = "" if dense is not None else "; which of them are dense is not known (dense_layers)"
    return [f"{rule}: of another model{unknown}"]


def _find_device_faults(layout: Layout, engine: Engine | None, hints: Hints) -> list[str]:
    """List the faults in the number of devices, in slots per device, and copies on one device."""
    rows, slots = layout.experts.shape
    devices = layout.devices or hints.devices
    if layout.devices and hints.devices and layout.devices != hints.devices:
        return [f"must be for {hints.devices} devices, got {layout.devices}"]
    if devices is None:
        return []
    if engine is not None and engine.devices not in (None, devices):
        return [f"must be for {engine.devices} devices, as {engine.title} loads it, got {devices}"]
    if slots % devices:
        fit = [n for n in (slots // devices * devices, -(-slots // devices) * devices) if n]
        return [
            f"must have a multiple of {devices} slots, as many on every device, got {slots}: "
            f"{' or '.join(map(str, fit))} would fit"
        ]
    if engine is None or not engine.repeated:
        return []
    experts = np.sort(layout.experts.reshape(rows, devices, -1), axis=2)
    twice = np.argwhere((experts[:, :, 1:] == experts[:, :, :-1]) & (experts[:, :, 1:] != EMPTY))
    return [
        f"{layout.where(row)}, device {device}: expert {experts[row, device, slot]} is there twice"
        f"{and_more(len(twice))}: {engine.title} {engine.repeated}"
        for row, device, slot in twice[:1]
    ]


def _find_expert_faults(layout: Layout, engine: Engine | None, hints: Hints) -> list[str]:
    """List wrong ids, empty slots, and experts without a slot."""
    table = layout.experts
    experts = hints.num_experts or layout.num_experts or int(table.max(initial=0)) + 1
    if layout.num_experts and layout.num_experts != experts:
        return [f"must have {experts} experts, got {layout.num_experts}: another model"]
    experts = min(experts, EXPERT_LIMIT)
    wrong = np.argwhere((table >= experts) | (table < EMPTY))
    if len(wrong):
        row, slot = wrong[0]
        return [
            f"{layout.where(row, slot)}: expert {table[row, slot]} is not below {experts}"
            f"{and_more(len(wrong))}: of another model, or damaged"
        ]
    empty = np.argwhere(table == EMPTY)
    messages = [
        f"{layout.where(row, slot)} is empty{and_more(len(empty))}: every slot must be full"
        for row, slot in empty[:1]
    ]
    for number, row in enumerate(table):
        missing = np.setdiff1d(np.arange(experts), row)
        if len(missing):
            messages.append(
                f"{layout.where(number)}: expert {missing[0]} has no slot"
                f"{and_more(len(missing))}: every expert must have at least one"
            )
            break
    if engine is not None and not engine.may_copy and table.shape[1] > experts:
        messages.append(
            f"must have {experts} slots, as {engine.title} has no copies, got {table.shape[1]}"
        )
    return messages
