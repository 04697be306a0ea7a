"""Packed matrices: exact weights, rounded activations, and every implementation to the same bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.coding.test_rans import PATHS
from waterfill.coding import native
from waterfill.coding.matrix import MAX_BATCH
from waterfill.coding.packed import PackedMatrix
from waterfill.coding.packed_layout import MAX_COLUMNS, WIDTHS, misfits, widths_of
from waterfill.registry import make_codec
from waterfill.types import (
    DTYPES,
    Integers,
    Spec,
    SpecError,
    TensorInfo,
    Weighting,
    from_float32,
    to_float32,
)

COMMON = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([128, 129, 255, 320]))


def grouped(m: int, n: int, bits: int, group: int, seed: int, half: bool = True) -> Integers:
    """Integers of one width with a scale for each row and group, as `integer` has them."""
    random = np.random.default_rng(seed)
    levels = random.integers(-(1 << bits - 1), 1 << bits - 1, (m, n)).astype(np.int8)
    rows = random.normal(0, 0.01, (m, -(-n // group))).astype(np.float16 if half else np.float32)
    spread = np.full(n, 2.0**bits / 4, np.float32)
    ones = np.ones(n, np.float32)
    return Integers(levels, ones, rows.astype(np.float32), group, 1, spread, bits)


def columnwise(m: int, n: int, spread: float, seed: int, tails: bool = True) -> Integers:
    """Integers with a step for each column and no bound, as `trellis` has them."""
    random = np.random.default_rng(seed)
    spreads = (spread * 2 ** random.normal(0, 0.8, n)).astype(np.float32)
    values = random.standard_t(5, (m, n)) * 0.6**0.5 if tails else random.normal(size=(m, n))
    levels = np.rint(values * spreads)
    if tails:
        levels[random.random((m, n)) < 0.002] *= 40
    steps = (0.05 / spreads * (1 + random.random(n))).astype(np.float32)
    rows = (0.5 + random.random((m, 1))).astype(np.float32)
    kind = np.int16 if seed % 2 else np.int32
    return Integers(levels.astype(kind), steps, rows, n, 1, spreads)


MATRICES = st.one_of(
    st.builds(
        grouped, SIZES, SIZES, st.integers(2, 8), st.sampled_from([32, 64, 96, 128, 160, 1024]),
        st.integers(0, 999), st.booleans(),
    ),
    st.builds(columnwise, SIZES, SIZES, st.sampled_from([0.1, 0.7, 2.0, 9.0]), st.integers(0, 999)),
)  # fmt: skip


def build(integers: Integers) -> PackedMatrix:
    packed = PackedMatrix.build(integers, "F32")
    assert packed is not None
    return packed


def activations(batch: int, n: int, dtype: str, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_t(3, (batch, n)).astype(np.float32)
    return from_float32(values, dtype)


def product(packed: PackedMatrix, x: Any, dtype: str, threads: int = 1) -> Any:
    y = np.empty((len(x), packed.shape[0]), DTYPES[dtype])
    packed.matmul(x.ctypes.data, dtype, y.ctypes.data, len(x), threads)
    return y


@COMMON
@given(integers=MATRICES)
def test_every_implementation_packs_the_same_arrays(simd: Any, integers: Integers) -> None:
    seen = set()
    for path in PATHS:
        simd(path)
        for threads in (1, 3):
            packed = PackedMatrix.build(integers, "F32", threads)
            arrays = {} if packed is None else packed.arrays
            seen.add(tuple((k, str(a.dtype), a.tobytes()) for k, a in sorted(arrays.items())))
    assert len(seen) == 1


@COMMON
@given(integers=MATRICES, data=st.data())
def test_weights_are_exact(simd: Any, integers: Integers, data: st.DataObject) -> None:
    packed, (m, n) = build(integers), integers.shape
    want = integers.values()
    last = data.draw(st.integers(0, m))
    first = data.draw(st.integers(0, last))
    indices = np.array(data.draw(st.lists(st.integers(0, m - 1), max_size=20)), np.int64)
    for path in PATHS:
        simd(path)
        for kind, whole in ((np.float32, want), (np.uint16, from_float32(want, "BF16"))):
            out = np.empty((last - first, n), kind)
            packed.rows(first, last, out)
            assert np.array_equal(out, whole[first:last]), path
            out = np.empty((len(indices), n), kind)
            packed.gather(indices, out)
            assert np.array_equal(out, whole[indices]), path


@COMMON
@given(
    integers=MATRICES,
    batch=st.integers(1, MAX_BATCH),
    rounding=st.sampled_from(["int8", "int16"]),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
)
def test_every_implementation_multiplies_to_the_same_bit(
    simd: Any, integers: Integers, batch: int, rounding: Any, dtype: str
) -> None:
    packed = build(integers).using(rounding)
    x = activations(batch, integers.shape[1], dtype)
    results = []
    for path in PATHS:
        simd(path)
        results += [product(packed, x, dtype, threads) for threads in (1, 3)]
    assert all(r.tobytes() == results[0].tobytes() for r in results)
    values, weights = to_float32(x, dtype).astype(np.float64), integers.values().astype(np.float64)
    most = 127 if rounding == "int8" else 127 * 256
    half = np.abs(values * integers.columns).max(axis=1) / most / 2  # of a level, at most
    bound = half[:, None] * np.abs(weights / integers.columns).sum(axis=1)
    bound += 1e-5 * np.abs(values) @ np.abs(weights.T) + 1e-7
    exact = values @ weights.T
    bound += {"F32": 0, "BF16": 2.0**-8, "F16": 2.0**-11}[dtype] * (np.abs(exact) + bound)
    assert (np.abs(to_float32(results[0], dtype) - exact) <= bound).all()


def relative(got: Any, want: Any) -> float:
    """Error relative to the norm of what is wanted."""
    return float(np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0))


@pytest.mark.parametrize("path", PATHS)
def test_error_of_the_product_is_that_of_rounded_activations(simd: Any, path: str) -> None:
    simd(path)
    x = np.random.default_rng(7).normal(size=(4, 1024)).astype(np.float32)
    for integers in (grouped(256, 1024, 4, 128, 1), columnwise(256, 1024, 1.5, 1)):
        packed = build(integers)
        exact = x.astype(np.float64) @ integers.values().T.astype(np.float64)
        assert 0.003 < relative(packed.apply(x), exact) < 0.012
        fine = relative(packed.using("int16").apply(x), exact)
        rounded = to_float32(from_float32(x, "BF16"), "BF16").astype(np.float64)
        assert fine < 5e-5 < relative(rounded @ integers.values().T.astype(np.float64), exact)


def test_a_small_product_by_hand(simd: Any) -> None:
    # One chunk of 127 times a number rounds to the number: products are whole.
    integers = dataclasses.replace(grouped(3, 40, 3, 40, 0), rows=np.full((3, 1), 0.5, np.float32))
    x = np.random.default_rng(1).integers(-127, 128, (2, 40)).astype(np.float32)
    x[:, 7] = 127
    want = (x @ integers.levels.T.astype(np.float32)) / 2  # type: ignore[union-attr]
    for path in PATHS:
        simd(path)
        assert np.array_equal(build(integers).apply(x), want), path


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_layout_field_by_field(simd: Any, bits: int) -> None:
    """`docs/packed.md` once more, one code at a time."""
    integers = grouped(40, 70, bits, 70, bits)
    levels: Any = integers.levels
    tiles, blocks = 3, 3
    codes = build(integers).arrays["codes"].reshape(blocks, tiles, bits, 64)
    for row, column in ((0, 0), (5, 37), (15, 31), (16, 32), (39, 69), (21, 4), (33, 18)):
        tile, place = codes[row // 16, column // 32], column % 32
        code, below, vector = 0, 0, 0
        for width in (8, 4, 2, 1):
            if bits & width:
                four, field = divmod(place // 4, 8 // width)
                byte = int(tile[vector + four, 4 * (row % 16) + place % 4])
                code |= (byte >> field * width & (1 << width) - 1) << below
                vector, below = vector + width, below + width
        assert code - (1 << bits - 1) == levels[row, column]


def test_corrections_word_by_word() -> None:
    integers = grouped(20, 64, 8, 64, 1)
    levels = np.zeros((20, 64), np.int32)
    levels[18, 33], levels[3, 5], levels[3, 4] = 2000, -4, 9
    integers = dataclasses.replace(
        integers, levels=levels, bits=0, spread=np.full(64, 0.3, np.float32)
    )
    arrays = build(integers).arrays
    assert arrays["layout"].tolist() == [20, 64, 64, 2, 64]
    assert arrays["starts"].tolist() == [0, 2, 6]
    words = [(int(w) >> 14, int(w) >> 10 & 15, (int(w) & 1023) - 512) for w in arrays["corrections"]]  # fmt: skip
    assert words == [(4, 3, 8), (5, 3, -2), (33, 2, 466), *[(33, 2, 511)] * 3]


def test_widths_follow_the_spread_alone() -> None:
    spread = np.exp2(np.linspace(-6, 7, 400)).astype(np.float32)
    widths = widths_of(spread)
    assert (np.diff(widths) >= 0).all() and set(widths) == set(WIDTHS)
    assert misfits([1.0], 8)[0] < 1e-6 and misfits([1e6], 8)[0] > 0.99
    # Beyond three standard deviations: 0.27 % of a Gaussian, 1.17 % of Student's t as wide.
    assert abs(misfits([1e9], 2)[0] - 1) < 1e-6
    assert misfits([2.5], 4)[0] == pytest.approx((_mean(8.5 / 2.5) + _mean(7.5 / 2.5)) / 2, rel=0.02)  # fmt: skip


def _mean(x: float) -> float:
    """Chance of either sign beyond x, the mean of both distributions, by counting."""
    random = np.random.default_rng(0)
    gauss = np.abs(random.normal(size=1 << 21)) > x
    student = np.abs(random.standard_t(5, 1 << 21)) * 0.6**0.5 > x
    return float((gauss.mean() + student.mean()) / 2)


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5, 12.0])
def test_expected_nbytes(tails: bool, spread: float) -> None:
    random = np.random.default_rng(3)
    m, n = 512, 1000
    spreads = (spread * 2 ** random.normal(0, 0.5, n)).astype(np.float32)
    values = random.standard_t(5, (m, n)) * 0.6**0.5 if tails else random.normal(size=(m, n))
    levels = np.rint(values * spreads).astype(np.int16)
    ones = np.ones((m, 1), np.float32)
    whole = Integers(levels, np.full(n, 0.01, np.float32), ones, n, 1, spreads)
    outline = dataclasses.replace(whole, levels=None)
    assert PackedMatrix.expected_nbytes(outline, 0) == pytest.approx(build(whole).nbytes, rel=0.03)


def test_expected_nbytes_of_a_bounded_width_is_exact() -> None:
    for bits in range(2, 9):
        whole = grouped(45, 500, bits, 128, bits)
        outline = dataclasses.replace(whole, levels=None)
        assert PackedMatrix.expected_nbytes(outline, 0) == build(whole).nbytes
    with pytest.raises(ValueError, match="outline"):
        PackedMatrix.build(outline, "F32")


def test_what_has_no_packed_form() -> None:
    small = grouped(16, 96, 4, 48, 0)
    assert PackedMatrix.build(small, "BF16") is None  # a group that ends within a tile
    assert PackedMatrix.expected_nbytes(dataclasses.replace(small, levels=None), 0) is None
    assert PackedMatrix.build(grouped(16, 96, 4, 32, 0), "F64") is None
    assert PackedMatrix.build(columnwise(64, 256, 4e3, 0), "F32") is None  # larger than float32
    infinite = dataclasses.replace(small, group=96, rows=np.full((16, 1), np.inf, np.float32))
    assert PackedMatrix.build(infinite, "F32") is None
    wide = MAX_COLUMNS + 1
    assert PackedMatrix.build(grouped(1, wide, 2, wide, 0), "F32") is None
    none = dataclasses.replace(
        small, levels=np.zeros((0, 96), np.int8), rows=np.zeros((0, 1), np.float32), group=96
    )
    assert PackedMatrix.build(none, "F32") is None


@pytest.mark.parametrize("path", PATHS)
def test_levels_far_too_large_have_no_packed_form(simd: Any, path: str) -> None:
    simd(path)
    integers = dataclasses.replace(columnwise(64, 256, 2.0, 1), levels=np.full((64, 256), 1 << 23, np.int32))  # fmt: skip
    assert PackedMatrix.build(integers, "F32") is None


@pytest.mark.skipif(native._core is None, reason="encoding needs the native core")
@pytest.mark.parametrize("spec", [Spec("integer", {"bits": 3, "group": 32}), Spec("trellis", {"step": 0.3}), Spec("trellis", {"step": 2.0})])  # fmt: skip
def test_what_codecs_hold_comes_back_as_they_decode_it(spec: Spec) -> None:
    codec = make_codec(Spec(spec.id, spec.config, 2 if spec.id == "trellis" else 1))
    info = TensorInfo("w", (80, 96), "BF16")
    x = from_float32(np.random.default_rng(0).normal(0, 0.02, (80, 96)).astype(np.float32), "BF16")
    parts, extra = codec.encode(x, info, Weighting())
    integers = codec.integers(parts, extra, info)
    assert integers is not None
    packed = PackedMatrix.build(integers, "BF16")
    assert packed is not None
    out = np.empty((80, 96), np.uint16)
    packed.rows(0, 80, out)
    assert np.array_equal(out, codec.decode(parts, extra, info))
    outline = codec.integers(parts, extra, info, outline=True)
    assert outline is not None
    expected = PackedMatrix.expected_nbytes(outline, 0)
    assert expected == pytest.approx(packed.nbytes, rel=0.03)


def test_from_arrays_shares_memory_and_gives_the_same() -> None:
    for integers in (grouped(33, 100, 3, 32, 1, half=False), columnwise(33, 100, 1.0, 1)):
        packed = build(integers)
        again = PackedMatrix.from_arrays(packed.arrays)
        x = activations(3, 100, "F32")
        assert np.array_equal(again.apply(x), packed.apply(x)) and again.nbytes == packed.nbytes
        assert all(np.shares_memory(again.arrays[k], a) for k, a in packed.arrays.items())
        # Bytes that a file was read into may begin anywhere.
        moved = np.empty(packed.arrays["codes"].nbytes + 3, np.uint8)[3:]
        moved[:] = packed.arrays["codes"].reshape(-1)
        shifted = PackedMatrix.from_arrays({**packed.arrays, "codes": moved})
        assert np.array_equal(shifted.apply(x), packed.apply(x))


def damaged(arrays: Any) -> Any:
    """The arrays with one thing wrong, once for each thing."""
    layout, order, starts = arrays["layout"], arrays["order"], arrays["starts"]
    yield {k: a for k, a in arrays.items() if k != "scales"}
    yield {**arrays, "more": layout}
    for name in arrays:
        yield {**arrays, name: arrays[name].reshape(-1)[:-1]}
        yield {**arrays, name: arrays[name].astype(np.complex64)}
    for i in range(len(layout)):
        for value in (0, -1, int(layout[i]) + 32, 1 << 40):
            wrong = layout.copy()
            wrong[i] = value
            yield {**arrays, "layout": wrong}
    wrong = order.copy()
    wrong[0] = wrong[1]
    yield {**arrays, "order": wrong}
    wrong = order.copy()
    wrong[0] = len(order)
    yield {**arrays, "order": wrong}
    wrong = starts.copy()
    wrong[1] = wrong[2] + 1
    yield {**arrays, "starts": wrong}
    wrong = arrays["corrections"].copy()
    wrong[0] |= np.uint32(0xFFFFC000)
    yield {**arrays, "corrections": wrong}
    yield {k: a for k, a in arrays.items() if k != "starts"}


def test_arrays_that_do_not_fit_are_refused() -> None:
    packed = build(columnwise(50, 200, 1.5, 1))
    cases = list(damaged(packed.arrays))
    assert len(cases) > 40
    for i, arrays in enumerate(cases):
        with pytest.raises(ValueError):
            PackedMatrix.from_arrays(arrays)
            pytest.fail(f"case {i} was not refused")


def test_the_kernels_refuse_them_too(simd: Any) -> None:
    core = native._core
    if core is None:
        pytest.skip("no native core")
    packed = build(columnwise(50, 200, 1.5, 1))
    names = ("order", "steps", "starts", "corrections", "table")

    def make(arrays: Any) -> Any:
        scales = arrays["scales"]
        flat, half = scales.reshape(-1).view(np.uint8), scales.dtype == np.float16
        optional = [arrays.get(name) for name in names]
        return core.Packed(arrays["layout"], arrays["codes"].reshape(-1), flat, half, *optional)

    make(packed.arrays)
    refused = 0
    for arrays in damaged(packed.arrays):
        if set(arrays) <= set(packed.arrays) and "scales" in arrays:
            with pytest.raises((ValueError, TypeError)):
                make(arrays)
            refused += 1
    assert refused > 40


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rounding", ["int8", "int16"])
def test_activations_that_are_no_numbers(simd: Any, path: str, rounding: Any) -> None:
    simd(path)
    for integers in (grouped(20, 300, 4, 128, 1), columnwise(20, 300, 1.5, 1)):
        packed = build(integers).using(rounding)
        x = np.random.default_rng(2).normal(size=(6, 300)).astype(np.float32)
        want = packed.apply(x)
        x[1, 5], x[2, 290], x[3, 0] = np.nan, np.inf, -np.inf
        x[4] = 0
        x[5] = 1e-38
        got = packed.apply(x)
        assert np.isnan(got[1:4]).all()  # loud, and only where it belongs
        assert np.array_equal(got[0], want[0])
        assert not got[4].any() and np.abs(got[5]).max() < 1e-30


@pytest.mark.parametrize("path", PATHS)
def test_wrong_use(simd: Any, path: str) -> None:
    simd(path)
    packed = build(grouped(20, 64, 4, 32, 1))
    assert packed.apply(np.zeros((0, 64), np.float32)).shape == (0, 20)
    for x in (np.zeros((1, 63), np.float32), np.zeros(64, np.float32), np.zeros((1, 64))):
        with pytest.raises(ValueError, match="float32"):
            packed.apply(x)  # type: ignore[arg-type]
    x, y = np.zeros((17, 64), np.float32), np.zeros((17, 20), np.float32)
    for batch, dtype in ((0, "F32"), (17, "F32"), (1, "F64"), (1, "I8")):
        with pytest.raises(ValueError):
            packed.matmul(x.ctypes.data, dtype, y.ctypes.data, batch, 1)
    for first, last in ((-1, 3), (0, 21), (5, 4)):
        with pytest.raises(ValueError):
            packed.rows(first, last, np.empty((abs(last - first), 64), np.float32))
    whole = np.zeros((20, 64), np.float32)
    for out in (whole[:19], whole.astype(np.float64), np.empty((20, 128), np.float32)[:, ::2]):
        with pytest.raises(ValueError):
            packed.rows(0, 20, out)
    for index in (-1, 20):
        with pytest.raises(ValueError, match="index"):
            packed.gather(np.array([0, index]), whole[:2])
    with pytest.raises(SpecError, match="int8"):
        packed.using("int4")


def test_more_tokens_than_a_batch(simd: Any) -> None:
    packed = build(grouped(40, 160, 5, 160, 1))
    x = activations(37, 160, "F32")
    want = np.concatenate([packed.apply(row[None]) for row in x])
    for path in PATHS:
        simd(path)
        assert np.array_equal(packed.apply(x), want), path


@pytest.mark.parametrize("path", PATHS)
def test_threads_share_a_large_matrix(simd: Any, path: str) -> None:
    simd(path)
    packed = build(grouped(700, 512, 4, 128, 1))
    x = activations(2, 512, "BF16")
    want = product(packed, x, "BF16", 1)
    for threads in (2, 3, 8):
        assert product(packed, x, "BF16", threads).tobytes() == want.tobytes()


def test_the_environment_says_how_activations_are_rounded(monkeypatch: Any) -> None:
    levels = grouped(20, 64, 4, 32, 1)
    monkeypatch.setenv("WATERFILL_ACTIVATIONS", "int16")
    fine = build(levels)
    assert fine.activations == "int16"
    monkeypatch.delenv("WATERFILL_ACTIVATIONS")
    assert build(levels).activations == "int8"
    monkeypatch.setenv("WATERFILL_ACTIVATIONS", "int4")
    with pytest.raises(SpecError, match="int8 or int16, not 'int4'"):
        build(levels)
