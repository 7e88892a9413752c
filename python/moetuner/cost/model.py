"""CostModel: loads and bytes into microseconds, so that balance and traffic have one currency."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _checks as check
from moetuner.cost.fit import fit_times
from moetuner.files import naming, read_whole, replacing
from moetuner.files.text import parse_json
from moetuner.frozen import Frozen
from moetuner.presets import GPUS, MEASURED, Measured
from moetuner.topology import Topology

SCHEMA = "moetuner.cost_model/1"

# The sizes of DeepSeek-V3's experts, for presets without sizes (its config.json), and the
# bits of a weight where they are not known.
HIDDEN, INTERMEDIATE = 7168, 2048
WEIGHT_BITS = 8.0

# Share of the peak that grouped matrix products and weight reads reach. DeepGEMM reports 1550 of
# 1979 TFLOP/s at best and half of that on small groups; a rough middle. Measure, and use `fit`.
EFFICIENCY = 0.6

# Start of a layer's kernels. A few launches of two to three microseconds each.
LAUNCH_US = 10.0

Floats = NDArray[np.float64]
Sizes = Literal["given", "recorded", "published", "assumed"]
AMOUNTS = ("base_us", "expert_us", "start_us", "token_us", "token_bytes", "combine_bytes")


@dataclass(frozen=True, eq=False, repr=False)
class CostModel(Frozen):
    """Time of a layer: the slowest device, and the busiest port of every tier.

    A device computes for ``max(base_us + expert_us * active experts + exposed * token_us * tokens,
    start_us + token_us * tokens) / speed``: reading weights, or using them, whichever takes longer.
    Tokens count once per expert.
    A tier of links takes its latency and the bytes of its busiest port, in or out, over its
    bandwidth; tiers are used one after the other. A layer is compute and communication, less the
    share ``overlap`` of the shorter of the two.

    Parameters
    ----------
    base_us, expert_us
        Microseconds of a layer, and of each active expert's weights.
    start_us, token_us
        Microseconds of a layer, and of each token.
    token_bytes
        Bytes of one token's state when it is sent to an expert.
    combine_bytes
        Bytes of what comes back, in regime dispatch; ``token_bytes`` by default.
    exposed
        Share of the computing that reading weights does not hide, 0 to 1.
    overlap
        Share of the shorter of compute and communication that is hidden behind the other, 0 to 1.
    once_per
        Target to which a token is sent once in regime dispatch: every ``"device"`` of its experts,
        or every ``"node"``, where it is fanned out inside (DeepEP's normal kernels).
    name
        For people.
    residual
        Relative root mean square error, where the model was fitted.
    prediction_error
        The same on measurements that the fit had not seen, by cross-validation: what to expect of
        batches between those measured, not beyond.
    parameter_errors
        Standard errors of ``base_us``, ``expert_us``, ``start_us``, ``token_us`` and ``exposed``.
    measured
        How many measurements were of each regime: reading weights, and computing.
    weight_bits
        Bits of a weight as it is read, with its share of scales, where that is known.
    preset_text
        GPU and sizes of experts, as ``preset`` and the option of commands take them; None of a
        model that was fitted, or has other fields.
    sizes
        Where the sizes of experts come from: they were given, a recording has them, the model that
        it names is published with them, or they are assumed, as the recording names no model.

    Raises
    ------
    ValueError
        If a number is negative or not finite.

    Examples
    --------
    >>> import moetuner as mt
    >>> model = mt.CostModel.preset("h100", hidden=4096, intermediate=1024)
    >>> model.token_bytes
    4096
    """

    base_us: float
    expert_us: float
    start_us: float
    token_us: float
    token_bytes: float
    _: KW_ONLY
    combine_bytes: float | None = None
    exposed: float = 0.0
    overlap: float = 0.0
    once_per: Literal["device", "node"] = "device"
    name: str | None = None
    residual: float | None = None
    prediction_error: float | None = None
    parameter_errors: tuple[float, ...] | None = None
    measured: tuple[int, ...] | None = None
    weight_bits: float | None = None
    preset_text: str | None = field(default=None, compare=False, repr=False)
    sizes: Sizes = field(default="given", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in AMOUNTS:
            if name != "combine_bytes" or self.combine_bytes is not None:
                unit = "number of microseconds" if name.endswith("_us") else "number of bytes"
                vars(self)[name] = check.not_negative(name, getattr(self, name), unit)
        for name in ("exposed", "overlap"):
            share = getattr(self, name)
            if not (check.is_number(share) and 0 <= share <= 1):
                raise ValueError(f"{name} must be from 0 to 1, got {check.shown(share)}")
        for name in ("parameter_errors", "measured"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                vars(self)[name] = tuple(getattr(self, name))
        check.one_of("once_per", self.once_per, ("device", "node"))
        check.text_or_none("name", self.name)
        check.text_or_none("preset_text", self.preset_text)
        check.one_of("sizes", self.sizes, get_args(Sizes))
        if self.residual is not None:
            check.not_negative("residual", self.residual, "number")
        if self.weight_bits is not None:
            check.positive("weight_bits", self.weight_bits)

    @property
    def bytes_back(self) -> float:
        """Bytes of what comes back from an expert in regime dispatch."""
        return self.token_bytes if self.combine_bytes is None else self.combine_bytes

    @property
    def formula(self) -> str:
        """Microseconds of a device's experts, as they stand in a sentence."""
        shown = f" + {self.exposed * self.token_us:.4g} x tokens" if self.exposed else ""
        return (
            f"max({self.base_us:.4g} + {self.expert_us:.4g} x active experts{shown}, "
            f"{self.start_us:.4g} + {self.token_us:.4g} x tokens) us"
        )

    @property
    def shown_name(self) -> str:
        """Name in sentences, also where there is none."""
        return self.name or "an unnamed cost model"

    @property
    def weights(self) -> str:
        """In how many bits weights are read, to follow a name; empty where that is not known."""
        return "" if self.weight_bits is None else f", weights in {self.weight_bits:g} bits"

    @classmethod
    def fit(
        cls, tokens: ArrayLike, experts: ArrayLike, microseconds: ArrayLike, **others: Any
    ) -> CostModel:
        """Fit the compute of a device to measurements.

        Computing is ``exposed`` only where that predicts unseen batches better.

        Parameters
        ----------
        tokens
            Tokens that the device worked on [n], each counted once per expert.
        experts
            Experts among which these were [n].
        microseconds
            Time of the layer's experts [n].
        others
            ``token_bytes`` (needed), ``combine_bytes``, ``overlap``, ``name``.

        Raises
        ------
        ValueError
            If some are not numbers, or times not positive; if there are fewer than eight different
            batches, or they do not show both regimes, reading weights (few tokens on many experts)
            and computing (many tokens on few).
        """
        return cls(**{**fit_times(tokens, experts, microseconds), **others})

    @classmethod
    def from_hardware(
        cls,
        hidden: float,
        intermediate: float,
        *,
        flops: float,
        memory_bandwidth: float,
        dtype_bytes: float = 2,
        weight_bits: float | None = None,
        efficiency: float = EFFICIENCY,
        launch_us: float = LAUNCH_US,
        **others: Any,
    ) -> CostModel:
        """Compute a roofline for gated experts (three matrices, as in all current models).

        Parameters
        ----------
        hidden, intermediate
            Sizes of an expert.
        flops, memory_bandwidth
            Peak operations and bytes per second of a device.
        dtype_bytes
            Bytes of each number of a token that is sent out; results come back in two bytes.
        weight_bits
            Bits of a weight; by default those of ``dtype_bytes``.
        efficiency
            Share of the peaks that is reached.
        launch_us
            Microseconds of a layer that has nothing to do.
        others
            Fields, in place of what follows from these.
        """
        hidden = check.positive("hidden", hidden)
        weights = 3 * hidden * check.positive("intermediate", intermediate)
        efficiency = check.positive("efficiency", efficiency)
        flops = check.positive("flops", flops) * efficiency
        memory_bandwidth = check.positive("memory_bandwidth", memory_bandwidth) * efficiency
        dtype_bytes = check.positive("dtype_bytes", dtype_bytes)
        weight_bits = 8 * dtype_bytes if weight_bits is None else weight_bits
        bits = float(check.positive("weight_bits", weight_bits))
        launch_us = check.not_negative("launch_us", launch_us, "number of microseconds")
        fields = {
            "base_us": launch_us,
            "expert_us": 1e6 * weights * bits / 8 / memory_bandwidth,
            "start_us": launch_us,
            "token_us": 1e6 * 2 * weights / flops,
            "token_bytes": hidden * dtype_bytes,
            "combine_bytes": hidden * 2.0,
            "weight_bits": bits,
        }
        return cls(**{**fields, **others})

    @classmethod
    def preset(
        cls,
        gpu: str,
        /,
        *,
        hidden: int = HIDDEN,
        intermediate: int = INTERMEDIATE,
        dtype_bytes: float | None = None,
        weight_bits: float | None = None,
        **others: Any,
    ) -> CostModel:
        """Return the roofline of a common GPU, such as ``"h100"``, or times that were measured.

        Sizes are DeepSeek-V3's, in 8 bits. Weights of 8 bits meet tokens that are sent and computed
        in 8 bits; weights of other bits meet tokens in 16, unless ``dtype_bytes`` says otherwise.
        What was measured, such as ``"a800-measured"``, is of other sizes in 16 bits; times of an
        expert and of a token are in proportion to the weights.

        Raises
        ------
        ValueError
            If the GPU is not known, or was measured in other bits; ``presets.py`` has the list and
            the sources.
        """
        check.one_of("preset", gpu, (*GPUS, *MEASURED))
        if weight_bits is not None:
            weight_bits = check.positive("weight_bits", weight_bits)
        name = f"{gpu}:{hidden}x{intermediate}"
        if gpu in MEASURED:
            if weight_bits not in (None, 16):
                raise check.ArgumentError(
                    f"weight_bits must be 16, as measured, got {weight_bits}", "weight_bits"
                )
            return cls._scaled(MEASURED[gpu], hidden, intermediate, dtype_bytes, name, others)
        if dtype_bytes is None:
            dtype_bytes = 1 if weight_bits in (None, WEIGHT_BITS) else 2
        dtype_bytes = check.positive("dtype_bytes", dtype_bytes)
        peak = GPUS[gpu]
        return cls.from_hardware(
            hidden,
            intermediate,
            flops=peak.flops_8bit if dtype_bytes == 1 else peak.flops_16bit,
            memory_bandwidth=peak.memory_bandwidth,
            dtype_bytes=dtype_bytes,
            weight_bits=weight_bits,
            **{"name": name, "preset_text": name, **others},
        )

    @classmethod
    def _scaled(
        cls,
        preset: Measured,
        hidden: float,
        intermediate: float,
        dtype_bytes: float | None,
        name: str,
        others: dict[str, Any],
    ) -> CostModel:
        """Return what was measured, for other sizes of experts; it is no measurement then."""
        hidden = check.positive("hidden", hidden)
        weights = hidden * check.positive("intermediate", intermediate)
        if check.positive("dtype_bytes", dtype_bytes or 2) != 2:
            raise ValueError(f"dtype_bytes must be 2, as measured, got {dtype_bytes}")
        factor = weights / (preset.hidden * preset.intermediate)
        fields: dict[str, Any] = {
            "name": name,
            "preset_text": name,
            "token_bytes": 2 * hidden,
            "exposed": preset.exposed,
        }
        fields["weight_bits"] = 16.0
        if (hidden, intermediate) == (preset.hidden, preset.intermediate):
            fields |= {"prediction_error": preset.prediction_error, "measured": preset.measured}
        else:
            fields["name"] += f" (scaled from {preset.hidden}x{preset.intermediate})"
        line = (
            preset.base_us,
            factor * preset.expert_us,
            preset.start_us,
            factor * preset.token_us,
        )
        return cls(*line, **{**fields, **others})

    def compute_us(
        self, tokens: ArrayLike, active: ArrayLike | None = None, speed: ArrayLike | None = None
    ) -> Floats:
        """Compute microseconds that devices [...,D] compute.

        Parameters
        ----------
        tokens
            Tokens of every device [...,D], each counted once per expert.
        active
            Experts of every device [...,D] that have a token; None where not known, and then
            weights are taken to be read while tokens are computed.
        speed
            Relative speed of every device [D].
        """
        computing = self.token_us * check.amounts_in("tokens", tokens)
        time = self.start_us + computing
        experts = check.amounts_in("active", 0.0 if active is None else active)
        _check_shapes("active", experts, "tokens", time)
        reading = self.base_us + self.expert_us * experts + self.exposed * computing
        time = np.maximum(reading, time)
        if speed is None:
            return time
        speeds = check.amounts_in("speed", speed)
        if not (speeds >= check.SMALLEST).all():
            raise ValueError(f"speed must be above 0, got {speeds.min():g}")
        _check_shapes("speed", speeds, "tokens", time)
        return time / speeds

    def least_compute_us(
        self, slowest: Floats, active: Floats, tokens: Floats, speed: Floats, *, are_single: bool
    ) -> Floats:
        """Compute the least microseconds [...] of the slowest device, wherever experts are.

        Parameters
        ----------
        slowest
            Tokens over speed [...] that the slowest device has at least.
        active, tokens
            Experts that have a token, on all devices together, and tokens of all of them [...].
        speed
            Relative speed of every device [D].
        are_single
            Whether every expert has one copy: a device then reads whole experts.
        """
        # An idle device starts as well.
        least = max(self.base_us, self.start_us) / speed.min()
        serving = self.start_us / speed.max() + self.token_us * slowest
        shown = self.exposed * self.token_us * tokens
        reading = (self.base_us * len(speed) + self.expert_us * active + shown) / speed.sum()
        least_us: Floats = np.maximum(least, np.maximum(serving, reading))
        if are_single and np.ptp(speed) == 0:
            experts = np.ceil(active / len(speed))
            least_us = np.maximum(least_us, (self.base_us + self.expert_us * experts) / speed[0])
        return least_us

    def ports_us(
        self, ports: ArrayLike, topology: Topology, *, bytes_each: float | None = None
    ) -> Floats:
        """Compute microseconds [...] of tiers whose busiest ports carry these rows [...,tiers].

        Tier 1 comes first; a tier that carries nothing takes no time.
        """
        check.instance("topology", topology, Topology)
        row_bytes = self.token_bytes
        if bytes_each is not None:
            row_bytes = check.not_negative("bytes_each", bytes_each, "number of bytes")
        rows = check.amounts_in("ports", ports, 1)
        if rows.shape[-1] != len(topology.levels):
            raise ValueError(
                f"ports must be rows [..,{len(topology.levels)}], one for each tier of the "
                f"topology, got {list(rows.shape)}"
            )
        bandwidth, latency = np.array(
            [(level.bandwidth, level.latency) for level in topology.levels]
        ).T
        time: Floats = ((rows > 0) * latency + rows * row_bytes / bandwidth).sum(axis=-1) * 1e6
        return time

    def layer_us(self, compute: ArrayLike, communication: ArrayLike) -> Floats:
        """Compute microseconds of layers [...] of devices' compute [...,D] and exchange [...]."""
        devices = check.amounts_in("compute", compute, 1)
        if not devices.shape[-1]:
            raise ValueError(f"compute must be of at least one device, got {list(devices.shape)}")
        slowest = devices.max(axis=-1)
        other = check.amounts_in("communication", communication)
        _check_shapes("communication", other, "compute", slowest)
        time: Floats = slowest + other - self.overlap * np.minimum(slowest, other)
        return time

    def crossing_us(self, topology: Topology, *, returns: bool) -> Floats:
        """Compute the price of one more token over a link, by tier [tiers + 1]; 0 for no link.

        If ports are evenly used, the busiest carries one row in D. ``returns`` is whether tokens
        come back, as in regime dispatch.
        """
        check.instance("topology", topology, Topology)
        check.flag("returns", returns)
        carried = self.token_bytes + (self.bytes_back if returns else 0.0)
        links = [carried / level.bandwidth * 1e6 / topology.devices for level in topology.levels]
        return (1.0 - self.overlap) * np.array([0.0, *links])

    def save(self, path: str | Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        with replacing(check.path_in(path)) as temporary:
            temporary.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Read what ``save`` wrote.

        Raises
        ------
        ValueError
            If the file is no cost model.
        OSError
            If it cannot be read.
        """
        path = check.path_in(path)
        with naming(path):
            try:
                values = parse_json(read_whole(path))
            except ValueError as error:
                raise ValueError(f"not a cost model: {error}") from None
            schema = values.pop("schema", None)
            if schema != SCHEMA:
                raise ValueError(f"not a cost model: schema must be {SCHEMA!r}, got {schema!r}")
            return from_keys(values)


def from_keys(values: Mapping[str, Any]) -> CostModel:
    """Build a cost model from the keys that a file has; see ``CostModel.load``."""
    names = [field.name for field in fields(CostModel)]
    for key in (key for key in values if key not in names):
        raise ValueError(f"keys must be out of {names}, got {key!r}")
    return CostModel(**values)


def _check_shapes(name: str, array: Floats, other: str, like: Floats) -> None:
    """Check that two arrays can be combined."""
    try:
        np.broadcast_shapes(array.shape, like.shape)
    except ValueError:
        raise ValueError(
            f"{name} must fit {other} {list(like.shape)}, got {list(array.shape)}"
        ) from None


def busiest_ports(sent: ArrayLike, topology: Topology) -> Floats:
    """Compute rows at the busiest port of every tier [...,tiers] of rows sent [...,D,D].

    A device's port of a tier carries what it sends to, or receives from, devices of that tier:
    links work in both directions at once, so the larger of the two counts.
    """
    ports = []
    for tier in range(1, len(topology.levels) + 1):
        rows = np.asarray(sent, dtype=np.float64) * (topology.tier == tier)
        ports.append(np.maximum(rows.sum(axis=-1), rows.sum(axis=-2)).max(axis=-1))
    return np.stack(ports, axis=-1)


def compute_move_us(
    model: CostModel, pairs: ArrayLike, topology: Topology, expert_bytes: float
) -> float:
    """Compute the microseconds of moving so many experts from device to device [D,D]."""
    ports = busiest_ports(pairs, topology)
    return float(model.ports_us(ports, topology, bytes_each=expert_bytes))
