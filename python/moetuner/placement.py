"""Placement: the expert in every slot of every device, layer by layer."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _checks as check
from moetuner import _core
from moetuner.charts.figure import plot
from moetuner.charts.placements import draw_devices, draw_placements
from moetuner.files import naming, replacing
from moetuner.files.opened import Opened, opened
from moetuner.files.text import DECODER
from moetuner.frozen import Frozen, as_json, html_table
from moetuner.topology import Topology

SCHEMA = "moetuner.placement/1"
EMPTY = -1
# Most layers, devices and slots of a table in a notebook.
SHOWN = 64
# Further fields of a placement's file, in their order; ``settings`` follow.
TEXTS, FIGURES = ("model", "topology", "fingerprint", "bound_scope"), ("objective", "bound")


@dataclass(frozen=True, eq=False, repr=False)
class PlacementDiff(Frozen):
    """The copies of experts that have to move to get from one placement to another.

    Parameters
    ----------
    experts_moved
        Number of copies that move.
    experts_moved_per_layer
        Number of copies that move in every layer [L].
    bytes_moved
        Their bytes; None if the bytes of an expert are unknown.
    moves
        Layer, expert, source device and target device of each move [M,4].
    pairs
        Number of copies that move from device to device [D,D].

    Examples
    --------
    >>> import moetuner as mt
    >>> before, after = mt.Placement([[[0, 1], [2, 3]]]), mt.Placement([[[0, 2], [1, 3]]])
    >>> diff = before.diff(after, expert_bytes=1000)
    >>> diff.experts_moved, diff.bytes_moved
    (2, 2000)
    >>> diff.moves.tolist()  # layer, expert, from, to
    [[0, 1, 0, 1], [0, 2, 1, 0]]
    """

    experts_moved: int
    experts_moved_per_layer: NDArray[np.int64]
    bytes_moved: float | None
    moves: NDArray[np.int64]
    pairs: NDArray[np.int64]


def compare_holders(
    before: NDArray[np.bool_],
    after: NDArray[np.bool_],
    topology: Topology | None,
    expert_bytes: float | None,
) -> PlacementDiff:
    """Return the moves from one table of holders [L,D,E] to another.

    A copy comes from the nearest device that held the expert: by link costs if they were given,
    else by tier; among equally near ones, from the lowest number. Without a topology all devices
    are equally near.
    """
    devices = before.shape[1]
    layer, expert, target = np.nonzero((after & ~before).transpose(0, 2, 1))
    cost = np.zeros((devices, devices), np.int64)
    if topology is not None:
        cost = topology.tier if topology.link_cost is None else topology.cost
    distance = cost[:, target].T * devices + np.arange(devices)
    source = np.where(before[layer, :, expert], distance, np.iinfo(np.int64).max).argmin(axis=1)
    pairs = np.bincount(source * devices + target, minlength=devices * devices)
    return PlacementDiff(
        experts_moved=len(layer),
        experts_moved_per_layer=np.bincount(layer, minlength=len(before)),
        bytes_moved=None if expert_bytes is None else len(layer) * expert_bytes,
        moves=np.stack([layer, expert, source, target], axis=1),
        pairs=pairs.reshape(devices, devices),
    )


def compute_checksum(slots: NDArray[np.integer[Any]]) -> str:
    """Return eight hexadecimal digits of slots [L,D,S], the same in any order within a device."""
    in_order = np.sort(slots, axis=2).astype("<i4")
    return f"{zlib.crc32(in_order.tobytes(), zlib.crc32(repr(slots.shape).encode())):08x}"


def find_holders(slots: NDArray[np.int32], experts: int) -> NDArray[np.bool_]:
    """Return whether a device holds an expert [L,D,E], from slots [L,D,S]."""
    layers, devices, _ = slots.shape
    # Empty slots, -1, write into a last column, which is dropped.
    holders = np.zeros((layers, devices, experts + 1), dtype=bool)
    holders[np.arange(layers)[:, None, None], np.arange(devices)[:, None], slots] = True
    return np.ascontiguousarray(holders[:, :, :-1])


def moves_from(holders: NDArray[np.bool_], slots: NDArray[np.int32]) -> NDArray[np.int64]:
    """Count the copies in slots [L,D,S] that are not on a holder [L,D,E], by layer [L]."""
    is_holder = np.take_along_axis(holders, np.maximum(slots, 0).astype(np.int64), axis=2)
    moves: NDArray[np.int64] = (~is_holder & (slots != EMPTY)).sum(axis=(1, 2))
    return moves


def keep_slots(
    running: NDArray[np.int32], slots: NDArray[np.int32], capacity: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Return slots [L,D,S] in which experts that stay on a device keep their running slots.

    A device keeps only slots within its capacity [L,D]: tables are as wide as the widest device.
    """
    width = slots.shape[2]
    before = np.full(slots.shape, EMPTY, dtype=np.int32)
    shared_width = min(running.shape[2], width)
    before[:, :, :shared_width] = running[:, :, :shared_width]
    before[np.arange(width) >= capacity[:, :, None]] = EMPTY
    experts = int(max(before.max(), slots.max())) + 1
    return _core.keep_slots(before, np.ascontiguousarray(slots, np.int32), experts)


