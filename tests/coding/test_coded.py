"""Coded matrices: exact weights from every implementation, products within float32's rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from waterfill.coding import native
from waterfill.coding.coded import CodedMatrix
from waterfill.coding.coded_models import decoding_table, odd
from waterfill.coding.trellis import CODES, SEGMENT
from waterfill.registry import parse_spec
from waterfill.types import Integers, TensorInfo, Weighting, from_float32, to_float32

PATHS = [*(native._core.simd_available() if native._core else []), "numpy"]
COMMON = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EPSILON = 2.0**-22  # of the sum of |w x|: what float32 loses over a few partial sums


def levels_of_path(wanted: Any, states: int) -> Any:
    """Points of a trellis path near `wanted`, int (m, n)."""
    feedback, source = CODES.get(states, (0, 0))
    state, out = np.zeros(wanted.shape[1], np.int64), np.empty(wanted.shape, np.int64)
    for row, v in enumerate(wanted):
        if states == 1:
            out[row] = np.rint(v)
            continue
        if row % SEGMENT == 0:
            state[:] = 0
        grid = state & 1
        out[row] = 2 * np.rint((v - grid) / 2).astype(np.int64) + grid
        k = (out[row] + grid * np.sign(out[row])) // 2
        state = state >> 1 ^ feedback * grid ^ source * (k & 1)
    return out


def sample(
    m: int,
    n: int,
    states: int = 64,
    spread: float = 2.0,
    group: int = 0,
    seed: int = 0,
    uneven: float = 0.5,
) -> Integers:
    """Levels of uneven columns and rows, a few of them far out."""
    random = np.random.default_rng(seed)
    columns = spread * np.exp(random.normal(0, uneven, n))
    wanted = random.standard_normal((m, n)) * columns * np.exp(random.normal(0, 0.3, (m, 1)))
    wanted[random.random((m, n)) < 1 / 300] *= 20
    levels = levels_of_path(np.clip(wanted, -1e6, 1e6), states)
    extreme = np.abs(levels).max()
    width = np.int8 if extreme < 128 else np.int16 if extreme < 32768 else np.int32
    groups = -(-n // group) if group else 1
    scales = np.exp2(random.integers(-3, 4, (m, groups)) / 2).astype(np.float32)
    steps = np.exp(random.normal(-4, 0.5, n)).astype(np.float32)
    steps *= np.where(random.random(n) < 0.1, -1, 1).astype(np.float32)
    return Integers(
        levels.astype(width), steps, scales, group or n, states, columns.astype(np.float32)
    )


def exact(integers: Integers, dtype: str) -> Any:
    return to_float32(from_float32(integers.values(), dtype), dtype)


def build(integers: Integers, dtype: str = "BF16") -> CodedMatrix:
    matrix = CodedMatrix.build(integers, dtype)
    assert matrix is not None
    assert matrix.nbytes == sum(a.nbytes for a in matrix.arrays.values())
    return matrix


def rows_of(matrix: CodedMatrix, first: int, last: int, dtype: Any = np.float32) -> Any:
    out = np.full((last - first, matrix.shape[1]), 77, dtype)
    matrix.rows(first, last, out)
    return out


def product(matrix: CodedMatrix, x: Any, dtype: str, threads: int = 2) -> Any:
    stored = np.ascontiguousarray(from_float32(x, dtype))
    y = np.empty((len(x), matrix.shape[0]), stored.dtype)
    matrix.matmul(stored.ctypes.data, dtype, y.ctypes.data, len(x), threads)
    return to_float32(y, dtype)


def same_bits(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))


@COMMON
@given(
    m=st.sampled_from([1, 2, 31, 33, 64, 75]),
    n=st.sampled_from([1, 17, 127, 128, 129, 256, 300]),
    states=st.sampled_from([1, *CODES]),
    spread=st.sampled_from([0.2, 0.7, 2.0, 9.0, 40.0, 3000.0]),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    seed=st.integers(0, 5),
)
def test_every_implementation_gives_the_exact_weights(
    simd: Any, m: int, n: int, states: int, spread: float, dtype: str, seed: int
) -> None:
    integers = sample(m, n, states, spread, seed=seed)
    want = exact(integers, dtype)
    x = np.random.default_rng(seed).standard_normal((2, n)).astype(np.float32)
    bound = EPSILON * (np.abs(x).astype(np.float64) @ np.abs(want.T.astype(np.float64))) + 1e-30
    made = set()
    for path in PATHS:
        simd(path)
        matrix = build(integers, dtype)
        made.add(b"".join(matrix.arrays[k].tobytes() for k in sorted(matrix.arrays)))
        assert same_bits(rows_of(matrix, 0, m), want), path
        halves = rows_of(matrix, 0, m, np.uint16)
        assert np.array_equal(halves, from_float32(want, "BF16")), path
        off = np.abs(matrix.apply(x) - x.astype(np.float64) @ want.T.astype(np.float64))
        assert (off <= bound).all(), path
    assert len(made) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "ulp"), [("F32", 2.0**-24), ("BF16", 2.0**-8), ("F16", 2.0**-11)]
)
def test_products_of_every_dtype_and_batch(simd: Any, path: str, dtype: str, ulp: float) -> None:
    simd(path)
    integers = sample(70, 300, spread=3.0)
    random = np.random.default_rng(1)
    for stored in ("F32", "BF16", "F16"):
        matrix, want = build(integers, stored), exact(integers, stored).astype(np.float64)
        for batch in (1, 2, 3, 4, 7, 16) if path != "numpy" else (1, 5):
            x = random.standard_normal((batch, 300)).astype(np.float32)
            x = to_float32(from_float32(x, dtype), dtype)
            y, size = x.astype(np.float64) @ want.T, np.abs(x) @ np.abs(want.T)
            off = np.abs(product(matrix, x, dtype) - y)
            assert (off <= EPSILON * size + ulp * (np.abs(y) + EPSILON * size)).all()


@pytest.mark.parametrize("path", PATHS[:-1])
def test_blocks_and_threads_change_nothing(simd: Any, path: str) -> None:
    simd(path)
    integers = sample(2100, 900, spread=2.0)
    matrix = build(integers)
    assert matrix.layout.blocks > 8
    for threads in (1, 2, 5):
        other = CodedMatrix.build(integers, "BF16", threads)
        assert other is not None
        for name, array in matrix.arrays.items():
            assert np.array_equal(other.arrays[name], array), name
    want = exact(integers, "BF16")
    assert same_bits(rows_of(matrix, 0, 2100), want)
    for first, last in ((0, 0), (5, 6), (1023, 1025), (1024, 2048), (1500, 2100), (2099, 2100)):
        assert same_bits(rows_of(matrix, first, last), want[first:last])
    x = np.random.default_rng(3).standard_normal((3, 900)).astype(np.float32)
    for dtype in ("F32", "BF16"):
        one = product(matrix, x, dtype, 1)
        for threads in (2, 3, 16):
            assert same_bits(product(matrix, x, dtype, threads), one)
        for token in range(3):
            alone = product(matrix, x[token : token + 1], dtype, 1)
            np.testing.assert_allclose(alone[0], one[token], rtol=2.0**-7, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_scales_of_groups(simd: Any, path: str) -> None:
    simd(path)
    for n, group in ((300, 128), (512, 256), (256, 384)):
        integers = sample(40, n, 1, 5.0, group=group)
        matrix = build(integers, "F16")
        assert same_bits(rows_of(matrix, 0, 40), exact(integers, "F16"))
    assert CodedMatrix.build(sample(40, 300, 1, group=96), "F16") is None
    halves = sample(40, 256, 1, group=128)
    halves = Integers(**{**vars(halves), "rows": halves.rows.astype(np.float16).astype(np.float32)})
    assert build(halves).arrays["scales"].dtype == np.float16
    assert same_bits(rows_of(build(halves), 0, 40), exact(halves, "BF16"))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    "spec", ["trellis:step=0.5", "trellis:step=2.0,states=8,gains=yes", "trellis:step=0.2,states=1",
             "integer:bits=4,solver=nearest", "integer:bits=8,group=256,pack=coded,solver=nearest"]
)  # fmt: skip
def test_what_a_codec_holds_comes_back_as_it_decodes(spec: str, dtype: str) -> None:
    random = np.random.default_rng(4)
    weights = (random.standard_normal((520, 256)) * 0.02).astype(np.float32)
    bits, info = from_float32(weights, dtype), TensorInfo("w", (520, 256), dtype)
    codec = parse_spec(spec)
    weighting = Weighting(
        np.exp(random.normal(0, 0.5, 256)).astype(np.float32),
        np.exp(random.normal(0, 1, 520)).astype(np.float32),
    )
    parts, extra = codec.encode(bits, info, weighting)
    integers = codec.integers(parts, extra, info)
    assert integers is not None
    decoded = codec.decode(parts, extra, info)
    matrix = build(integers, dtype)
    assert same_bits(rows_of(matrix, 0, 520), to_float32(decoded, dtype))
    if dtype == "BF16":
        assert np.array_equal(rows_of(matrix, 0, 520, np.uint16), decoded)


@pytest.mark.parametrize("spec", ["trellis:step=1.0", "trellis:step=0.4", "trellis:step=0.1",
                                  "integer:bits=2,solver=nearest", "integer:bits=4,solver=nearest",
                                  "integer:bits=4,pack=coded,solver=nearest"])  # fmt: skip
def test_the_size_is_known_beforehand(spec: str) -> None:
    m, n = 1024, 1280
    random = np.random.default_rng(5)
    bits = from_float32(random.standard_normal((m, n), np.float32) * np.float32(0.02), "BF16")
    info, codec = TensorInfo("w", (m, n), "BF16"), parse_spec(spec)
    weighting = Weighting(np.exp(random.normal(0, 0.5, n)).astype(np.float32))
    parts, extra = codec.encode(bits, info, weighting)
    integers, outline = (codec.integers(parts, extra, info, outline=o) for o in (False, True))
    assert integers is not None and outline is not None and outline.levels is None
    nbytes = sum(len(p) for p in parts.values())
    matrix = build(integers)
    expected = CodedMatrix.expected_nbytes(outline, nbytes)
    assert expected is not None and abs(expected / matrix.nbytes - 1) < 0.03
    assert matrix.nbytes < 1.08 * nbytes
    with pytest.raises(ValueError, match="outline"):
        CodedMatrix.build(outline, "BF16")


@pytest.mark.parametrize("path", PATHS)
def test_gather(simd: Any, path: str) -> None:
    simd(path)
    integers = sample(1100 if path != "numpy" else 60, 200)
    m, want = integers.shape[0], exact(integers, "BF16")
    matrix = build(integers)
    for indices in ([], [0], [m - 1, 3, 3, 0, m - 1, 17], list(range(0, m, 7)), [5, 4]):
        for dtype in (np.float32, np.uint16):
            out = np.empty((len(indices), 200), dtype)
            matrix.gather(np.array(indices, np.int64), out)
            chosen = want[np.array(indices, np.int64)]
            values = out if dtype == np.float32 else to_float32(out, "BF16")
            assert np.array_equal(values, chosen)
    for wrong in ([-1], [m]):
        with pytest.raises(ValueError, match="beyond"):
            matrix.gather(np.array(wrong), np.empty((1, 200), np.float32))


@pytest.mark.parametrize("path", PATHS)
def test_any_batch_and_none(simd: Any, path: str) -> None:
    simd(path)
    integers = sample(40, 130)
    matrix, want = build(integers, "F32"), exact(integers, "F32")
    x = np.random.default_rng(6).standard_normal((35, 130)).astype(np.float32)
    np.testing.assert_allclose(matrix.apply(x), x @ want.T, rtol=1e-4, atol=1e-4)
    assert matrix.apply(x[:0]).shape == (0, 40)
    x[3, 7] = np.nan
    assert np.isnan(matrix.apply(x)[3]).all() and np.isfinite(matrix.apply(x)[4]).all()


@pytest.mark.parametrize("path", PATHS)
def test_subnormal_weights_are_exact(simd: Any, path: str) -> None:
    simd(path)
    plain = sample(40, 256)
    rows = np.full((40, 1), 2.0**-120, np.float32)
    integers = Integers(**{**vars(plain), "rows": rows})
    want = exact(integers, "BF16")
    assert ((want != 0) & (np.abs(want) < 2.0**-126)).any()
    matrix = build(integers)
    assert matrix.layout.tiny
    assert same_bits(rows_of(matrix, 0, 40), want)
    x = np.full((1, 256), 2.0**60, np.float32)
    y = x.astype(np.float64) @ want.T.astype(np.float64)
    assert np.abs(product(matrix, x, "BF16") - y).max() <= 2.0**-8 * np.abs(y).max()


def test_what_cannot_be_exact_is_refused() -> None:
    integers = sample(40, 130)

    def changed(**fields: Any) -> Integers:
        return Integers(**{**vars(integers), **fields})

    assert CodedMatrix.build(integers, "F64") is None
    assert CodedMatrix.expected_nbytes(changed(levels=None), 1000) is not None
    steps = integers.columns.copy()
    for step in (np.float32(np.inf), np.float32(2.0**-130), np.float32(3e38)):
        steps[3] = step
        assert CodedMatrix.build(changed(columns=steps.copy()), "BF16") is None
    steps[3] = 0
    zero = build(changed(columns=steps.copy()))
    assert not rows_of(zero, 0, 40)[:, 3].any()
    far = integers.levels.astype(np.int32)
    far[0, 0] = 1 << 24
    assert CodedMatrix.build(changed(levels=far), "F32") is None
    assert CodedMatrix.build(changed(columns=steps * np.float32(1e6)), "F16") is None
    wide = Integers(None, np.ones(65537, np.float32), np.ones((1, 1), np.float32), 65537, 1, np.ones(65537, np.float32))  # fmt: skip
    assert CodedMatrix.expected_nbytes(wide, 1) is None


def test_levels_all_alike(simd: Any) -> None:
    for value, states in ((0, 64), (0, 1), (-3, 1), (200, 1)):
        levels = np.full((50, 140), value, np.int16)
        ones, spread = np.ones(140, np.float32), np.zeros(140, np.float32)
        integers = Integers(levels, ones, np.ones((50, 1), np.float32), 140, states, spread)
        for path in PATHS:
            simd(path)
            matrix = build(integers)
            assert same_bits(rows_of(matrix, 0, 50), levels.astype(np.float32))
        assert matrix.arrays["codes"].size < (4000 if value < 100 else 12000)


@pytest.mark.parametrize("path", PATHS)
def test_wrong_arguments(simd: Any, path: str) -> None:
    simd(path)
    matrix = build(sample(40, 130))
    x, y = np.zeros((1, 130), np.float32), np.zeros((1, 40), np.float32)
    for batch, dtype in ((0, "F32"), (17, "F32"), (1, "F64")):
        with pytest.raises(ValueError, match=r"batch|F32"):
            matrix.matmul(x.ctypes.data, dtype, y.ctypes.data, batch, 1)
    with pytest.raises(ValueError, match="activations"):
        matrix.apply(x[:, :-1])
    with pytest.raises(ValueError, match="activations"):
        matrix.apply(x.astype(np.float64))
    with pytest.raises(ValueError, match="rows 3 to 41"):
        matrix.rows(3, 41, np.empty((38, 130), np.float32))
    for out in (np.empty((2, 130)), np.empty((1, 130), np.float32), np.empty((4, 130), np.float32)[::2]):  # fmt: skip
        with pytest.raises(ValueError, match="out"):
            matrix.rows(0, 2, out)


@pytest.mark.parametrize("path", PATHS)
def test_arrays_are_the_matrix(simd: Any, path: str) -> None:
    simd(path)
    integers = sample(50, 260, spread=8.0)
    matrix = build(integers)
    again = CodedMatrix.from_arrays(matrix.arrays)
    assert all(again.arrays[k] is v for k, v in matrix.arrays.items())
    assert same_bits(rows_of(again, 0, 50), exact(integers, "BF16"))

    def refused(**changed: Any) -> None:
        with pytest.raises(ValueError, match="coded"):
            rows_of(CodedMatrix.from_arrays({**matrix.arrays, **changed}), 0, 50)

    a = matrix.arrays
    for name, array in a.items():
        refused(**{name: array[..., :-1]})
        refused(**{name: array.astype(np.float64)})
    with pytest.raises(ValueError, match="missing: codes"):
        CodedMatrix.from_arrays({k: v for k, v in a.items() if k != "codes"})
    for place, value in ((0, 0), (1, -1), (2, 7), (3, 3), (4, 100), (5, 0), (6, 2)):
        layout = a["layout"].copy()
        layout[place] = value
        refused(layout=layout)
    if path != "numpy":
        refused(order=np.zeros_like(a["order"]))
        refused(choice=np.full_like(a["choice"], 250))
        refused(shifts=np.full_like(a["shifts"], 21))
        refused(row_levels=np.full_like(a["row_levels"], 255))
        refused(tables=np.full_like(a["tables"], 255))
        refused(starts=a["starts"][::-1].copy())
        refused(starts=np.array([0, a["codes"].size + 1]))


@pytest.mark.parametrize("path", PATHS[:-1])
def test_damaged_codes_are_refused_or_decode_to_something(simd: Any, path: str) -> None:
    simd(path)
    matrix, random = build(sample(70, 260, spread=6.0)), np.random.default_rng(7)
    refused = 0
    for _ in range(200):
        codes = matrix.arrays["codes"].copy()
        codes[random.integers(0, codes.size, 3)] = random.integers(0, 256, 3)
        try:
            rows_of(CodedMatrix.from_arrays({**matrix.arrays, "codes": codes}), 0, 70)
        except (ValueError, RuntimeError) as error:
            assert "coded" in str(error)
            refused += 1
    assert refused > 100


@COMMON
@given(st.lists(st.integers(0, 10**6), min_size=32, max_size=32), st.booleans())
def test_a_table_can_be_turned_around(counts: list[int], raw: bool) -> None:
    table = decoding_table(np.array(counts, np.int64).reshape(2, 16), raw).reshape(2, 2, 128)
    for grid in (0, 1):
        entry, base = table[:, grid].astype(np.int64)
        symbol, bits = entry >> 1 & 15, entry >> 5
        y = (base + 128) >> bits
        for s in np.unique(symbol):
            slots = int((symbol == s).sum())
            assert sorted(y[symbol == s]) == list(range(slots, 2 * slots))
        assert np.array_equal(entry & 1, odd(grid, raw)[symbol])
        # The ranges of next states of each symbol cover all states once.
        for s in np.unique(symbol):
            reach = np.concatenate([b + np.arange(1 << n) for b, n in zip(base[symbol == s], bits[symbol == s], strict=True)])  # fmt: skip
            assert np.array_equal(np.sort(reach), np.arange(128))
