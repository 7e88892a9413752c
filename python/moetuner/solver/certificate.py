"""Certificate: the numbers from which a bound can be recomputed, without trusting who found it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from moetuner._files import replacing, size_of

FORMAT = "moetuner.certificate"
ARRAYS = {
    "lambda_": np.float64,
    "columns": np.float64,
    "multipliers": np.float64,
    "cuts": np.int32,
    "choices": np.uint8,
    "contents": np.float64,
}


@dataclass(frozen=True, eq=False)
class Proof:
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


@dataclass(frozen=True, eq=False)
class Certificate:
    """What proves a bound on given statistics: for ``slots`` per device under ``caps`` [L]."""

    fingerprint: str
    slots: int
    caps: NDArray[np.uint64]
    proofs: tuple[Proof, ...]

    def save(self, path: str | Path) -> None:
        """Write as safetensors; the file appears whole or not at all."""
        tensors: dict[str, NDArray[np.generic]] = {"caps": self.caps}
        for number, proof in enumerate(self.proofs):
            for name in ARRAYS:
                tensors[f"{number}.{name}"] = np.ascontiguousarray(getattr(proof, name))
        metadata = {
            "format": FORMAT,
            "version": "1",
            "fingerprint": self.fingerprint,
            "slots": str(self.slots),
            "levels": json.dumps([[proof.parts, proof.price] for proof in self.proofs]),
        }
        with replacing(path) as temporary:
            temporary.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read what ``save`` wrote.

        Raises
        ------
        ValueError
            If the file is truncated, corrupt, or something else.
        """
        size_of(Path(path))
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"format must be {FORMAT!r}, got {metadata.get('format')!r}")
                levels = json.loads(metadata["levels"])
                proofs = [
                    Proof(
                        int(parts),
                        int(price),
                        *(
                            np.ascontiguousarray(file.get_tensor(f"{number}.{name}"), dtype=dtype)
                            for name, dtype in ARRAYS.items()
                        ),
                    )
                    for number, (parts, price) in enumerate(levels)
                ]
                caps = np.ascontiguousarray(file.get_tensor("caps"), dtype=np.uint64)
                slots = int(metadata["slots"])
                return cls(metadata["fingerprint"], slots, caps, tuple(proofs))
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a certificate: {error}") from None