def fill(
    slots: NDArray[np.int32],
    experts: int,
    *,
    capacity: NDArray[np.int64] | None = None,
    load: NDArray[Any] | None = None,
    forbidden: NDArray[np.bool_] | None = None,
    holders: NDArray[np.bool_] | None = None,
) -> NDArray[np.int32]:
    """Return slots [L,D,S] filled with copies that change least.

    No device gets two copies of one expert. ``capacity`` [L,D] is the number of slots of a device
    to fill, by default all. A copy goes first to ``holders`` [L,D,E] of its expert, so that nothing
    moves; then the copy that takes the fewest tokens of ``load`` [L,E] is added, or without a load
    one of the experts with the fewest copies. ``forbidden`` [L,E,D] keeps experts off devices.
    """
    full = slots.copy()
    targets = np.full(slots.shape[:2], slots.shape[2]) if capacity is None else capacity
    short = targets - (slots != EMPTY).sum(axis=2)
    if (short <= 0).all():
        return full
    excluded = find_holders(slots, experts)
    if forbidden is not None:
        excluded |= forbidden.transpose(0, 2, 1)
    rank = np.where(excluded, 2, 0 if holders is None else ~holders)
    for layer, device in np.argwhere((short > 0) & ((rank < 2).sum(axis=2) < short)):
        raise ValueError(
            f"layer {layer}, device {device}: {targets[layer, device]} slots cannot be "
            f"filled, with {experts} experts and no two copies of one on a device"
        )
    copies = count_copies(slots, experts)
    for device in range(slots.shape[1]):
        # Layers are filled side by side, as none depends on another one.
        for number in range(int(short[:, device].max())):
            layers = np.flatnonzero(short[:, device] > number)
            taken = copies[layers] if load is None else load[layers] / (copies[layers] + 1)
            is_first = np.ones((len(layers), experts), dtype=bool)
            for key in (rank[layers, device], taken, copies[layers]):
                left = np.where(is_first, key, np.inf)
                is_first = left == left.min(axis=1, keepdims=True)
            expert = is_first.argmax(axis=1)
            full[layers, device, np.argmax(full[layers, device] == EMPTY, axis=1)] = expert
            rank[layers, device, expert] = 2
            copies[layers, expert] += 1
    return full


