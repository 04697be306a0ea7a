"""The codec around another: what it stores of it, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.registry import parse_spec
from waterfill.testing import samples
from waterfill.types import FormatError, SpecError, TensorInfo, Weighting


@pytest.mark.parametrize(
    "text",
    [
        "affine:block=0",
        "affine:block=65",
        "affine:inner=lossless",
        "affine:inner=nothing",
        "affine:inner=(affine:block=2)",
    ],
)
def test_what_it_cannot_be_around_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(text)


def test_versions_and_extras_that_lie_are_refused() -> None:
    info, bits, weighting = next(samples("BF16"))
    codec = parse_spec("affine:block=2,inner=(integer:bits=3,group=16)")
    parts, extra = codec.encode(bits, info, weighting)
    assert set(parts) == set(codec.parts) == {"transform", "codes", "scales"}
    version = codec.inner.codec.version
    assert extra == {"version": version, "inner": {"exponent": extra["inner"]["exponent"]}}
    for lie in ({}, {**extra, "version": 99}, {**extra, "version": "1"}, {**extra, "inner": None}):
        with pytest.raises(FormatError):
            codec.decode(parts, lie, info)
    with pytest.raises(FormatError):
        codec.decode({**parts, "transform": b""}, extra, info)


def test_a_matrix_of_zeros_has_no_transform() -> None:
    info = TensorInfo("w", (8, 8), "F32")
    parts, _ = parse_spec("affine").encode(np.zeros((8, 8), np.float32), info, Weighting())
    assert "transform" not in parts


def test_columns_of_unequal_size_are_better_off_scaled() -> None:
    random = np.random.default_rng(0)
    info = TensorInfo("w", (256, 64), "F32", "linear")
    size = random.lognormal(0, 1.5, 64)
    bits = (random.normal(size=info.shape) * size).astype(np.float32)
    weighting = Weighting((1 / size**2).astype(np.float32))
    harms = []
    for text in ("integer:bits=3", "affine:block=1,inner=(integer:bits=3)"):
        codec = parse_spec(text)
        parts, extra = codec.encode(bits, info, weighting)
        harms.append(weighting.distortion(bits, codec.decode(parts, extra, info)))
    assert harms[1] < 0.4 * harms[0]
