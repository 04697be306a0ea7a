"""Every codec tried on one small matrix: its usual rates and its speed on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from waterfill.registry import Codec, codec_ids, find_codec
from waterfill.types import TensorInfo, Weighting, from_float32

SHAPE = (256, 512)


def survey() -> Iterator[tuple[dict[str, Any], int]]:
    """One row for each codec, and how many rows there will be.

    The matrix is Gaussian, in bfloat16, its inputs correlated. ``bits_per_weight`` are those of the
    ladder, in order; speeds are of its middle rung.
    """
    random = np.random.default_rng(0)
    m, n = SHAPE
    info = TensorInfo("weight", SHAPE, "BF16", "linear")
    bits = from_float32(random.normal(0, 0.02, SHAPE).astype(np.float32), info.dtype)
    inputs = random.normal(size=(2 * n, n)) @ (np.eye(n) + 0.5 * np.eye(n, k=1))
    weighting = Weighting((inputs.T @ inputs / (2 * n)).astype(np.float32), np.ones(m, np.float32))
    names = codec_ids()
    for name in names:
        cls = find_codec(name)
        rungs = list(cls.ladder(info))
        tried = [_try(rung, info, bits, weighting) for rung in rungs]
        middle = tried[len(tried) // 2]
        yield (
            {
                "id": name,
                "version": cls.version,
                "lossy": cls.lossy,
                "usual": cls.usual,
                "options": dict(cls().spec.config),
                "about": (cls.__doc__ or "").strip().splitlines()[0],
                "bits_per_weight": [round(8 * one[0] / info.size, 3) for one in tried],
                "encode_weights_per_second": info.size / middle[1],
                "decode_weights_per_second": info.size / middle[2],
            },
            len(names),
        )


def _try(
    rung: Codec, info: TensorInfo, bits: Any, weighting: Weighting
) -> tuple[int, float, float]:
    """Bytes, seconds to encode, seconds to decode."""
    began = time.perf_counter()
    parts, extra = rung.encode(bits, info, weighting)
    encode_seconds = time.perf_counter() - began
    decode_seconds = math.inf
    for _ in range(3):  # the first makes tables that others find
        began = time.perf_counter()
        rung.decode(parts, extra, info)
        decode_seconds = min(decode_seconds, time.perf_counter() - began)
    return sum(map(len, parts.values())), encode_seconds, decode_seconds