@dataclass(frozen=True, eq=False, repr=False)
class Placement(Frozen):
    """Experts in slots, by layer and device.

    Parameters
    ----------
    slots
        Expert ids [L,D,S]; -1 is an empty slot. Every expert has at least one slot in every layer,
        and no device holds two copies of one expert.
    num_experts
        Experts per layer, E; by default one more than the largest id.
    model, topology
        Names, for people.
    fingerprint
        Fingerprint of the statistics that the placement was computed from.
    objective, bound
        The solver's objective on them, and the lower bound of placements in ``bound_scope``.
    bound_scope
        The placements for which ``bound`` holds, in words.
    settings
        How the placement was computed, as JSON values: ``solve`` writes method, seed, goal, engine
        settings, topology and cost model, the command line also INPUT. Empty if unknown.

    Raises
    ------
    ValueError
        If ``slots`` breaks a rule; the message names layer, device and expert.

    Examples
    --------
    >>> import moetuner as mt
    >>> placement = mt.Placement([[[0, 1], [2, 3]]])  # one layer, two devices, two slots
    >>> placement.device_of.tolist()
    [[0, 0, 1, 1]]
    """

    slots: NDArray[np.int32]
    num_experts: int = 0
    _: KW_ONLY
    model: str | None = None
    topology: str | None = None
    fingerprint: str | None = None
    objective: float | None = None
    bound: float | None = None
    bound_scope: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        slots = check.array_in("slots", self.slots)
        if slots.ndim != 3 or slots.size == 0 or not np.issubdtype(slots.dtype, np.integer):
            raise ValueError(
                "slots must be integers [layers, devices, slots], none of them zero, "
                f"got {check.shown(slots)}"
            )
        check.check_slots(*slots.shape[1:])
        experts = check.whole_number("num_experts", self.num_experts, lowest=0)
        capacity, highest = slots[0].size, int(slots.max())
        if not experts and highest >= capacity:
            raise ValueError(
                f"slots must have expert ids below {capacity}, the slots of a layer, got {highest}"
            )
        experts = experts or max(highest + 1, 1)
        if experts > capacity:
            raise check.ArgumentError(
                f"num_experts must be from 1 to {capacity}, a slot for each, got {experts}",
                "num_experts",
            )
        _check_slots(slots, experts)
        slots = np.array(slots, dtype=np.int32, order="C")  # always a copy
        slots.flags.writeable = False
        vars(self).update(slots=slots, num_experts=experts)
        self._check_names()

    def _check_names(self) -> None:
        for name in TEXTS:
            check.text_or_none(name, getattr(self, name))
        for name in FIGURES:
            check.number_or_none(name, getattr(self, name))
        check.instance("settings", self.settings, Mapping, hint=" of JSON values by name")
        if not self.settings:  # as in the thousands of placements that a search evaluates
            vars(self)["settings"] = {}
            return
        try:
            # The settings become what a file would give back.
            vars(self)["settings"] = json.loads(json.dumps(as_json(self.settings), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings must be JSON values: {error}") from None

    @classmethod
    def from_assignment(
        cls,
        device_of: ArrayLike,
        devices: int,
        *,
        slots_per_device: int | None = None,
        **names: Any,
    ) -> Placement:
        """Build a placement with one copy of each expert from the device of every expert [L,E].

        Slots are filled in the order of expert ids; ``slots_per_device`` is by default the largest
        number of experts on a device in a layer.
        """
        device_of = check.array_in("device_of", device_of)
        check.whole_number("devices", devices, highest=check.SLOT_LIMIT)
        if device_of.ndim != 2 or not np.issubdtype(device_of.dtype, np.integer):
            raise ValueError(
                f"device_of must be integers [layers, experts], got {check.shown(device_of)}"
            )
        if device_of.size and not (device_of.min() >= 0 and device_of.max() < devices):
            raise ValueError(
                f"device_of must be from 0 to {devices - 1}, below devices, "
                f"got {device_of.min()} to {device_of.max()}"
            )
        layers, experts = device_of.shape
        check.check_slots(devices, 1, layers)
        # A cell is a device of a layer.
        cells = device_of + np.arange(layers)[:, None] * devices
        counts = np.bincount(cells.ravel(), minlength=layers * devices)
        least = int(counts.max(initial=1))
        width = least if slots_per_device is None else slots_per_device
        check.whole_number("slots_per_device", width, highest=check.SLOT_LIMIT)
        if width < least:
            raise check.ArgumentError(
                f"slots_per_device must be at least {least}, got {width}: "
                "a device holds that many experts in one layer",
                "slots_per_device",
            )
        check.check_slots(devices, width, layers)
        # Devices get the narrowest type: numpy sorts 8 and 16 bits by radix.
        small = device_of.astype(np.min_scalar_type(max(devices - 1, 0)))
        order = np.argsort(small, axis=1, kind="stable")
        slots = np.full((layers, devices, width), EMPTY, dtype=np.int32)
        slots[np.arange(width) < counts.reshape(layers, devices, 1)] = order.ravel()
        return cls(slots, num_experts=experts, **names)

    @property
    def layers(self) -> int:
        """Number of MoE layers, L."""
        return int(self.slots.shape[0])

    @property
    def devices(self) -> int:
        """Number of devices, D."""
        return int(self.slots.shape[1])

    @property
    def slots_per_device(self) -> int:
        """Slots of a device in a layer, S."""
        return int(self.slots.shape[2])

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Layers, devices and experts, which are the same in placements that are compared."""
        return self.layers, self.devices, self.num_experts

    @property
    def has_copies(self) -> bool:
        """Whether an expert of a layer has more than one slot; every expert has one."""
        return int(np.count_nonzero(self.slots != EMPTY)) > self.layers * self.num_experts

    @property
    def replicas(self) -> NDArray[np.int64]:
        """Copies of every expert [L,E]."""
        return count_copies(self.slots, self.num_experts)

    @property
    def held(self) -> NDArray[np.bool_]:
        """Whether a device holds an expert [L,D,E]."""
        return find_holders(self.slots, self.num_experts)

    @property
    def checksum(self) -> str:
        """Eight hexadecimal digits of the slots, by which plugins of engines name a placement.

        They do not depend on the order of slots within a device, which engines choose.
        """
        return compute_checksum(self.slots)

    @property
    def device_of(self) -> NDArray[np.int64]:
        """Device of every expert [L,E].

        Raises
        ------
        ValueError
            If an expert has several copies.
        """
        if self.has_copies:
            raise ValueError("device_of needs one copy of each expert; this placement has replicas")
        layers, devices, _ = self.slots.shape
        # Empty slots write to a first column, which is left out.
        device_of = np.empty((layers, self.num_experts + 1), dtype=np.int64)
        cell = self.slots + (np.arange(layers) * (self.num_experts + 1) - EMPTY)[:, None, None]
        device_of.reshape(-1)[cell] = np.arange(devices)[:, None]
        return np.ascontiguousarray(device_of[:, 1:])

    def with_names(self, **names: Any) -> Placement:
        """Return a placement with the same slots and other names, figures or settings."""
        fields = (*TEXTS, *FIGURES, "settings")
        if not names.keys() <= {*fields}:
            raise TypeError(f"names must be of {fields}, got {sorted(names)}")
        named = copy(self)  # without another check of the slots, which are the same
        vars(named).update(names)
        named._check_names()
        return named

    def with_load(self, load: ArrayLike) -> Placement:
        """Return the placement with loads [L,E] in its settings: those that it was computed from.

        By them `filled` fills it, and an engine's plugin says how far live loads are from them.

        Raises
        ------
        ValueError
            If loads have another shape.
        """
        self._check_load(load)
        return self.with_names(settings={**self.settings, "load": np.asarray(load).tolist()})

    def filled(self, load: ArrayLike | None = None) -> Placement:
        """Return a placement without empty slots, as engines need it.

        Copies fill them: of the experts whose copies have the fewest tokens, by ``load`` [L,E] or
        by the ``load`` of the settings, which ``solve`` and ``plan`` write; without any, of those
        with the fewest copies. No device gets two copies of one expert.

        Raises
        ------
        ValueError
            If a device has more slots than there are experts, or loads have another shape.
        """
        if (self.slots != EMPTY).all():
            return self
        load = self.settings.get("load") if load is None else load
        tokens = None if load is None else self._check_load(load)
        slots = fill(self.slots, self.num_experts, load=tokens)
        # The solver's objective and bound hold for other copies.
        return replace(self, slots=slots, objective=None, bound=None)

    def without(self, lost: Collection[int]) -> Placement:
        """Return the placement on the devices that are not lost, numbered anew.

        Raises
        ------
        ValueError
            If an expert has no copy on them; ``plan`` says what to bring.
        """
        remaining = ~check.chosen("lost", lost, self.devices)
        slots = self.slots[:, remaining]
        has_copy = find_holders(slots, self.num_experts).any(axis=1)
        for layer, expert in np.argwhere(~has_copy)[:1]:
            raise check.ArgumentError(
                f"lost must leave a copy of every expert: of {(~has_copy).sum():,} there is none, "
                f"the first is expert {expert} of layer {layer}; plan says what to bring",
                "lost",
            )
        # The solver's objective and bound hold for other devices.
        return replace(self, slots=slots, objective=None, bound=None, topology=None)

    def _check_load(self, load: ArrayLike) -> NDArray[np.float64]:
        """Return loads of experts [L,E] as floats, checked."""
        tokens = check.amounts_in("load", load)
        if tokens.shape != (self.layers, self.num_experts):
            raise ValueError(
                f"load must be [{self.layers}, {self.num_experts}], got {list(tokens.shape)}"
            )
        return tokens

    def plot(
        self,
        load: ArrayLike | None = None,
        *,
        before: Placement | None = None,
        layer: int | None = None,
    ) -> Any:
        """Draw the experts on devices, as a figure of plotly.

        Colours are loads over the mean of an expert, dots mark experts with copies, and boxes the
        device that all others wait for. Copies of an expert take even shares of its load.

        Parameters
        ----------
        load
            Load of every expert [L,E], such as ``statistics.total_load``; by default equal.
        before
            Another placement of the same experts, which is drawn above.
        layer
            Layer whose load of every device is drawn as bars instead.

        Raises
        ------
        ImportError
            If plotly is not installed: ``pip install 'moetuner[report]'``.

        Examples
        --------
        >>> import moetuner as mt
        >>> blocks, better = mt.Placement([[[0, 1], [2, 3]]]), mt.Placement([[[0, 2], [1, 3]]])
        >>> figure = better.plot([[8, 4, 2, 2]], before=blocks, layer=0)
        >>> figure.layout.title.text
        'layer 0: before: busiest 1.50 x the mean; after: busiest 1.25 x the mean'
        """
        shape = (self.layers, self.num_experts)
        tokens = np.ones(shape) if load is None else self._check_load(load)
        tables = {"placement": (self.slots, self.replicas)}
        if before is not None:
            check.instance("before", before, Placement)
            if before._sizes != self._sizes:
                raise ValueError(
                    f"before must have {self.layers} layers, {self.devices} devices and "
                    f"{self.num_experts} experts, got {check.shown(before)}"
                )
            tables = {
                "before": (before.slots, before.replicas),
                "after": (self.slots, self.replicas),
            }
        if layer is None:
            return plot(draw_placements(tables, tokens))
        number = check.whole_number("layer", layer, lowest=0, highest=self.layers - 1)
        return plot(draw_devices(tables, tokens, number))

    def _repr_html_(self) -> str:
        """Return a row for each layer and a column for each device, where these are few."""
        if self.layers > SHOWN or self.devices > SHOWN or self.slots_per_device > SHOWN:
            return super()._repr_html_()
        head = ("layer", *(f"device {device}" for device in range(self.devices)))
        rows = [
            (str(layer), *(", ".join(map(str, slots)).replace("-1", "-") for slots in devices))
            for layer, devices in enumerate(self.slots)
        ]
        return html_table(head, rows)

    def save(self, path: str | Path) -> None:
        """Write the placement as JSON; the file appears whole or not at all."""
        names = {name: getattr(self, name) for name in ("num_experts", *TEXTS, *FIGURES)}
        settings = {"settings": self.settings} if self.settings else {}
        values = {"schema": SCHEMA, **names, **settings, "slots": self.slots.tolist()}
        with replacing(check.path_in(path)) as temporary:
            temporary.write_text(json.dumps(values) + "\n")

    @classmethod
    def load(cls, path: str | Path | Opened) -> Placement:
        """Read a placement that ``save`` wrote.

        Raises
        ------
        ValueError
            If the file is not a placement, or is one of another schema version.
        """
        file = opened(path)
        placements = cls.load_all(file)
        if len(placements) != 1:
            raise ValueError(f"{file.path}: must hold one placement, got {len(placements)}")
        return placements[0]

    @classmethod
    def load_all(cls, path: str | Path | Opened) -> list[Placement]:
        """Read placements from a file that has those of several models, one after another.

        Raises
        ------
        ValueError
            If the file has anything else, or a placement of another schema version.
        """
        file = opened(path)
        placements: list[Placement] = []
        with naming(file.path):
            content = file.read_whole()
            try:
                text = content.decode().strip()
                while text or not placements:
                    values, end = DECODER.raw_decode(text)
                    placements.append(cls._from_values(values))
                    text = text[end:].lstrip()
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
                raise ValueError(f"not a placement: {error}") from None
        return placements

    @classmethod
    def _from_values(cls, values: Any) -> Placement:
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            schema = values.get("schema") if isinstance(values, dict) else type(values)
            raise ValueError(f"schema must be {SCHEMA!r}, got {check.shown(schema)}")
        return cls(
            check.array_in("slots", values["slots"]),
            num_experts=check.experts_in(values["num_experts"]),
            **{name: values.get(name) for name in (*TEXTS, *FIGURES)},
            settings={} if values.get("settings") is None else values["settings"],
        )

    def diff(
        self,
        other: Placement,
        *,
        expert_bytes: float | None = None,
        topology: Topology | None = None,
    ) -> PlacementDiff:
        """Return the moves from this placement to ``other``.

        A copy moves if a device needs an expert of a layer that it does not hold yet; another slot
        of the same device costs nothing. It comes from the nearest device that holds the expert, by
        the topology's ``link_cost`` if that was given, else by tier; among equally near devices,
        from the one with the lowest number.
        """
        check.instance("other", other, Placement)
        if expert_bytes is not None:
            check.not_negative("expert_bytes", expert_bytes, "number of bytes")
        if self._sizes != other._sizes:
            raise ValueError(
                "other must have the same layers, devices and experts, "
                f"got {self._sizes} and {other._sizes}"
            )
        if topology is not None:
            check.instance("topology", topology, Topology)
            if topology.devices != self.devices:
                raise ValueError(
                    f"topology must have {self.devices} devices like the placements, "
                    f"got {topology.devices}"
                )
        return compare_holders(self.held, other.held, topology, expert_bytes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.num_experts == other.num_experts and np.array_equal(self.slots, other.slots)

    def __hash__(self) -> int:
        return hash((self.num_experts, self.slots.shape, self.slots.tobytes()))


def blocks(layers: int, experts: int, devices: int) -> Placement:
    """Return experts in blocks, one copy each; the first devices have one more if need be."""
    sizes = experts // devices + (np.arange(devices) < experts % devices)
    device_of = np.repeat(np.arange(devices), sizes)
    return Placement.from_assignment(np.tile(device_of, (layers, 1)), devices)


def contiguous(placement: Placement) -> Placement:
    """Return the blocks of the experts and devices of a placement, one copy each."""
    return blocks(placement.layers, placement.num_experts, placement.devices)


def count_copies(slots: NDArray[Any], experts: int) -> NDArray[np.int64]:
    """Count the slots of every expert [L,E], without empty slots."""
    layers, width = len(slots), experts + 1
    columns = slots.reshape(layers, -1).astype(np.int64) + np.arange(layers)[:, None] * width
    counts: NDArray[np.int64] = np.bincount(columns.ravel() - EMPTY, minlength=layers * width)
    return counts.reshape(layers, width)[:, 1:]


def _check_slots(slots: NDArray[Any], experts: int) -> None:
    """Raise for the first layer that breaks a rule."""
    if slots.min() < EMPTY or slots.max() >= experts:
        layer, device, slot = np.argwhere((slots < EMPTY) | (slots >= experts))[0]
        raise ValueError(
            f"slots: layer {layer}, device {device}: expert id {slots[layer, device, slot]} "
            f"is not from -1 to {experts - 1}, below num_experts"
        )
    copies = count_copies(slots, experts)
    for layer, expert in np.argwhere(copies == 0)[:1]:
        raise ValueError(f"slots: layer {layer}: expert {expert} has no slot")
    if copies.max() == 1:
        return
    ordered = np.sort(slots, axis=2)
    twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] != EMPTY)
    for layer, device, slot in np.argwhere(twice)[:1]:
        raise ValueError(
            f"slots: layer {layer}, device {device}: "
            f"expert {ordered[layer, device, slot]} has two slots"
        )
