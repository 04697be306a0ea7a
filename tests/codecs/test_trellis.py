"""Codec trellis: what its bytes may not say."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tests.coding.test_rans import PATHS
from waterfill.codecs.trellis import Trellis
from waterfill.coding.sections import join, split
from waterfill.types import FormatError, TensorInfo, Weighting

INFO = TensorInfo("w", (30, 20), "F32", "linear")


def sections(codec: Trellis, info: TensorInfo = INFO) -> list[bytes]:
    weight = np.random.default_rng(0).normal(size=info.shape).astype(np.float32)
    return split(codec.encode(weight, info, Weighting())[0]["codes"], 4)


def test_gains_are_finite_and_as_many_as_columns() -> None:
    columns, rows, gains, path = sections(Trellis(gains=True))
    assert len(gains) == 40
    for wrong in (gains[:-2], gains + gains, b"\0\x7c" * 20, b"\0\x7e" + gains[2:]):
        with pytest.raises(FormatError, match="gain"):
            Trellis().decode({"codes": join([columns, rows, wrong, path])}, {}, INFO)


@pytest.mark.parametrize("path", PATHS)
def test_weights_beyond_float32_are_infinite(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """No warning and no NaN, whatever steps and gains a file claims."""
    _, _, _, codes = sections(Trellis(states=4))
    monkeypatch.setenv("WATERFILL_SIMD", path)
    top = bytes([0x80 | (2 * 504 & 0x7F), 2 * 504 >> 7, 0]) + b"\xff\xff\xf0"  # all of 2^126
    parts = {"codes": join([top, b"", b"", codes])}
    for dtype in ("F32", "BF16", "F16", "F64"):
        info = TensorInfo("w", (30, 20), dtype)
        values = info.matrix(Trellis(states=4).decode(parts, {}, info))
        assert np.isinf(values).any() and not np.isnan(values).any()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 1 << 40), (1 << 40, 0, 3)])
def test_nothing_is_said_in_nothing(shape: tuple[int, ...]) -> None:
    info = TensorInfo("w", shape, "BF16", "linear")
    decoded = Trellis().decode({"codes": bytes(3)}, {}, info)
    assert decoded.shape == shape and decoded.dtype == np.uint16
    with pytest.raises(FormatError):
        Trellis().decode({"codes": b"\1\0\0\0"}, {}, info)


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 20), (1, 1 << 40), (1 << 40, 1), (1 << 31, 64)])
def test_a_large_shape_in_few_bytes_is_refused_before_it_is_made(shape: tuple[int, int]) -> None:
    parts = {"codes": join(sections(Trellis()))}
    tracemalloc.start()
    with pytest.raises(FormatError, match="promised"):
        Trellis().decode(parts, {}, TensorInfo("w", shape, "BF16", "linear"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
