"""The rules for numbers, and for expert ids: type, sizes and values (checked in the core)."""

from __future__ import annotations

import math
import operator
from typing import Any, SupportsIndex, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from moetuner import _core

IdArray = NDArray[np.uint8] | NDArray[np.uint16]
IdType = np.dtype[np.uint8] | np.dtype[np.uint16]

U8, U16 = np.dtype(np.uint8), np.dtype(np.uint16)
LAYER_LIMIT = 1 << 16
EXPERT_LIMIT = 1 << 16
# Of a topology, whose tables are of pairs of devices.
DEVICE_LIMIT = 1 << 13
# Of all devices of a layer together, each as wide as the widest.
SLOT_LIMIT = 1 << 16
# Of a table of layers, experts and devices.
CELL_LIMIT = 1 << 28


def experts_in(num_experts: object) -> int:
    """Check a number of experts per layer.

    Raises
    ------
    ValueError
        If it is not an integer that 16-bit ids can count to.
    """
    return whole_number("num_experts", num_experts, highest=EXPERT_LIMIT)


def whole_number(name: str, value: object, *, lowest: int = 1, highest: int = (1 << 63) - 1) -> int:
    """Check an integer from ``lowest`` to ``highest``.

    Raises
    ------
    ValueError
        If it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise ValueError(f"{name} must be an integer, got {value!r:.40}")
    number = operator.index(value)
    if not lowest <= number <= highest:
        raise ValueError(f"{name} must be from {lowest} to {highest}, got {number}")
    return number


def check_slots(devices: int, slots_per_device: int, layers: int = 1) -> None:
    """Check how many slots there are, before anything of that size is made.

    Raises
    ------
    ValueError
        If a layer has more than 16 bits can count, or all layers more than a table can have.
    """
    if layers * devices * slots_per_device > CELL_LIMIT:
        raise ValueError(
            f"slots_per_device must make at most {CELL_LIMIT} slots, "
            f"got {slots_per_device} on {devices} devices in {layers} layers"
        )
    if devices * slots_per_device > SLOT_LIMIT:
        raise ValueError(
            f"slots_per_device must make at most {SLOT_LIMIT} slots in a layer, "
            f"got {slots_per_device} on {devices} devices"
        )


def check_sizes(shape: tuple[int, ...], dtype: np.dtype[np.generic], num_experts: int) -> None:
    """Check the type of ids and their sizes [T,L,K].

    Raises
    ------
    ValueError
        If ids are not integers, or a model cannot have these sizes.
    """
    if len(shape) != 3 or dtype.kind not in "iu":
        raise ValueError(
            f"expert_ids must be integers [tokens, layers, top_k], got {dtype} {list(shape)}"
        )
    tokens, layers, top_k = shape
    if layers > LAYER_LIMIT or tokens >= 1 << 48:
        raise ValueError(f"expert_ids must have at most {LAYER_LIMIT} layers, got {list(shape)}")
    # The core states the other rules; a trace without tokens keeps or breaks them like any other.
    _core.validate(np.empty((0, layers, min(top_k, LAYER_LIMIT + 1)), dtype=U8), num_experts)


def valid(
    ids: NDArray[np.generic], num_experts: int, first_token: int = 0, threads: int | None = None
) -> IdArray:
    """Validate integer ids [T,L,K] and give them as C-contiguous uint8 or uint16.

    Raises
    ------
    ValueError
        Naming the first faulty token (counted from ``first_token``), its layer and the id.
    """
    dtype = id_type(ids.dtype, num_experts)
    if ids.dtype != dtype and ids.size:
        numbers = cast("NDArray[np.integer[Any]]", ids)
        if numbers.min() < 0 or numbers.max() >= num_experts:
            token, layer, k = np.argwhere((numbers < 0) | (numbers >= num_experts))[0]
            value = int(numbers[token, layer, k])
            rule = "negative" if value < 0 else f"not below num_experts {num_experts}"
            raise ValueError(
                f"expert_ids: token {first_token + token}, layer {layer}: "
                f"expert id {value} is {rule}"
            )
    narrow = cast(IdArray, np.ascontiguousarray(ids, dtype=dtype))
    _core.validate(narrow, num_experts, first_token, threads)
    return narrow


def id_type(dtype: np.dtype[np.generic], num_experts: int) -> IdType:
    """Type that ids are held in: uint8 and uint16 as they are, others the smaller that fits."""
    if dtype in (U8, U16):
        return U8 if dtype == U8 else U16
    return U8 if num_experts <= 256 else U16


def per_device(name: str, values: Any, devices: int) -> list[Any]:
    """Check that there is one number for every device.

    Raises
    ------
    ValueError
        If there is not.
    """
    array = np.asarray(values)
    if array.shape != (devices,) or array.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} must be numbers [{devices}], one per device, "
            f"got {array.dtype} {list(array.shape)}"
        )
    found: list[Any] = array.tolist()
    return found


def positive(name: str, value: object, what: str) -> None:
    """Check a number above 0; ``what`` says its unit.

    Raises
    ------
    ValueError
        If it is not one.
    """
    if not (is_number(value) and value > 0):
        raise ValueError(f"{name} must be a positive {what}, got {value}")


def not_negative(name: str, value: object, what: str) -> None:
    """Check a number of at least 0; ``what`` says its unit.

    Raises
    ------
    ValueError
        If it is not one.
    """
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name} must be a {what} of at least 0, got {value}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and not a truth value."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return number and math.isfinite(cast(float, value))
