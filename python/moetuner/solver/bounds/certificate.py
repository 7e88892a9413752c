"""Certificate: numbers from which anybody can recompute a bound, without trusting who found it.

It covers placements with one copy of each expert, on devices of so many slots, whose loads keep the
caps. It holds a dual point, which proves a bound by itself; or prices or tangents, which prove a
bound on visits. Or it says that layers have so few partitions that dynamic programming over all of
them is the proof; then verification repeats that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import path_in, shown
from moetuner.files import naming, replacing, safetensors, size_of
from moetuner.files.opened import Opened, opened
from moetuner.frozen import Frozen
from moetuner.topology import Regime

FORMAT, VERSION = "moetuner.certificate", "3"

Method = Literal["dual point", "complete dynamic programme", "visits"]

ARRAYS = {
    "lambda_": np.float64,
    "columns": np.float64,
    "multipliers": np.float64,
    "cuts": np.int32,
    "choices": np.uint8,
    "contents": np.float64,
}


@dataclass(frozen=True, eq=False, repr=False)
class Proof(Frozen):
    """A dual point for one level of the topology: ``parts`` equal parts, crossing at ``price``.

    The arrays are flat: multipliers of the matrix rows [M,2P,2P] and column sums [M,P], of every
    cut [n], the cuts [n,5] (kind, pair of layers, three items), and choices of lifted cuts.
    """

    parts: int
    price: int
    lambda_: NDArray[np.float64]
    columns: NDArray[np.float64]
    multipliers: NDArray[np.float64]
    cuts: NDArray[np.int32]
    choices: NDArray[np.uint8]
    contents: NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class Visits(Frozen):
    """A proof of a bound on visits of ``parts``, devices or nodes.

    It has ``prices`` of experts [L*E], in tokens, where all contents of a part are tried; or
    ``slopes`` of the tangents of all distinct sets, layer after layer, with ``pairs``, which prove
    how many pairs of experts, weighted by the slopes, lie apart; or neither, where capacity alone
    proves the bound.
    """

    parts: int
    prices: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    slopes: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    pairs: Proof | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Certificate(Frozen):
    """A proof of a bound on a regime's cost, for ``slots`` per device under ``caps`` [L].

    Parameters
    ----------
    fingerprint
        Fingerprint of the statistics.
    method
        Kind of proof; a dual point has ``proofs``, visits have ``visits``, level by level.
    cost
        The bound that it was written for, on ``Objective.cost`` or on visits. ``verify`` does not
        trust it.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> load, pairs = np.array([[[2, 2], [2, 2]]]), np.array([[[2, 0], [0, 2]]])
    >>> statistics = mt.RoutingStatistics(load, pairs)
    >>> problem = mt.Problem(statistics, mt.Topology(2), regime="follow", max_imbalance=1.0)
    >>> certificate = mt.solve(problem).certificate
    >>> certificate.save("bound.certificate")
    >>> mt.Certificate.load("bound.certificate") == certificate
    True
    """

    scope: ClassVar[str] = "placements with one copy of each expert"

    fingerprint: str
    regime: Regime
    slots: int
    caps: NDArray[np.uint64]
    method: Method
    cost: int
    proofs: tuple[Proof, ...] = field(default=(), repr=False)
    visits: tuple[Visits, ...] = field(default=(), repr=False)

    def save(self, path: str | Path) -> None:
        """Write as safetensors; the file appears whole or not at all."""
        tensors: dict[str, NDArray[Any]] = {"caps": self.caps}
        for number, proof in enumerate(self.proofs):
            tensors |= {f"{number}.{name}": getattr(proof, name) for name in ARRAYS}
        for number, level in enumerate(self.visits):
            prefix = f"visits.{number}"
            tensors |= {f"{prefix}.prices": level.prices, f"{prefix}.slopes": level.slopes}
            if level.pairs is not None:
                tensors |= {f"{prefix}.{name}": getattr(level.pairs, name) for name in ARRAYS}
        # The widest type first: then all tensors are aligned.
        tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "about": self.scope,
            "fingerprint": self.fingerprint,
            "regime": self.regime,
            "slots": str(self.slots),
            "method": self.method,
            "cost": str(self.cost),
            "levels": json.dumps([[proof.parts, proof.price] for proof in self.proofs]),
            "visits": json.dumps([[level.parts, level.pairs is not None] for level in self.visits]),
        }
        with replacing(path_in(path)) as temporary:
            arrays = {name: safetensors.whole(array) for name, array in tensors.items()}
            safetensors.write(temporary, arrays, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read what ``save`` wrote.

        Raises
        ------
        ValueError
            If the file is truncated, corrupt, of another version, or something else.
        """
        file = opened(path)
        with naming(file.path):
            try:
                return cls._read(file)
            except (KeyError, TypeError, ValueError) as error:
                reason = str(error).removeprefix(f"{file.path}: ")
                raise ValueError(f"not a certificate: {reason}") from None

    @classmethod
    def _read(cls, file: Opened) -> Certificate:
        size_of(file.path)  # refuses what is no regular file, which would block
        if file.head.startswith(b"{"):
            raise ValueError("it is JSON, as placements are")
        header = file.header
        metadata: dict[str, Any] = dict(header.metadata)
        for name, wanted in (("format", FORMAT), ("version", VERSION), ("about", cls.scope)):
            if metadata.get(name) != wanted:
                raise ValueError(f"{name} must be {wanted!r}, got {shown(metadata.get(name))}")
        for name, allowed in (("regime", get_args(Regime)), ("method", get_args(Method))):
            if metadata[name] not in allowed:
                wanted = " or ".join(allowed)
                raise ValueError(f"{name} must be {wanted}, got {shown(metadata[name])}")
        for name in ("slots", "cost"):
            if not (metadata[name].isascii() and metadata[name].isdigit()):
                raise ValueError(f"{name} must be a whole number, got {shown(metadata[name])}")
        places = {name: header.tensor(name) for name in header.entries}
        tensors = safetensors.read_all(file.path, places)

        def array(name: str, dtype: Any) -> NDArray[Any]:
            """Return an array of one dimension and just this type."""
            place = header.tensor(name)
            if len(place.shape) != 1 or place.dtype != dtype:
                wanted = f"{np.dtype(dtype)} of one dimension"
                raise ValueError(f"{name} must be {wanted}, got {place.dtype} {list(place.shape)}")
            return tensors[name]

        def proof(prefix: str, parts: int, price: int) -> Proof:
            arrays = [array(f"{prefix}.{name}", dtype) for name, dtype in ARRAYS.items()]
            return Proof(parts, price, *arrays)

        levels = json.loads(metadata["levels"])
        proofs = [proof(str(number), *level) for number, level in enumerate(levels)]
        visits = [
            Visits(
                parts,
                array(f"visits.{number}.prices", np.float64),
                array(f"visits.{number}.slopes", np.uint8),
                proof(f"visits.{number}", parts, 1) if with_pairs else None,
            )
            for number, (parts, with_pairs) in enumerate(json.loads(metadata["visits"]))
        ]
        return cls(
            metadata["fingerprint"],
            metadata["regime"],
            int(metadata["slots"]),
            array("caps", np.uint64),
            metadata["method"],
            int(metadata["cost"]),
            tuple(proofs),
            tuple(visits),
        )
