"""Certificate: what a bound can be recomputed from, without trusting who found it.

It is about placements with one copy of each expert, on devices of so many slots, whose loads keep
the caps. Either it holds a dual point, which proves a bound by itself; or it says that a layer has
so few partitions that dynamic programming over all of them is the proof, which is done again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, replacing, safetensors
from moetuner.frozen import Frozen
from moetuner.topology import Regime

FORMAT, VERSION = "moetuner.certificate", "2"

Method = Literal["dual point", "complete dynamic programme"]

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
class Certificate(Frozen):
    """What proves a bound: of a regime's cost, for ``slots`` per device under ``caps`` [L].

    Parameters
    ----------
    fingerprint
        Of the statistics.
    method
        How it proves; only a dual point has ``proofs``.
    cost
        The bound of ``Objective.cost`` that it was written for. Nobody has to believe it.

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

    about: ClassVar[str] = "placements with one copy of each expert"

    fingerprint: str
    regime: Regime
    slots: int
    caps: NDArray[np.uint64]
    method: Method
    cost: int
    proofs: tuple[Proof, ...] = field(default=(), repr=False)

    def save(self, path: str | Path) -> None:
        """Write as safetensors; the file appears whole or not at all."""
        tensors: dict[str, NDArray[Any]] = {"caps": self.caps}
        # The widest type first: then all tensors are aligned.
        for name in sorted(ARRAYS, key=lambda name: -np.dtype(ARRAYS[name]).itemsize):
            for number, proof in enumerate(self.proofs):
                tensors[f"{number}.{name}"] = getattr(proof, name)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "about": self.about,
            "fingerprint": self.fingerprint,
            "regime": self.regime,
            "slots": str(self.slots),
            "method": self.method,
            "cost": str(self.cost),
            "levels": json.dumps([[proof.parts, proof.price] for proof in self.proofs]),
        }
        with replacing(path) as temporary:
            whole = {name: safetensors.whole(array) for name, array in tensors.items()}
            safetensors.write(temporary, whole, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read what ``save`` wrote.

        Raises
        ------
        ValueError
            If the file is truncated, corrupt, of another version, or something else.
        """
        path = Path(path)
        with naming(path):
            try:
                return cls._read(path)
            except (KeyError, TypeError, ValueError) as error:
                what = str(error).removeprefix(f"{path}: ")
                raise ValueError(f"not a certificate: {what}") from None

    @classmethod
    def _read(cls, path: Path) -> Certificate:
        header = safetensors.read_header(path)
        metadata: dict[str, Any] = dict(header.metadata)
        for name, wanted in (("format", FORMAT), ("version", VERSION), ("about", cls.about)):
            if metadata.get(name) != wanted:
                raise ValueError(f"{name} must be {wanted!r}, got {metadata.get(name)!r:.60}")
        regime, method = metadata["regime"], metadata["method"]
        for name, text, known in (
            ("regime", regime, get_args(Regime)),
            ("method", method, get_args(Method)),
        ):
            if text not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {text!r:.60}")

        def array(name: str, dtype: Any) -> NDArray[Any]:
            """Read an array of one dimension and just this type."""
            place = header.tensor(name)
            if len(place.shape) != 1 or place.dtype != dtype:
                wanted = f"{np.dtype(dtype)} of one dimension"
                raise ValueError(f"{name} must be {wanted}, got {place.dtype} {list(place.shape)}")
            return safetensors.read(path, place)

        proofs = [
            Proof(*level, *(array(f"{number}.{name}", ARRAYS[name]) for name in ARRAYS))
            for number, level in enumerate(json.loads(metadata["levels"]))
        ]
        return cls(
            metadata["fingerprint"],
            regime,
            _count("slots", metadata["slots"]),
            array("caps", np.uint64),
            method,
            _count("cost", metadata["cost"]),
            tuple(proofs),
        )


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name} must be a whole number, got {text!r:.60}")
    return int(text)
