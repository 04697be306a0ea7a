"""Random sequences of what may be done to a cache, each step checked against a plain reference.

The reference is token ids and positions as tensors. The models have one layer, whose keys and values
depend on nothing but these, so the reference's are computed whenever they are asked for. `OPERATIONS`
holds every operation: a function of a `Run` and a random generator that does the same to both.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from waterfill.runtime.cache.cache import KVCache
from waterfill.types import WaterfillError

MOST_TOKENS, MOST_ROWS, MOST_PADDING = 400, 4, 9
LOSSLESS = 2e-3  # keys that were turned several times round each time


@dataclass
class Run:
    """A cache, and what it should hold.

    Attributes
    ----------
    ids : int64 (rows, tokens)
    positions : int64 (rows, tokens), below zero for padding
    """

    model: Any
    cache: KVCache
    ids: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    positions: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    refused: int = 0

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    def rows(self, index: torch.Tensor) -> None:
        """Take rows of the reference."""
        self.ids, self.positions = self.ids[index], self.positions[index]


def drawn(random_: random.Random, rows: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(random_.getrandbits(32))
    return torch.randint(2, 96, (rows, count), generator=generator)


def append(run: Run, random_: random.Random) -> None:
    count = random_.choice((1, random_.randint(1, 8), random_.randint(1, 100)))
    if run.tokens + count > MOST_TOKENS:
        return
    if not run.tokens:
        rows = random_.randint(1, MOST_ROWS)
        padding = [random_.randint(0, MOST_PADDING) * random_.randint(0, 1) for _ in range(rows)]
        padding[random_.randrange(rows)] = 0
        count += MOST_PADDING
        run.ids = torch.zeros(rows, 0, dtype=torch.long)
        positions = torch.arange(count) - torch.tensor(padding)[:, None]
        run.positions = positions[:, :0]
    else:
        positions = run.positions[:, -1:] + 1 + torch.arange(count)
    new = drawn(random_, len(run.ids), count)
    run.ids = torch.cat([run.ids, new], 1)
    run.positions = torch.cat([run.positions, positions], 1)
    padded = bool((run.positions < 0).any())
    with torch.no_grad():
        logits = run.model(
            input_ids=new, position_ids=positions.clamp_min(0), past_key_values=run.cache,
            attention_mask=(run.positions >= 0).long() if padded else None,
        ).logits  # fmt: skip
    assert logits[positions >= 0].isfinite().all()


def crop(run: Run, random_: random.Random) -> None:
    least = MOST_PADDING + 1
    if run.tokens <= least:
        return
    kept = random_.choice(
        (random_.randint(least, run.tokens), max(least, run.tokens - random_.randint(1, 9)))
    )
    before = run.cache.get_seq_length()
    try:
        run.cache.crop(random_.choice((kept, kept - before)) if kept < before else kept)
    except WaterfillError:
        run.refused += 1  # a window has forgotten
        return
    run.ids, run.positions = run.ids[:, :kept], run.positions[:, :kept]


def reorder(run: Run, random_: random.Random) -> None:
    if run.tokens:
        index = torch.tensor([random_.randrange(len(run.ids)) for _ in run.ids])
        run.cache.reorder_cache(index)
        run.rows(index)


def repeat(run: Run, random_: random.Random) -> None:
    if run.tokens and 2 * len(run.ids) <= MOST_ROWS:
        run.cache.batch_repeat_interleave(2)
        run.rows(torch.arange(len(run.ids)).repeat_interleave(2))


def select(run: Run, random_: random.Random) -> None:
    if run.tokens:
        index = torch.tensor(
            [random_.randrange(len(run.ids)) for _ in range(random_.randint(1, len(run.ids)))]
        )
        run.cache.batch_select_indices(index)
        run.rows(index)


def splice(run: Run, random_: random.Random) -> None:
    if run.tokens <= MOST_PADDING:
        return
    start = random_.randint(MOST_PADDING, run.tokens)
    stop = min(
        run.tokens, start + random_.choice((0, random_.randint(0, 9), random_.randint(0, 150)))
    )
    count = random_.choice((0, random_.randint(0, 9), random_.randint(0, 100)))
    if run.tokens - (stop - start) + count > MOST_TOKENS:
        return
    rows = random_.choice((1, len(run.ids)))
    new = drawn(random_, rows, count)
    try:
        run.cache.splice(start, stop, new)
    except WaterfillError:
        run.refused += 1
        return
    new = new.expand(len(run.ids), -1)
    run.ids = torch.cat([run.ids[:, :start], new, run.ids[:, stop:]], 1)
    run.positions = run.positions[:, :1] + torch.arange(run.tokens)


def carry(run: Run, random_: random.Random) -> None:
    """Through a file, and go on from what was loaded."""
    if run.tokens:
        old = run.cache
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            try:
                old.save(path, run.ids, level="exact")
            except WaterfillError:
                run.refused += 1  # what was evicted cannot be stored
                return
            run.cache = KVCache.load(
                path, run.model, size=old.budget.nbytes, tokens=old.tokens, batch=old.budget.batch,
                method=old.method, statistics=old.statistics, guard=None,
            )  # fmt: skip


def reset(run: Run, random_: random.Random) -> None:
    run.cache.reset()
    run.ids, run.positions = run.ids[:0, :0], run.positions[:0, :0]


OPERATIONS: dict[Callable[[Run, random.Random], None], float] = {
    append: 4, crop: 1, reorder: 0.7, repeat: 0.4, select: 0.4, splice: 2, carry: 0.5, reset: 0.2,
}  # fmt: skip


def check(run: Run) -> None:
    """Lengths, positions and pieces are as in the reference."""
    tokens = run.tokens
    assert run.cache.get_seq_length() == run.cache.track.tokens == tokens
    if tokens:
        track = run.cache.track.positions(0, tokens).expand(len(run.ids), -1)
        assert torch.equal(track, run.positions)
    for layer in run.cache.coded_layers:
        layer.commit()
        store = layer.store
        assert store.tokens == tokens and (not tokens or store.batch == len(run.ids))
        at = None
        for piece in store.pieces():
            assert piece.start < piece.stop and at in (None, piece.start)
            if piece.start >= store.sink_tokens:
                at = piece.stop
        assert at in (None, tokens)


def check_values(run: Run, within: float) -> None:
    """Keys and values are those that the model makes of the reference, but for so much."""
    if not run.tokens:
        return
    exact = DynamicCache()
    with torch.no_grad():
        run.model(input_ids=run.ids, position_ids=run.positions.clamp_min(0), past_key_values=exact)
    whole = exact.layers[0].keys, exact.layers[0].values
    seen = (run.positions >= 0)[:, None, :, None]
    for piece in run.cache.coded_layers[0].store.pieces():
        some = slice(piece.start, piece.stop)
        for mine, theirs in zip(piece.read(), whole, strict=True):
            assert theirs is not None
            difference = (mine - theirs[:, :, some]) * seen[:, :, some]
            assert difference.abs().max() <= within


def play(cache: KVCache, seed: int, length: int = 12, within: float | None = None) -> Run:
    """One sequence of operations, checked after each.

    Parameters
    ----------
    cache : of a model with one layer; what it holds is forgotten
    within : how far keys and values may be from the reference's at the end; None: not looked at
    """
    random_ = random.Random(seed)
    run = Run(cache.model, cache)
    cache.reset()
    for _ in range(length):
        (operation,) = random_.choices(list(OPERATIONS), list(OPERATIONS.values()))
        operation(run, random_)
        check(run)
    if within is not None:
        check_values(run, within)
    return run
