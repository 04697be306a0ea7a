"""A tensor in blocks: cut anywhere it decodes, and never to something worse than a shorter cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.codecs.stack import Stack
from waterfill.types import FormatError, TensorInfo, Weighting, from_float32


def case(
    m: int, n: int, codec: Stack, dtype: str = "F32", transposed: bool = False
) -> tuple[TensorInfo, Any, Weighting, dict[str, bytes], dict[str, Any]]:
    random = np.random.default_rng(m * 1000 + n)
    shape = (n, m) if transposed else (m, n)
    info = TensorInfo("w", shape, dtype, "linear", transposed=transposed)
    bits = from_float32(random.normal(0, 0.02, shape).astype(np.float32), dtype)
    inputs = random.normal(size=(2 * n, n)) * np.linspace(0.3, 3, n)
    moment = (inputs.T @ inputs / (2 * n)).astype(np.float32)
    weighting = Weighting(moment, np.linspace(0.5, 2, m).astype(np.float32))
    return info, bits, weighting, *codec.encode(bits, info, weighting)


def sizes(parts: Mapping[str, bytes]) -> dict[str, int]:
    return {name: len(part) for name, part in parts.items()}


def cut(
    codec: Stack,
    parts: Mapping[str, bytes],
    extra: Mapping[str, Any],
    info: TensorInfo,
    nbytes: int,
) -> dict[str, bytes]:
    lengths = codec.truncate(sizes(parts), extra, info, nbytes)
    return {name: parts[name][:length] for name, length in lengths.items()}


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 20),
    blocks=st.floats(0.05, 4),
    rank=st.integers(1, 3),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    transposed=st.booleans(),
    share=st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_any_cut_decodes(
    m: int, n: int, blocks: float, rank: int, dtype: str, transposed: bool, share: float
) -> None:
    codec = Stack(blocks=blocks, rank=rank)
    info, _, _, parts, extra = case(m, n, codec, dtype, transposed)
    layers = codec.layers(sizes(parts), extra, info)
    whole = sum(sizes(parts).values())
    assert layers[-1] == (whole, pytest.approx(extra["nats"][-1], rel=1e-3))
    asked = int(share * whole)
    kept = cut(codec, parts, extra, info, asked)
    nbytes = sum(sizes(kept).values())
    assert nbytes <= max(asked, layers[0][0])
    assert codec.decode(kept, extra, info).shape == info.shape
    # A cut of a cut is a cut, and what there is can be kept whole.
    assert cut(codec, kept, extra, info, nbytes) == kept
    assert codec.layers(sizes(kept), extra, info)[-1][0] == nbytes
    assert cut(codec, parts, extra, info, whole) == parts


def test_a_cut_is_short_by_less_than_a_row() -> None:
    codec = Stack(blocks=3.0)
    info, _, _, parts, extra = case(40, 64, codec)
    (least, _), *_, (whole, _) = codec.layers(sizes(parts), extra, info)
    right, record = 4 + 64, 1 + 1 + 8
    for asked in range(least, whole):
        kept = sum(sizes(cut(codec, parts, extra, info, asked)).values())
        assert asked - (right + record) < kept <= asked


def test_rows_that_are_kept_are_as_in_the_whole_and_harm_falls_row_by_row() -> None:
    codec = Stack(blocks=3.0)
    info, bits, weighting, parts, extra = case(30, 48, codec)
    layers = codec.layers(sizes(parts), extra, info)
    whole, before = codec.decode(parts, extra, info), np.inf
    for asked in range(layers[0][0], layers[-1][0] + 1, 16):
        kept = cut(codec, parts, extra, info, asked)
        decoded = codec.decode(kept, extra, info)
        harm = weighting.distortion(bits, decoded)
        assert harm <= before * (1 + 1e-6)
        before = harm
        rows = sizes(kept).get("layer3", 0) // (1 + 6)
        assert decoded[:rows].tobytes() == whole[:rows].tobytes()


def test_stored_harm_is_that_of_what_decodes() -> None:
    codec = Stack(blocks=3.0)
    info, bits, weighting, parts, extra = case(64, 64, codec)
    layers = codec.layers(sizes(parts), extra, info)
    for nbytes, nats in layers:
        decoded = codec.decode(cut(codec, parts, extra, info, nbytes), extra, info)
        assert weighting.distortion(bits, decoded) == pytest.approx(nats, rel=1e-3)
    between = (layers[1][0] + layers[2][0]) // 2
    kept = cut(codec, parts, extra, info, between)
    told = codec.layers(sizes(kept), extra, info)[-1][1]
    real = weighting.distortion(bits, codec.decode(kept, extra, info))
    assert real == pytest.approx(told, rel=0.15)


def test_fewer_blocks_are_a_prefix_of_more() -> None:
    info, bits, weighting, parts, extra = case(20, 33, Stack(blocks=4.0))
    for count in (1, 2, 3):
        nbytes = Stack(blocks=4.0).layers(sizes(parts), extra, info)[count][0]
        fewer, _ = Stack(blocks=4.0).at(count).encode(bits, info, weighting)
        assert cut(Stack(blocks=4.0), parts, extra, info, nbytes) == fewer


def test_signs_by_descent_harm_less() -> None:
    harms = []
    for sweeps in (0, 1, 4):
        codec = Stack(blocks=2.0, sweeps=sweeps)
        info, bits, weighting, parts, extra = case(96, 64, codec)
        harms.append(weighting.distortion(bits, codec.decode(parts, extra, info)))
    assert harms[2] < harms[1] < harms[0]


def test_bytes_that_lie_are_refused() -> None:
    codec = Stack(blocks=3.0)
    info, _, _, parts, extra = case(10, 13, codec)
    record, right = 1 + 2, 4 + 13
    columns, first, second, third = (parts[n] for n in ("columns", "layer1", "layer2", "layer3"))
    padding = second[:2] + bytes([second[2] | 0x80]) + second[3:]
    infinite = columns[: -3 * right] + b"\x00\x00\x80\x7f" + columns[4 - 3 * right :]
    lies: list[dict[str, bytes]] = [
        {**parts, "layer2": second[:-1]},
        {**parts, "layer2": second + second[:record]},
        {**parts, "layer2": second[:record]},
        {**parts, "layer3": b""},
        {**parts, "layer4": third},
        {"columns": columns, "layer1": first, "layer3": third},
        {"columns": columns, "layer1": first, "layer2": second},
        {**parts, "columns": columns + b"\x00"},
        {**parts, "columns": columns[:-1]},
        {**parts, "columns": infinite},
        {**parts, "layer2": padding},
        {**parts, "more": b""},
    ]
    for lie in lies:
        with pytest.raises(FormatError):
            codec.decode(lie, extra, info)
    unlikely = ([float("nan")] * 4, [float("inf")] * 4, [10**400] * 4)
    for nats in ([], [1.0, 2.0], "none", None, 5, {"4": 1.0}, ["1", "2", "3", "4"], *unlikely):
        with pytest.raises(FormatError):
            codec.layers(sizes(parts), {"nats": nats}, info)
    with pytest.raises(FormatError):
        codec.layers({**sizes(parts), "columns": 3}, extra, info)


def test_harm_beyond_float32_is_told_as_a_number() -> None:
    info = TensorInfo("w", (6, 5), "F32", "linear")
    bits = np.full(info.shape, 1e38, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        parts, extra = Stack().encode(bits, info, Weighting(np.full(5, 1e30, np.float32)))
    assert np.isfinite(extra["nats"]).all() and Stack().layers(sizes(parts), extra, info)


def test_weights_whose_squares_float32_does_not_hold() -> None:
    info = TensorInfo("w", (12, 9), "F32", "linear")
    bits = np.random.default_rng(3).normal(0, 1e25, info.shape).astype(np.float32)
    decoded = Stack().decode(*Stack().encode(bits, info, Weighting()), info)
    assert np.abs(bits - decoded).max() < 0.5 * np.abs(bits).max()
