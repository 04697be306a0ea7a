"""Blocks of every kind: attention by every instruction set against numpy's, and what is refused."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.coding.test_attention import every
from waterfill.coding import native
from waterfill.coding.cached_attention import CodedTokens, attend_cache
from waterfill.coding.cached_blocks import BLOCK, STILL, Blocks, GridBlocks, PlainBlocks, Turn
from waterfill.coding.cached_steps import (
    HEAD,
    MIDDLE,
    RATIOS,
    StepBlocks,
    StepTable,
    step_at,
    write_block,
)
from waterfill.coding.cachegen_symbols import (
    MAX_SHIFT,
    classes_known,
    encode_chunk,
    fit_columns,
)
from waterfill.types import Array

BATCH, HEADS, WIDTHS = 2, 2, (24, 19)
STEP = 0.1
needs_kernel = pytest.mark.skipif(native.core() is None, reason="the native core is not built")


def turn(some: bool) -> Turn:
    """Of all columns of a key, or of some."""
    pairs = np.arange(5 if some else 12)
    return Turn(pairs, pairs + len(pairs), 0.7 ** pairs.astype(np.float64))


def numbers(rng: np.random.Generator, dtype: str, *shape: int) -> Array:
    """As bytes."""
    x = rng.normal(size=shape).astype(np.float16 if dtype == "F16" else np.float32)
    if dtype == "BF16":
        x = (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.reshape(*shape[:2], -1).view(np.uint8)


def plain(rng: np.random.Generator, blocks: int, dtype: str) -> tuple[Blocks, list[Array]]:
    parts = [numbers(rng, dtype, BATCH, blocks, HEADS * w * BLOCK) for w in WIDTHS]
    return PlainBlocks((HEADS, *WIDTHS), dtype), parts


def grids(rng: np.random.Generator, blocks: int, groups: int, some: bool) -> tuple[Blocks, list[Array]]:  # fmt: skip
    """By channel; without groups by token."""
    sizes = np.exp2((np.arange(256) - 160) / 6).astype(np.float32) if groups else None
    bits = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    made = GridBlocks(
        (HEADS, *WIDTHS), bits, turn(some) if groups else None, sizes, groups or BLOCK
    )
    parts = [rng.integers(0, 256, (BATCH, blocks, n), np.uint8) for n in made.nbytes]
    for at in (1, 2, 4, 5):
        if not groups:
            parts[at] = numbers(rng, "F16", BATCH, blocks, made.nbytes[at] // 2)
        elif at in (1, 4):
            parts[at] = parts[at] % 40 + np.uint8(110)
    return made, parts


def steps(rng: np.random.Generator, blocks: int, outliers: float, some: bool) -> tuple[Blocks, list[Array]]:  # fmt: skip
    """Components of very different sizes, a few of them far out."""
    kept = 17, 19

    def components(tokens: int) -> list[Array]:
        size = np.exp(-np.arange(20) / 4)[:, None] * 5
        z = [(rng.normal(size=(HEADS, k, tokens)) * size[:k]).astype(np.float32) for k in kept]
        for x in z:
            x[rng.random(x.shape) < outliers] *= 60
        return z

    columns = fit_columns([rng.permuted(z, axis=2) / 2 for z in components(512)], STEP)
    offsets = [np.zeros(HEADS * k, np.float32) for k in kept]
    chunks = [
        (i, encode_chunk(components(BLOCK), offsets, step_at(STEP, i), columns.forgetful()))
        for i in rng.integers(MIDDLE, 200, BATCH * blocks).tolist()
    ]
    nbytes = HEAD + max(len(chunk) for _, chunk in chunks) + 2
    codes = np.zeros((BATCH * blocks, nbytes), np.uint8)
    for row, (index, chunk) in zip(codes, chunks, strict=True):
        write_block(index, chunk, row)
    tables = [
        StepTable(
            rng.normal(size=(HEADS, w)).astype(np.float16),
            rng.integers(-127, 128, (HEADS, k, w), np.int8),
            np.full((HEADS, k, 1), 0.002, np.float16),
        )
        for k, w in zip(kept, WIDTHS, strict=True)
    ]
    made = StepBlocks(*tables, columns, STEP, nbytes, turn(some))  # type: ignore[call-arg, arg-type]
    return made, [codes.reshape(BATCH, blocks, nbytes)]


KINDS: dict[str, Any] = {
    "plain F32": lambda rng: plain(rng, 21, "F32"),
    "plain F16": lambda rng: plain(rng, 5, "F16"),
    "plain BF16": lambda rng: plain(rng, 5, "BF16"),
    "token": lambda rng: grids(rng, 9, 0, False),
    "channel": lambda rng: grids(rng, 9, 32, False),
    "channel, some turning": lambda rng: grids(rng, 9, 4, True),
    "steps": lambda rng: steps(rng, 19, 0.0, False),
    "steps with outliers, some turning": lambda rng: steps(rng, 9, 0.01, True),
}


def called(blocks: Blocks, parts: list[Array], rng: np.random.Generator) -> Array:
    q = rng.normal(size=(BATCH, 3 * HEADS, 2, WIDTHS[0])).astype(np.float32)
    count = parts[0].shape[1]
    segments = [[part[:, :3] for part in parts], [part[:, 3:] for part in parts]]
    mask = rng.random((1, 1, 2, count * BLOCK - 7)) < 0.7
    coded = CodedTokens(100, 7, blocks, segments, [(100, np.array([0, 55]))])
    return attend_cache(q, [], [coded], 0.3, mask, 107)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_attention_is_that_of_numpy(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, parts = KINDS[kind](np.random.default_rng(seed))
    results = every(monkeypatch, lambda: called(blocks, parts, np.random.default_rng(seed)))
    size = max(1.0, float(np.abs(results[-1]).max()))
    np.testing.assert_allclose(results[0] / size, results[-1] / size, atol=1e-5)


@needs_kernel
def test_blocks_that_no_coder_wrote_are_refused() -> None:
    rng = np.random.default_rng(0)
    blocks, (codes,) = steps(rng, 4, 0.01, False)
    refused = 0
    for _ in range(300):
        wrong = codes.copy()
        for _ in range(int(rng.integers(1, 5))):
            row = wrong[rng.integers(BATCH), rng.integers(4)]
            row[rng.integers(len(row) if rng.random() < 0.5 else 12)] = rng.integers(256)
        try:
            assert np.isfinite(called(blocks, [wrong], rng)).all()
        except RuntimeError:
            refused += 1
    assert refused > 100


@needs_kernel
def test_tables_that_do_not_fit_are_refused() -> None:
    rng = np.random.default_rng(0)
    core = native.required()
    made, _ = steps(rng, 1, 0.0, False)
    assert isinstance(made, StepBlocks)
    columns, still = made.columns, STILL.handle
    arrays = columns.shifts, columns.models, columns.pulls
    known = classes_known()
    keys, values = made.keys.raw, made.values.raw
    good = [
        keys, values, still, (*arrays, MAX_SHIFT), known.tables, made.step, RATIOS, made.block_nbytes,
        made,
    ]  # fmt: skip
    core.cache_steps(*good)
    kept, mean, rows, scale = keys
    shifts, models, pulls = arrays
    beyond = core.CacheTurn(np.array([0]), np.array([99]), np.ones(1))
    wrong: list[tuple[int, Any]] = [
        (0, (kept + 1, mean, rows, scale)),
        (0, (kept, mean, rows[:-1], scale[:-1])),
        (0, (kept, mean[:, :-1].copy(), rows, scale)),
        (0, (kept, mean.astype(np.float32), rows, scale)),
        (2, beyond),
        (3, (shifts[:-1], models, pulls, MAX_SHIFT)),
        (3, (shifts + np.uint8(MAX_SHIFT + 1), models, pulls, MAX_SHIFT)),
        (3, (shifts, models + np.uint8(len(known.freqs)), pulls, MAX_SHIFT)),
        (3, (shifts, models[:-1], pulls, MAX_SHIFT)),
        (3, (shifts, models, pulls[:-1], MAX_SHIFT)),
        (3, (shifts, models, np.append(pulls, pulls[:1]), MAX_SHIFT)),
        (3, (*arrays, len(known.freqs))),
        (6, RATIOS[:-1]),
    ]
    for at, value in wrong:
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            core.cache_steps(*good[:at], value, *good[at + 1 :])
    with pytest.raises(ValueError, match="turn"):
        core.CacheTurn(np.array([3, 3]), np.array([4, 5]), np.ones(2))
    sizes = np.ones(256, np.float32)
    for arguments in (
        (True, 2, 0, 8, 4, 4, 32), (True, 2, 8, 8, 0, 4, 32), (True, 2, 8, 8, 4, 9, 32),
        (True, 2, 8, 8, 4, 4, 3), (True, 2, 8, 8, 4, 4, 0), (False, 0, 8, 8, 4, 4, 32),
        (False, 2, 8, 1 << 20, 4, 4, 32),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="cache"):
            core.cache_grids(*arguments, sizes, still)
    with pytest.raises(ValueError, match="wide"):
        core.cache_plain(2, 513, 8, "F32", still)


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_a_handle_holds_nothing_of_the_size_of_its_tables(kind: str) -> None:
    rng = np.random.default_rng(0)
    blocks, parts = KINDS[kind](rng)
    called(blocks, parts, rng)
    assert 0 < blocks.handle.held_nbytes < 800
    if isinstance(blocks, StepBlocks):
        # What coding derives from the columns is not kept with them.
        blocks.vectors([part[:, :1] for part in parts])
        assert set(vars(blocks.columns)) == {"shifts", "models", "pulls", "sizes"}


@needs_kernel
def test_layers_that_turn_alike_share_what_turns_them() -> None:
    one, other, some = turn(False), turn(False), turn(True)
    shared = one.handle
    assert other.handle is shared
    assert some.handle is not shared
    rng = np.random.default_rng(0)
    blocks, parts = KINDS["channel, some turning"](rng)
    expected = called(blocks, parts, np.random.default_rng(1))
    # A handle keeps what it reads, whoever else forgets it.
    handle = blocks.handle
    again = replace(blocks, turn=None)
    vars(again)["handle"] = handle
    del blocks
    gc.collect()
    assert np.array_equal(called(again, parts, np.random.default_rng(1)), expected)
