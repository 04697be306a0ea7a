"""Stored caches without torch: components and back, the file, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.coding import cache_arrays
from waterfill.coding.cachegen import analysis_of, fit_table, pack_table, read_table
from waterfill.coding.cachegen import components as to_components
from waterfill.coding.cachegen_chunk import Basis, decode_rows, encode_rows
from waterfill.coding.cachegen_file import PartStream, Reader
from waterfill.coding.cachegen_header import (
    Header,
    Level,
    Part,
    description_of,
    header_of,
    parts_of,
)
from waterfill.coding.cachegen_layer import positions_of, read_layers
from waterfill.coding.cachegen_rows import UNTURNED, one_run, read_rows, turn_of, write_rows
from waterfill.coding.cachegen_symbols import (
    decode_chunk,
    encode_chunk,
    fit_columns,
    pack_columns,
    read_columns,
)
from waterfill.coding.components import basis_of
from waterfill.types import Floats, FormatError, from_float32, to_float32

GOLDEN = Path(__file__).parents[1] / "golden" / "cache"


@pytest.fixture(params=["native", "numpy"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setenv("WATERFILL_SIMD", "numpy")
    return str(request.param)


def components(seed: int, heads: int, tokens: int, kept: int, spread: float) -> Floats:
    rng = np.random.default_rng(seed)
    sizes = spread ** rng.uniform(-1, 1, (heads, 1, kept))
    z = rng.standard_normal((heads, tokens, kept)) * sizes
    return np.ascontiguousarray(z.swapaxes(1, 2), np.float32)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 70),
    kept=st.integers(1, 9),
    spread=st.sampled_from([1.0, 30.0, 3000.0]),
    step=st.sampled_from([0.01, 0.5, 20.0]),
)
def test_chunks_come_back_to_half_a_step(
    seed: int, heads: int, tokens: int, kept: int, spread: float, step: float
) -> None:
    z = (
        components(seed, heads, tokens, kept, spread),
        components(seed + 1, heads, tokens, 2, spread),
    )
    columns = fit_columns([x[:, :, ::3] for x in z], step)  # others than it was fitted to
    offset = np.zeros(heads * kept, np.float32), np.zeros(heads * 2, np.float32)
    again = read_columns(pack_columns(columns), columns.sizes)
    decoded = decode_chunk(encode_chunk(z, offset, step, columns), tokens, step, again, heads)
    for x, y in zip(z, decoded, strict=True):
        # Points are moved by half a step at most, and float32 rounds.
        assert (np.abs(x - y) <= step * 1.01 + np.abs(x) * 1e-6).all()
        assert np.sqrt(np.mean((x - y) ** 2)) <= step * 0.6


def test_both_ways_write_and_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    z = components(5, 3, 77, 8, 100.0), components(6, 3, 77, 5, 3.0)
    offset = np.linspace(-1, 1, 24, dtype=np.float32), np.zeros(15, np.float32)
    found = []
    for how in ("", "numpy"):
        monkeypatch.setenv("WATERFILL_SIMD", how)
        if not how:
            monkeypatch.delenv("WATERFILL_SIMD")
        columns = fit_columns(z, 0.3)
        data = encode_chunk(z, offset, 0.3, columns)
        found.append((pack_columns(columns), data, decode_chunk(data, 77, 0.3, columns, 3)))
    assert found[0][:2] == found[1][:2]
    for one, other in zip(found[0][2], found[1][2], strict=True):
        np.testing.assert_array_equal(one, other)


def in_runs(words: Any) -> list[Any]:
    """A copy in memory of another order: a few tokens as they are, then blocks with tokens last."""
    odd = words.shape[2] % 16 or 16 * (words.shape[2] == 144)
    blocks = words[:, :, odd:]
    side = 32 if blocks.shape[2] % 32 == 0 else 16
    blocks = blocks.reshape(*words.shape[:2], -1, side, words.shape[3])
    across = np.ascontiguousarray(blocks.transpose(0, 2, 1, 4, 3)).transpose(0, 2, 1, 4, 3)
    return [words[:, :, None, :odd].copy(), across]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tokens", [1, 31, 50, 69, 96, 144])
def test_rows_are_coded_alike_by_every_way(
    monkeypatch: pytest.MonkeyPatch, dtype: str, tokens: int
) -> None:
    # Row after row of a batch, in groups that cross from one to the next.
    rng = np.random.default_rng(tokens)
    widths, kept = (10, 7), (9, 3)
    words = [
        from_float32(rng.standard_normal((2, 3, tokens, w)).astype(np.float32), dtype)
        for w in widths
    ]
    turn = turn_of(
        (5, 1, 3), (0, 2, 6), np.array([1.0, 0.1, 0.01]), rng.integers(0, 99, (2, tokens))
    )
    shape = [(3, k, w) for k, w in zip(kept, widths, strict=True)]
    analysis = [rng.standard_normal(s).astype(np.float32) * 4 for s in shape]
    bases = [Basis(a, a.sum(2).reshape(-1)) for a in analysis]
    synthesis = [np.ascontiguousarray(a.swapaxes(1, 2)) for a in analysis]
    means = [rng.standard_normal((3, w)).astype(np.float32) for w in widths]
    sample = [rng.standard_normal((3, k, 64)).astype(np.float32) * 8 for k in kept]
    columns = fit_columns(sample, 0.3)
    found = []
    for how in ("", "scalar", "numpy"):
        monkeypatch.setenv("WATERFILL_SIMD", how)
        data = encode_rows([one_run(x) for x in words], dtype, (turn.back, UNTURNED), bases, 0.3, columns)  # fmt: skip
        assert data == encode_rows([in_runs(x) for x in words], dtype, (turn.back, UNTURNED), bases, 0.3, columns)  # fmt: skip
        whole, parted = [np.empty_like(x) for x in words], [np.empty_like(x) for x in words]
        runs = [in_runs(x) for x in parted]
        for out in ([one_run(x) for x in whole], runs):
            decode_rows(data, dtype, out, (turn, UNTURNED), synthesis, means, 0.3, columns)
        for x, some in zip(whole, runs, strict=True):
            flat = [y.reshape(*y.shape[:2], -1, y.shape[4]) for y in some]
            np.testing.assert_array_equal(np.concatenate(flat, 2).view(np.uint8), x.view(np.uint8))
        found.append((data, *whole))
    for other in found[1:]:
        assert other[0] == found[0][0]
        for x, y in zip(found[0][1:], other[1:], strict=True):
            np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_numbers_that_no_step_can_count_are_refused(either: str, bad: float) -> None:
    z = components(1, 2, 40, 3, 2.0), components(2, 2, 40, 3, 2.0)
    columns, offset = fit_columns(z, 0.1), np.zeros(6, np.float32)
    z[0][1, 2, 7] = bad
    with pytest.raises(ValueError, match="not finite, or too large"):
        encode_chunk(z, (offset, offset), 0.1, columns)
    words = [np.ones((1, 2, 40, 3), np.float32) for _ in range(2)]
    bases = [Basis(np.ones((2, 3, 3), np.float32), offset)] * 2
    runs, turns = [one_run(x) for x in words], (UNTURNED, UNTURNED)
    assert encode_rows(runs, "F32", turns, bases, 0.1, columns)
    words[1][0, 1, 7] = bad
    with pytest.raises(ValueError, match="not finite, or too large"):
        encode_rows(runs, "F32", turns, bases, 0.1, columns)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rows_turn_and_come_back(either: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 19, 8)).astype(np.float32)
    x.reshape(-1)[:4] = 6e-6, -3e-8, 65504, 0
    words = from_float32(x, dtype)
    turn = turn_of((5, 1, 3), (0, 2, 6), np.array([1.0, 0.1, 0.01]), rng.integers(0, 999, (2, 19)))
    plain = read_rows(one_run(words), dtype)
    np.testing.assert_array_equal(
        plain.reshape(3, 2, 19, 8).swapaxes(0, 1), to_float32(words, dtype)
    )
    turned = write_rows(plain, "F32", x.shape, turn)
    back = read_rows(one_run(turned), "F32", turn.back)
    np.testing.assert_allclose(back, plain, rtol=1e-5, atol=1e-5 * 65504)
    assert not np.allclose(turned[1], x[1], atol=0.1)
    np.testing.assert_array_equal(write_rows(plain, dtype, x.shape), words)


@pytest.mark.parametrize("start", [0, -7, 60, 1_000_003])
def test_consecutive_positions_turn_as_each_alone(either: str, start: int) -> None:
    positions = start + np.arange(1500) + np.array([[0], [31]])
    frequencies = 1e4 ** (-np.arange(16) / 16)
    together = turn_of(range(16), range(16, 32), frequencies, positions)
    assert together.cos is not None and together.sin is not None
    angles = positions[..., None] * frequencies
    for found, truth in ((together.cos, np.cos(angles)), (together.sin, np.sin(angles))):
        assert found.shape == truth.shape
        assert (found != truth.astype(np.float32)).mean() < 1e-4
        np.testing.assert_allclose(found, truth, rtol=0, atol=6e-8)


def test_a_table_is_what_its_bytes_say_and_its_analysis_undoes_it() -> None:
    rng = np.random.default_rng(3)
    square = rng.standard_normal((2, 6, 6))
    covariance = (square @ square.swapaxes(1, 2)).astype(np.float32)
    harm = np.broadcast_to(np.diag(np.arange(1.0, 7)), (2, 6, 6)).astype(np.float32)
    mean = rng.standard_normal((2, 6)).astype(np.float32)
    table = fit_table(mean, basis_of(covariance, harm), 1e-3)
    again = read_table(pack_table(table), 2, 6)
    np.testing.assert_array_equal(again.synthesis, table.synthesis)
    np.testing.assert_array_equal(again.mean, table.mean)
    x = rng.standard_normal((2, 50, 6)).astype(np.float32)
    z = to_components(x, analysis_of(table, harm))
    np.testing.assert_allclose((table.across @ z).swapaxes(1, 2), x, atol=1e-3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prefix.kv"
    cache_arrays.write(path, cache_arrays.header())
    return path


def test_levels_differ_in_error_and_size(file: Path) -> None:
    errors, sizes = {}, {}
    with Reader(file) as reader:
        for number, level in enumerate(reader.header.levels):
            sizes[level.name] = sum(
                reader.part_nbytes(p)
                for p in reader.numbers
                if p.level == number and p.kind == "chunk"
            )
    for level in ("exact", "fine", "coarse"):
        error = 0.0
        for number, (layer, keys, values) in enumerate(read_layers(file, level)):
            truth = [x[:, :, layer.start :] for x in cache_arrays.states(number)]
            error += sum(
                float(np.abs(x - y).max()) for x, y in zip(truth, (keys, values), strict=True)
            )
        errors[level] = error
    assert errors["exact"] == 0 < errors["fine"] < errors["coarse"]
    assert sizes["exact"] > sizes["fine"] > sizes["coarse"]
    with pytest.raises(KeyError, match="fine, coarse, exact"):
        list(read_layers(file, "best"))


def test_the_golden_file_reads_as_ever(either: str) -> None:
    told = json.loads((GOLDEN / "small.json").read_text())
    for level, digests in told["levels"].items():
        found = []
        for _, *pair in read_layers(GOLDEN / "small.kv", level):
            found += [
                hashlib.sha256(np.round(x * 4096).astype("<i4").tobytes()).hexdigest() for x in pair
            ]
        assert found == digests


def test_the_golden_file_is_still_written(tmp_path: Path) -> None:
    cache_arrays.write(tmp_path / "again.kv", cache_arrays.header())
    assert (tmp_path / "again.kv").read_bytes() == (GOLDEN / "small.kv").read_bytes()


def test_every_flipped_byte_is_refused(file: Path, tmp_path: Path) -> None:
    good = file.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        with pytest.raises(FormatError):
            list(PartStream().feed(bytes(bad)))


def test_every_truncation_is_refused(file: Path, tmp_path: Path) -> None:
    good, short = file.read_bytes(), tmp_path / "short.kv"
    for length in range(0, len(good), 7):
        short.write_bytes(good[:length])
        with pytest.raises(FormatError):
            Reader(short)
        stream = PartStream()
        list(stream.feed(good[:length]))
        with pytest.raises(FormatError, match="cut short"):
            stream.close()
    with pytest.raises(FormatError, match="after the end"):
        list(PartStream().feed(good + b"\0"))


def test_other_versions_are_refused(file: Path) -> None:
    import zlib

    data = bytearray(file.read_bytes())
    data[8] = 2
    data[20:24] = zlib.crc32(data[:20]).to_bytes(4, "little")
    with pytest.raises(FormatError, match="version 2; this reads 1"):
        list(PartStream().feed(bytes(data)))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 4000), max_size=30))
def test_a_stream_in_odd_pieces_gives_the_same_parts(cuts: list[int]) -> None:
    data = (GOLDEN / "small.kv").read_bytes()
    whole = list(PartStream().feed(data))
    stream, found = PartStream(), []
    ends = [*sorted(min(c, len(data)) for c in cuts), len(data)]
    for low, high in zip([0, *ends], ends, strict=False):
        found += list(stream.feed(data[low:high]))
    stream.close()
    assert found == whole
    assert [part for part, _ in found] == list(parts_of(cache_arrays.header()))


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=6), level=st.integers(0, 2))
@example(at=502, junk=b"\x00\x00\x00~", level=0)  # rows too large for a float
def test_parts_that_lie_are_refused_or_decoded(at: int, junk: bytes, level: int) -> None:
    # As an attacker would write them: with checksums that hold.
    from waterfill.coding.cachegen_layer import LayerDecoder

    with Reader(GOLDEN / "small.kv") as reader:
        decoder = LayerDecoder(reader.header, reader.header.layers[0])
        decoder.table(reader.read(Part("table", 0)))
        parts = [
            Part("models", 0, level),
            Part("chunk", 0, level, 0),
            Part("table", 0),
            Part("first", 0),
        ]
        part = parts[at % 4]
        data = bytearray(reader.read(part))
        place = at // 4 % max(1, len(data))
        data[place : place + len(junk)] = junk
        models = bytes(data) if part.kind == "models" else reader.read(Part("models", 0, level))
        chunk = bytes(data) if part.kind == "chunk" else reader.read(Part("chunk", 0, level, 0))
        try:
            if part.kind == "table":
                decoder.table(bytes(data))
            if part.kind == "first":
                decoder.first(bytes(data))
            decoder.models(models, level)
            if reader.header.levels[level].step is None:
                decoder.exact(chunk, 0)
            else:
                decoder.coded(chunk, 0, level, decoder.turn(0))
        except FormatError:
            return


@pytest.mark.parametrize(
    ("what", "value", "says"),
    [("batch", 0, "batch"), ("tokens", -1, "tokens"), ("chunk", 1 << 30, "chunk"),
     ("dtype", "I8", "dtype"), ("levels", (), "levels"), ("runs", (), "runs"),
     ("batch", True, "batch"), ("model", 3, "model"), ("rotations", (), "rotation"),
     ("levels", (Level("a", 1.0), Level("a", 2.0)), "level names"), ("levels", (Level("a", -1.0),), "step")],
)  # fmt: skip
def test_headers_that_make_no_sense_are_refused(what: str, value: object, says: str) -> None:
    header = dataclasses.replace(cache_arrays.header(), **{what: value})  # type: ignore[arg-type]
    text = description_of(header)
    with pytest.raises(ValueError, match=says):
        header_of(json.loads(text))


def test_positions_follow_their_runs() -> None:
    base = cache_arrays.header()
    header: Header = dataclasses.replace(base, batch=2, runs=((0, (0, -4)), (6, (10,))))
    expected = [[4, 5, 16, 17], [0, 1, 16, 17]]
    assert positions_of(header, 4, 8).tolist() == expected
