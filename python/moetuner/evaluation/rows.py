"""Count the rows that a placement moves from device to device, given every token's home."""

from __future__ import annotations

from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner._checks import ArgumentError, array_in, instance, one_of, shown, whole_number
from moetuner.evaluation.reading import RowReader, read
from moetuner.placement import Placement
from moetuner.trace import RoutingTrace

LayerSplit = Literal["even", "nearest"]


def dispatch_rows(
    placement: Placement,
    trace: RoutingTrace,
    home: ArrayLike | Literal["blocks"] = "blocks",
    *,
    split: LayerSplit = "even",
    devices_per_node: int | None = None,
    position: ArrayLike | None = None,
) -> NDArray[np.int64]:
    """Count the rows that leave a device for another one, one per token and distinct device.

    Parameters
    ----------
    placement
        Slots of the experts.
    trace
        Tokens; the position of a token chooses between copies of an expert.
    home
        Device that each token comes from and returns to [T]; ``"blocks"`` gives every device one
        run of tokens, the first ones a token more where they do not divide.
    split
        ``"even"``: copies of an expert share its tokens evenly, by position. ``"nearest"``: a token
        takes a copy on its own device, else on its own node, else by position.
    devices_per_node
        Devices of a node, for a hierarchical exchange: a token crosses to each distinct node once,
        to the device with its home's number there, and is fanned out inside. None sends every row
        straight to its device.
    position
        Position of every token [T], which chooses between copies of an expert; by default its
        number in the trace. A running layer numbers its tokens step by step and, in a step, rank by
        rank, as if all ranks had as many tokens.

    Returns
    -------
    ndarray
        Rows [L,D,D] from device to device; the diagonal is zero. As many come back.

    Raises
    ------
    ValueError
        If placement and trace are not of one model, a home is no device, or a position no number.

    Examples
    --------
    >>> import moetuner as mt
    >>> trace = mt.RoutingTrace.from_arrays([[[0, 1]], [[2, 3]]], num_experts=4)
    >>> mt.dispatch_rows(mt.Placement([[[0, 2], [1, 3]]]), trace).tolist()
    [[[0, 1], [1, 0]]]
    """
    instance("placement", placement, Placement)
    instance("trace", trace, RoutingTrace)
    expected = (trace.layers, trace.num_experts)
    actual = (placement.layers, placement.num_experts)
    if actual != expected:
        raise ValueError(
            f"placement must have {expected[0]} layers and {expected[1]} experts like the trace, "
            f"got {actual[0]} and {actual[1]}"
        )
    size = check_node_size(placement.devices, devices_per_node)
    homes = assign_homes(home, trace.tokens, placement.devices)
    places = (
        np.arange(trace.tokens) if position is None else _check_positions(position, trace.tokens)
    )
    device = np.arange(placement.devices)
    rows = RowReader(
        trace,
        np.arange(trace.tokens),
        lambda run: homes[run],
        placement.devices,
        trace.tokens,
        place=places,
        home=homes,
    )
    replay = rows.replay(placement.slots, (device // size).tolist(), split=check_split(split))
    read([rows])
    visits, to_nodes = (table.transpose(1, 0, 2).astype(np.int64) for table in replay.finish()[1:3])
    sent = visits
    if devices_per_node is not None:
        sent, nodes = np.zeros_like(visits), np.arange(to_nodes.shape[2])
        for home_device in device:
            # In every node, the device with the number that the home has in its node.
            relay = nodes * size + home_device % size
            sent[:, home_device, relay] += to_nodes[:, home_device]
            sent[:, relay[device // size], device] += visits[:, home_device]
    sent[:, device, device] = 0
    return sent


def assign_homes(home: ArrayLike | str, tokens: int, devices: int) -> NDArray[np.int64]:
    """Return the home device of every token [T], checked; ``home`` is as in ``dispatch_rows``."""
    if isinstance(home, str):
        if home != "blocks":
            raise ValueError(f"home must be devices [tokens] or 'blocks', got {shown(home)}")
        share, remainder = divmod(tokens, devices)
        return np.repeat(np.arange(devices), share + (np.arange(devices) < remainder))
    homes = _check_positions(home, tokens, "home")
    if tokens and not (homes.min() >= 0 and homes.max() < devices):
        raise ValueError(
            f"home must be from 0 to {devices - 1}, got {homes.min()} to {homes.max()}"
        )
    return homes


def check_node_size(devices: int, devices_per_node: int | None) -> int:
    """Check the devices of a node, and return their number; None is all devices."""
    size = devices if devices_per_node is None else devices_per_node
    whole_number("devices_per_node", size)
    if devices % size:
        raise ArgumentError(
            f"devices_per_node must divide the devices ({devices}), got {devices_per_node}",
            "devices_per_node",
        )
    return size


def check_split(split: str) -> LayerSplit:
    """Check the name of a rule for choosing between copies, and return it."""
    one_of("split", split, get_args(LayerSplit))
    return cast(LayerSplit, split)


def _check_positions(values: ArrayLike, tokens: int, name: str = "position") -> NDArray[np.int64]:
    """Check whole numbers of tokens, and return them [T]."""
    numbers = array_in(name, values)
    if numbers.shape != (tokens,) or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be integers [{tokens}], got {numbers.dtype} {list(numbers.shape)}"
        )
    return numbers.astype(np.int64)
