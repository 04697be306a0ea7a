"""A weight that stays as it was coded and is decoded anew for each use: exact, whatever the codec.

For what a codec cannot give as integers times scales, such as the lossless one. Memory holds the coded
bytes, and one buffer that all such weights share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from waterfill.runtime.arrays import unpack
from waterfill.types import DTYPES, Array, Encoded, Floats, Spec, TensorInfo, to_float32

__all__ = ["StreamMatrix"]


class StreamMatrix:
    """A coded tensor as a matrix (m outputs, n inputs).

    Parameters
    ----------
    encoded : a tensor of two axes, its parts in memory
    transposed : whether it is stored as (n, m); the tensor's own word if not given
    """

    def __init__(self, encoded: Encoded, transposed: bool | None = None) -> None:
        info = encoded.info
        self.encoded = encoded
        self.transposed = info.transposed if transposed is None else transposed
        self.shape = info.shape[::-1] if self.transposed else info.shape
        self.nbytes = encoded.nbytes

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of the buffer that `decode` fills."""
        return self.encoded.info.nbytes

    def decode(self, buffer: Array) -> Array:
        """Stored bits (m, n), a view of `buffer`: uint8 (at least `scratch_nbytes`,)."""
        info = self.encoded.info
        out = buffer[: info.nbytes].view(DTYPES[info.dtype]).reshape(info.shape)
        unpack(self.encoded, out)
        return out.T if self.transposed else out

    def apply(self, x: Floats) -> Floats:
        """Float32 (batch, n) -> float32 (batch, m), in a buffer of its own."""
        bits = self.decode(np.empty(self.scratch_nbytes, np.uint8))
        return x @ to_float32(bits, self.encoded.info.dtype).T

    @property
    def arrays(self) -> Mapping[str, Array]:
        """All it holds, as arrays of bytes; they share its memory."""
        encoded, info = self.encoded, self.encoded.info
        about: dict[str, Any] = {
            "spec": encoded.spec.to_json(),
            "extra": dict(encoded.extra),
            "info": [info.name, list(info.shape), info.dtype, info.kind, info.transposed],
            "transposed": self.transposed,
        }
        parts = {f"part_{name}": np.frombuffer(p, np.uint8) for name, p in encoded.parts.items()}
        return {"about": np.frombuffer(json.dumps(about).encode(), np.uint8), **parts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Inverse of `arrays`."""
        about = json.loads(arrays["about"].tobytes())
        name, shape, dtype, kind, transposed = about["info"]
        info = TensorInfo(name, tuple(shape), dtype, kind, transposed=transposed)
        parts = {
            key.removeprefix("part_"): array.tobytes()
            for key, array in arrays.items()
            if key != "about"
        }
        return cls(
            Encoded(Spec.from_json(about["spec"]), info, parts, about["extra"]), about["transposed"]
        )
