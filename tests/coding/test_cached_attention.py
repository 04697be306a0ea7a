"""Attention over coded blocks: the numpy twin against float64, and every instruction set against it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.coding.test_attention import DTYPES, NEAR, every, read, stored
from waterfill.coding import native
from waterfill.coding.cached_attention import CodedTokens, ExactTokens, attend_cache
from waterfill.coding.cached_blocks import BLOCK, GAIN_BITS, CodedStream, Turn, WholeBlocks
from waterfill.types import Array

# of a score: keys' synthesis has 15 bits, and as many errors as components
INTEGERS = 2e-4
GAINS = np.array([0.0, 0.3, 0.7, 1.0, 1.2, 1.5, 2.0, -1.0], np.float32)


def stream(rng: np.random.Generator, heads: int, width: int) -> CodedStream:
    """Random tables; bits 0 to 8, of each component by itself."""
    kept = int(rng.integers(1, width + 1))
    bits = rng.integers(0, 9, heads * kept)
    place = np.argsort(-bits, kind="stable")[: np.count_nonzero(bits)].astype(np.int32)
    groups = tuple((b, int((bits == b).sum())) for b in range(8, 0, -1) if (bits == b).any())
    rows = rng.integers(-127, 128, (len(place), width), dtype=np.int8)
    scale = (0.02 / kept**0.5 / 2.0 ** bits[place][:, None]).astype(np.float16)
    mean = rng.normal(size=(heads, width)).astype(np.float16)
    return CodedStream(kept, mean, place, rows, scale, groups)


def code_of(codes: Array, at: int, bits: int) -> Array:
    """A component's codes, int64 (batch, blocks, BLOCK), bit by bit."""
    code, left = np.zeros((*codes.shape[:2], BLOCK), np.int64), bits
    for field in (8, 4, 2, 1):
        if left < field:
            continue
        left -= field
        for t in range(BLOCK):
            byte = codes[:, :, at + t % (4 * field)].astype(np.int64)
            code[:, :, t] |= (byte >> (t // (4 * field) * field) & ((1 << field) - 1)) << left
        at += 4 * field
    return code


def vectors(codes: Array, which: Array, made: CodedStream) -> Array:
    """In float64: (batch, heads, tokens, width)."""
    (heads, width), kept = made.mean.shape, made.kept
    batch, blocks, _ = codes.shape
    z, at = np.zeros((batch, blocks, heads * kept, BLOCK)), 0
    widths = [bits for bits, n in made.groups for _ in range(n)]
    for place, bits in zip(made.place, widths, strict=True):
        gain = GAINS[code_of(which, place // kept * 4 * GAIN_BITS, GAIN_BITS)]
        z[:, :, place] = (code_of(codes, at, bits) - (2.0 ** (bits - 1) - 0.5)) * gain
        at += 4 * bits
    table = np.zeros((heads * kept, width))
    table[made.place] = made.rows * made.scale.astype(np.float64)
    z = z.reshape(batch, blocks, heads, kept, BLOCK).transpose(0, 2, 1, 4, 3)
    mean = made.mean.astype(np.float64)
    return z.reshape(batch, heads, -1, kept) @ table.reshape(heads, kept, width) + mean[:, None]


def turned(keys: Array, turn: Turn, positions: Array) -> Array:
    """Keys (batch, heads, tokens, width) at positions (batch or 1, tokens)."""
    angles = positions[:, None, :, None] * turn.frequencies
    planes = (keys[..., turn.first] + 1j * keys[..., turn.second]) * np.exp(1j * angles)
    keys = keys.copy()
    keys[..., turn.first], keys[..., turn.second] = planes.real, planes.imag
    return keys


def expected(
    q: Array, pieces: list[tuple[int, Array, Array]], scale: float, mask: Array | None, first: int
) -> Array:
    """Attention in float64 over pieces (start, keys, values)."""
    share = q.shape[1] // pieces[0][1].shape[1]
    scores = []
    for start, keys, _ in pieces:
        some = read(q) @ np.repeat(keys, share, 1).swapaxes(2, 3) * scale
        if mask is not None and start >= first:
            part = np.broadcast_to(mask, (*q.shape[:3], mask.shape[3]))[..., start - first :]
            part = part[..., : keys.shape[2]]
            some = np.where(part, some, -np.inf) if mask.dtype == bool else some + read(part)
        scores.append(some)
    all_scores = np.concatenate(scores, 3)
    values = np.repeat(np.concatenate([v for *_, v in pieces], 2), share, 1)
    greatest = all_scores.max(3, keepdims=True)
    weights = np.exp(all_scores - np.where(np.isfinite(greatest), greatest, 0))
    total = weights.sum(3, keepdims=True)
    return (weights @ values / np.where(total == 0, 1, total)).swapaxes(1, 2)


def noise(rng: np.random.Generator, blocks: WholeBlocks, batch: int, n: int) -> tuple[Array, ...]:
    """Parts of so many blocks."""
    return tuple(rng.integers(0, 256, (batch, n, size), np.uint8) for size in blocks.nbytes)


calls = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(DTYPES)),
        "batch": st.integers(1, 2),
        "shared": st.integers(1, 3),
        "share": st.integers(1, 6),
        "queries": st.integers(1, 3),
        "blocks": st.lists(st.integers(1, 20), min_size=1, max_size=3),
        "arenas": st.integers(1, 2),
        "new": st.integers(1, 20),
        "d": st.integers(2, 70),
        "e": st.integers(1, 70),
        "turning": st.sampled_from(["all", "some", "none"]),
        "padded": st.booleans(),
        "hidden": st.integers(0, BLOCK - 1),
        "mask": st.sampled_from(["none", "bool", "added", "late"]),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(max_examples=40, deadline=None)
@given(c=calls)
def test_attention_is_that_of_float64(c: dict[str, Any]) -> None:
    rng = np.random.default_rng(c["seed"])
    heads, dtype, batch, shared = c["shared"] * c["share"], c["dtype"], c["batch"], c["shared"]
    turn = None
    if c["turning"] != "none":
        columns = rng.permutation(c["d"])[: c["d"] // 2 * 2]
        columns = columns if c["turning"] == "all" else columns[: max(2, len(columns) // 4 * 2)]
        first, second = np.split(columns, 2)
        turn = Turn(first.copy(), second.copy(), 10.0 ** rng.uniform(-5, 0, len(first)))
    rows = batch if c["padded"] else 1
    exact, coded, pieces = [], [], []
    at = c["hidden"] + 7
    for number in range(c["arenas"]):
        start, hidden = (at - c["hidden"], c["hidden"]) if number == 0 else (at, 0)
        keys, values = stream(rng, shared, c["d"]), stream(rng, shared, c["e"])
        blocks = WholeBlocks(keys, values, turn, GAINS)
        segments = [noise(rng, blocks, batch, n) for n in c["blocks"]]
        middle = start + BLOCK * (sum(c["blocks"]) // 2)
        offsets = [(start, rng.integers(0, 10**5, rows))]
        if middle > start and c["padded"]:
            offsets.append((middle, rng.integers(0, 10**5, rows)))
        coded.append(CodedTokens(start, hidden, blocks, segments, offsets))  # type: ignore[arg-type]
        parts = [np.concatenate(part, 1) for part in zip(*segments, strict=True)]
        k, v = vectors(*parts[:2], keys), vectors(*parts[2:], values)
        at = start + k.shape[2]
        if turn is not None:
            positions = np.arange(start, at) + np.zeros((rows, 1), np.int64)
            for begin, ahead in offsets:
                positions[:, begin - start :] = np.arange(begin, at) + ahead[:, None]
            k = turned(k, turn, positions)
        pieces.append((start + hidden, k[:, :, hidden:], v[:, :, hidden:]))
    new = [stored(rng.normal(size=(batch, shared, c["new"], n)), dtype) for n in (c["d"], c["e"])]
    exact.append(ExactTokens(at, *new))
    pieces.append((at, read(new[0]), read(new[1])))
    first, stop = c["hidden"] + 7, at + c["new"]
    mask = None
    if c["mask"] == "bool":
        mask = rng.random((batch, 1, c["queries"], stop - first)) < 0.5
        mask[:, :, 0] = False
        mask[:, :, 0, ::97] = True  # whole chunks that a query does not see
    elif c["mask"] == "added":
        mask = stored(rng.normal(size=(1, heads, 1, stop - first)), dtype)
    elif c["mask"] == "late":  # only what is new has one
        first = at
        mask = rng.random((1, 1, c["queries"], c["new"])) < 0.5
    q = stored(rng.normal(size=(batch, c["queries"], heads, c["d"])), dtype).swapaxes(1, 2)
    scale = float(c["d"] ** -0.5 * rng.uniform(0.3, 1))
    with pytest.MonkeyPatch.context() as patch:
        results = every(patch, lambda: attend_cache(q, exact, coded, scale, mask, first))
    wanted = expected(q, pieces, scale, mask, first)
    near = NEAR[dtype] + INTEGERS
    for result in (results[0], results[-1]):
        assert result.dtype == q.dtype
        size = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(read(result) / size, wanted / size, atol=near)


def plain(
    rng: np.random.Generator, batch: int = 2, blocks: int = 40
) -> tuple[list[ExactTokens], list[CodedTokens]]:
    keys, values = stream(rng, 2, 32), stream(rng, 2, 24)
    turn = Turn(np.arange(16), np.arange(16, 32), 0.5 ** np.arange(16.0))
    whole = WholeBlocks(keys, values, turn, GAINS)
    segment = noise(rng, whole, batch, blocks)
    coded = CodedTokens(0, 0, whole, [segment], [(0, np.zeros(1, np.int64))])
    exact = ExactTokens(
        BLOCK * blocks,
        rng.normal(size=(batch, 2, 1, 32)).astype(np.float32),
        rng.normal(size=(batch, 2, 1, 24)).astype(np.float32),
    )
    return [exact], [coded]


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 8, 1, 32)).astype(np.float32)
    pieces = plain(rng)
    results = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("WATERFILL_THREADS", threads)
        results.append(attend_cache(q, *pieces, 0.2))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_positions_far_away_keep_their_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases are carried from block to block: not so far that it shows, and by distance alone."""
    rng = np.random.default_rng(1)
    _, (coded,) = plain(rng, 1, 200)
    q = rng.normal(size=(1, 4, 1, 32)).astype(np.float32)
    turn = coded.blocks.turn
    assert turn is not None
    q[...] = turned(q, turn, np.array([[200 * BLOCK]]))
    away = 1 << 17
    far = CodedTokens(0, 0, coded.blocks, coded.segments, [(0, np.array([away]))])  # fmt: skip
    moved = turned(q, turn, np.array([[away]])).astype(np.float32)
    for near, there in zip(
        every(monkeypatch, lambda: attend_cache(q, [], [coded], 0.2)),
        every(monkeypatch, lambda: attend_cache(moved, [], [far], 0.2)),
        strict=True,
    ):
        np.testing.assert_allclose(near, there, atol=2e-5)


def test_a_query_that_sees_nothing_gives_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    pieces = plain(rng)
    q = rng.normal(size=(2, 4, 1, 32)).astype(np.float32)
    mask = np.ones((2, 1, 1, 40 * BLOCK + 1), bool)
    mask[1] = False
    for result in every(monkeypatch, lambda: attend_cache(q, *pieces, 0.2, mask)):
        assert np.abs(result[0]).max() > 0
        np.testing.assert_array_equal(result[1], 0)


def test_what_does_not_fit_is_refused() -> None:
    rng = np.random.default_rng(3)
    exact, (coded,) = plain(rng)
    q = rng.normal(size=(2, 4, 1, 32)).astype(np.float32)
    assert isinstance(coded.blocks, WholeBlocks)
    keys, values = coded.blocks.keys, coded.blocks.values
    good = {name: getattr(coded, name) for name in CodedTokens.__dataclass_fields__}
    (k, g, v, h), zero = coded.segments[0], np.zeros(1, np.int64)
    wrong: list[dict[str, Any]] = [
        {"segments": [(k[:, :, :-1], g, v, h)]},
        {"segments": [(k, g[:, :, :-1], v, h)]},
        {"segments": [(k, g, v[:, :-1], h)]},
        {"segments": [(k[:1], g, v, h)]},
        {"segments": [tuple(part[:, ::2] for part in (k, g, v, h))]},
        {"blocks": WholeBlocks(values, values, None, GAINS)},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="fit"):
            attend_cache(q, exact, [CodedTokens(**good | change)], 0.2)
    for shape in ((2, 3, 1, 32), (2, 4, 1, 31), (1, 4, 1, 32)):
        with pytest.raises(ValueError, match=r"fit|attention"):
            attend_cache(np.zeros(shape, np.float32), exact, [coded], 0.2)
    with pytest.raises(ValueError, match="mask"):
        attend_cache(q, exact, [coded], 0.2, np.zeros((1, 1, 1, 5), np.int32))
    with pytest.raises(ValueError, match="no key"):
        attend_cache(q, [], [], 0.2)
    if native.core() is None:
        return
    deep: list[dict[str, Any]] = [
        {"hidden": BLOCK},
        {"segments": []},
        {"offsets": []},
        {"offsets": [(1, zero)]},
        {"offsets": [(0, zero), (33, zero)]},
        {"offsets": [(0, zero), (40 * BLOCK, zero)]},
        {"offsets": [(0, np.zeros(3, np.int64))]},
        {
            "blocks": WholeBlocks(
                keys, values, Turn(np.array([0]), np.array([0]), np.ones(1)), GAINS
            )
        },
        {
            "blocks": WholeBlocks(
                keys, values, Turn(np.array([0]), np.array([32]), np.ones(1)), GAINS
            )
        },
        {
            "blocks": WholeBlocks(
                keys, values, Turn(np.array([-1]), np.array([1]), np.ones(1)), GAINS
            )
        },
        {"blocks": WholeBlocks(keys, values, None, GAINS[:7])},
    ]
    for change in deep:
        with pytest.raises(ValueError, match="cache"):
            attend_cache(q, exact, [CodedTokens(**good | change)], 0.2)
    for stop in (40 * BLOCK, 3):
        with pytest.raises(ValueError, match="mask"):
            attend_cache(q, exact, [coded], 0.2, np.ones((1, 1, 1, stop), bool))
    far = keys.place.copy()
    far[0] = 2 * keys.kept
    outside = CodedStream(keys.kept, keys.mean, far, keys.rows, keys.scale, keys.groups)
    with pytest.raises(ValueError, match="component"):
        far_blocks = WholeBlocks(outside, values, None, GAINS)
        attend_cache(q, exact, [CodedTokens(**good | {"blocks": far_blocks})], 0.2)


def test_tables_that_do_not_fit_each_other_are_refused() -> None:
    mean, place = np.zeros((2, 8), np.float16), np.arange(4, dtype=np.int32)
    rows, scale, groups = np.zeros((4, 8), np.int8), np.zeros((4, 1), np.float16), ((3, 4),)
    CodedStream(2, mean, place, rows, scale, groups)
    wrong: list[tuple[Any, ...]] = [
        (2, mean, place[:3], rows, scale, groups),
        (2, mean, place, rows[:, :7], scale, groups),
        (2, mean, place, rows, scale, ((3, 5),)),
        (2, mean.astype(np.float32), place, rows, scale, groups),
        (2, mean, place, rows[:, ::-1], scale, groups),
        (2, mean, place, rows, scale, ((9, 4),)),
        (9, mean, place, rows, scale, groups),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"fit|contiguous|float16|bits"):
            CodedStream(*arguments)
    with pytest.raises(ValueError, match="fit"):
        Turn(np.arange(2), np.arange(3), np.ones(2))
    with pytest.raises(ValueError, match="int64"):
        Turn(np.arange(2), np.arange(2), np.ones(2, np.float32))  # type: ignore[arg-type]
