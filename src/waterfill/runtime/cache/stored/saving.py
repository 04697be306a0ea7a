"""A cache as a file: what `KVCache.save` does, layer by layer and chunk by chunk.

Nothing of the cache is held twice: a layer is read in pieces, as attention would, and coded as it comes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from waterfill.coding import lossless
from waterfill.coding.cachegen import Table, analysis_of, components, fit_table, pack_table
from waterfill.coding.cachegen_chunk import Basis, encode_rows
from waterfill.coding.cachegen_file import Writer, front_nbytes
from waterfill.coding.cachegen_header import Header, Layer, Level, Rotation
from waterfill.coding.cachegen_rows import UNTURNED, Turn, joined, read_rows, turn_of
from waterfill.coding.cachegen_symbols import fit_columns, pack_columns
from waterfill.coding.components import basis_of
from waterfill.coding.sections import join
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import (
    CacheStatistics,
    LayerStatistics,
    StreamStatistics,
)
from waterfill.runtime.cache.held.lying import lies, runs_of, within
from waterfill.runtime.cache.held.pieces import Piece
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.held.track import Track
from waterfill.runtime.cache.stored.fingerprint import model_fingerprint, tokenizer_fingerprint
from waterfill.runtime.cache.stored.words import DTYPE_NAMES, rotation_of, words_of
from waterfill.types import Array, Floats, WaterfillError

if TYPE_CHECKING:
    from waterfill.runtime.cache.cache import KVCache

__all__ = ["LEVEL", "Saving", "counted", "save", "saving_of"]

Arrays = tuple[Array, Array]
# Of a chunk of a layer, about: large enough that what is fixed costs little.
CHUNK_NUMBERS = 1 << 19
MOST_TOKENS, FEWEST_TOKENS = 2048, 32  # of a chunk
LEVEL = 1e-6  # nats per number, unless another is asked for
FEW = 1 << 11  # words of a stream that are stored as they are
RUNS = 4  # of tokens, at most, that make up a sample
SAMPLE = 1024  # tokens, of all rows, that tables are fitted to
EACH = 2  # of these, that models are fitted to
PRIOR = 16  # tokens that a layer's calibration counts for, against those of the cache itself
TOKEN_NATS = 1.0  # lost if all of keys and values were, where nothing was measured


def saving_of(cache: KVCache, model: Any, token_ids: Any, tokenizer: Any) -> Saving:
    """What there is to write of a cache, at no level yet."""
    if model is None:
        raise WaterfillError("the model of this cache is gone: save the cache while it is there")
    stores = [layer.store for layer in cache.coded_layers]
    if len(stores) != len(cache.layers):
        other = next(i for i, one in enumerate(cache.facts) if one is None)
        raise WaterfillError(
            f"layer {other} keeps something else than keys and values; it cannot be stored"
        )
    if not all(store.whole for store in stores):
        raise WaterfillError("a cache that has evicted tokens holds no prefix that could be stored")
    for layer in cache.coded_layers:
        layer.commit()
    ids = torch.as_tensor(token_ids)
    ids = ids if ids.dim() == 2 else ids.reshape(1, -1)
    shape = stores[0].batch, stores[0].tokens
    if not shape[1]:
        raise WaterfillError("an empty cache: there is nothing to store")
    if tuple(ids.shape) != shape:
        raise WaterfillError(
            f"token ids {tuple(ids.shape)} for a cache of {shape[0]} x {shape[1]} tokens"
        )
    return Saving(
        stores, cache.track, ids, model_fingerprint(model),
        None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        (), cache.statistics,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Saving:
    """What is to be written.

    Attributes
    ----------
    stores : of the layers
    track : positions
    ids : int64 (batch, tokens)
    model, tokenizer : fingerprints
    levels : as the file has them
    statistics : of calibration; None: the cache's own moments alone
    """

    stores: Sequence[Store]
    track: Track
    ids: torch.Tensor
    model: str
    tokenizer: str | None
    levels: tuple[Level, ...]
    statistics: CacheStatistics | None

    @property
    def numbers(self) -> int:
        """Numbers of all keys and values."""
        return self.ids.numel() * sum(s.facts.numbers for s in self.stores)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        numbers = max(s.facts.numbers for s in self.stores)
        most = CHUNK_NUMBERS // (numbers * len(self.ids)) // FEWEST_TOKENS * FEWEST_TOKENS
        return min(MOST_TOKENS, max(FEWEST_TOKENS, most))

    def header(self) -> Header:
        rotations = _rotations([store.facts for store in self.stores])
        layers = []
        for store in self.stores:
            facts, start = store.facts, _start(store)
            turned = None if facts.rotary is None else rotations.index(rotation_of(facts.rotary))
            first = 0 if start else min(store.most_sinks, self.ids.shape[1])
            layers.append(
                Layer(
                    facts.index,
                    facts.heads,
                    facts.key_width,
                    facts.value_width,
                    start,
                    first,
                    turned,
                )
            )
        runs = tuple((at, tuple(offset.tolist())) for at, offset in self.track.runs)
        dtype = DTYPE_NAMES[self.stores[0].facts.dtype]
        batch, tokens = self.ids.shape
        return Header(
            self.model, self.tokenizer, dtype, batch, tokens, self.chunk, self.levels,
            tuple(layers), tuple(rotations), runs,
        )  # fmt: skip


def save(path: Path, saving: Saving) -> int:
    """Write the file; returns its bytes."""
    header = saving.header()
    with Writer(path, header) as writer:
        writer.add(saving.ids.cpu().numpy().astype("<u4").tobytes())
        turns: dict[Any, Turn] = {}
        for number in range(len(saving.stores)):
            for part in _parts(saving, header, number, turns, header.chunks(header.layers[number])):
                writer.add(part)
    return path.stat().st_size


def counted(saving: Saving, some: int | None = None) -> int:
    """Bytes of the file, without writing it.

    Parameters
    ----------
    some : at most so many layers, and chunks of each, are looked at and stand for all; None: all
    """
    header = saving.header()
    turns: dict[Any, Turn] = {}
    total, layers = 0.0, _spread_over(range(len(saving.stores)), some)
    for number in layers:
        layer = header.layers[number]
        every = header.chunks(layer)
        taken = _spread_over(every, some)
        sizes = [len(part) for part in _parts(saving, header, number, turns, taken)]
        fixed = 2 + len(header.levels)
        share = _tokens(header, layer, every) / max(1, _tokens(header, layer, taken))
        total += sum(sizes[:fixed]) + share * sum(sizes[fixed:])
    return (
        front_nbytes(header)
        + 4 * saving.ids.numel()
        + int(total * len(saving.stores) / len(layers))
    )


def _spread_over(every: range, some: int | None) -> Sequence[int]:
    """So many of a range, evenly spread."""
    if some is None or len(every) <= some:
        return every
    return [every[i] for i in np.linspace(0, len(every) - 1, some).astype(int)]


def _tokens(header: Header, layer: Layer, chunks: Sequence[int]) -> int:
    spans = (header.span(layer, chunk) for chunk in chunks)
    return sum(stop - first for first, stop in spans)


def _parts(
    saving: Saving, header: Header, number: int, turns: dict[Any, Turn], chunks: Sequence[int]
) -> Iterator[bytes]:
    store = saving.stores[number]
    own = None if saving.statistics is None else saving.statistics.layers.get(store.facts.index)
    return _layer_parts(header, number, _Source(store, turns), own, chunks)


def _rotations(facts: Sequence[LayerFacts]) -> list[Rotation]:
    return list(dict.fromkeys(rotation_of(f.rotary) for f in facts if f.rotary is not None))


def _start(store: Store) -> int:
    """The first token of an unbroken run up to the end."""
    pieces = store.pieces()
    start = pieces[-1].stop
    for piece in reversed(pieces):
        if piece.stop != start:
            break
        start = piece.start
    return start


class _Source:
    """Keys and values of a store by token, read piece by piece and not kept."""

    def __init__(self, store: Store, turns: dict[Any, Turn]) -> None:
        self.store, self._turns = store, turns  # turns are the same for all layers
        self._pieces: tuple[Piece, ...] = store.pieces()
        self._starts = [piece.start for piece in self._pieces]
        # Where nothing has to be decoded all is found at once: much sooner than between chunks.
        self._lying = [_words(piece) if lies(piece) else None for piece in self._pieces]
        self._last: tuple[int, tuple[int, list[Arrays]]] | None = None
        rotary = store.facts.rotary
        self._rotation = None if rotary is None else rotation_of(rotary)

    def runs(self, first: int, stop: int) -> list[Arrays]:
        """Words of keys and values where they lie, as of `cachegen_chunk`."""
        found: list[Arrays] = []
        at = bisect_right(self._starts, first) - 1
        for number, piece in enumerate(self._pieces[at:], at):
            if piece.start >= stop:
                break
            start, runs = self._lying[number] or self._read(number)
            low, high = max(first, piece.start), min(stop, piece.stop)
            found += within(runs, low - start, high - start)
        return found

    def read(self, first: int, stop: int) -> Arrays:
        """Words of keys and values, all in one: (batch, heads, tokens, width)."""
        keys, values = zip(*self.runs(first, stop), strict=True)
        return joined(keys), joined(values)

    def _read(self, number: int) -> tuple[int, list[Arrays]]:
        if self._last is None or self._last[0] != number:
            self._last = number, _words(self._pieces[number])
        return self._last[1]

    def turn(self, first: int, stop: int) -> Turn:
        """How keys of some tokens turn back to position 0."""
        rotary = self.store.facts.rotary
        if rotary is None:
            return UNTURNED
        key = self._rotation, first, stop
        if key not in self._turns:
            positions = self.store.track.positions(first, stop).numpy()
            frequencies = rotary.frequencies.numpy()
            self._turns[key] = turn_of(rotary.first, rotary.second, frequencies, positions).back
        return self._turns[key]

    def plain(self, first: int, stop: int) -> tuple[Floats, Floats]:
        """Float32, keys turned back to position 0: (heads, batch * tokens, width)."""
        keys, values = zip(*self.runs(first, stop), strict=True)
        dtype = DTYPE_NAMES[self.store.facts.dtype]
        return read_rows(keys, dtype, self.turn(first, stop)), read_rows(values, dtype)


def _words(piece: Piece) -> tuple[int, list[Arrays]]:
    """As `runs_of`, arrays."""
    start, runs = runs_of(piece)
    return start, [(words_of(k), words_of(v)) for k, v in runs]


def _exact(pair: Arrays, dtype: str) -> bytes:
    return join([_lossless(lossless.words_of(x), dtype) for x in pair])


def _lossless(words: Any, dtype: str) -> bytes:
    if words.size <= FEW:
        return lossless.store(words)
    return lossless.encode(words, dtype, "rans", 1, tries=False)


def _layer_parts(
    header: Header, number: int, source: _Source, own: LayerStatistics | None, chunks: Sequence[int]
) -> Iterator[bytes]:
    """All parts of a layer in order, those of chunks of some only."""
    layer = header.layers[number]
    steps = [level.step for level in header.levels if level.step is not None]
    coder = _Coder(header, layer, source, own, min(steps)) if steps and len(chunks) else None
    yield b"" if coder is None else coder.packed
    first = source.read(layer.start, layer.start + layer.first) if layer.first else None
    yield b"" if first is None else _exact(first, header.dtype)
    columns = {}
    for level in header.levels:
        if level.step is None or coder is None:
            yield b""
        else:
            some = [z[:, :, ::EACH] for z in coder.sample]
            columns[level.name] = fit_columns(some, level.step)
            yield pack_columns(columns[level.name])
    for chunk in chunks:
        span = header.span(layer, chunk)
        runs, turns = source.runs(*span), (source.turn(*span), UNTURNED)
        words = list(zip(*runs, strict=True))
        for level in header.levels:
            if level.step is None or coder is None:
                yield _exact(source.read(*span), header.dtype)
            else:
                yield encode_rows(
                    words, header.dtype, turns, coder.bases, level.step, columns[level.name]
                )


class _Coder:
    """A layer's tables, fitted to a sample of its own tokens."""

    def __init__(
        self, header: Header, layer: Layer, source: _Source, own: LayerStatistics | None, step: float
    ) -> None:  # fmt: skip
        chunks = header.chunks(layer)
        taken = [source.plain(*span) for span in _spread(header, layer, chunks)]
        streams = len(header.layers) * 2
        tables: list[Table] = []
        self.bases: list[Basis] = []
        self.sample: list[Floats] = []
        for which in (0, 1):
            x = np.concatenate([pair[which] for pair in taken], axis=1)
            given = None if own is None else (own.keys, own.values)[which]
            table, analysis = _fit(x, given, step, streams)
            offset = table.mean[:, None] @ analysis
            across = np.ascontiguousarray(analysis.swapaxes(1, 2))
            tables.append(table)
            self.bases.append(Basis(across, offset.reshape(-1)))
            self.sample.append(components(x, analysis) - offset.swapaxes(1, 2))
        self.packed = join([pack_table(table) for table in tables])


def _spread(header: Header, layer: Layer, chunks: range) -> Iterator[tuple[int, int]]:
    """Runs of tokens, evenly spread, that stand for all of a layer."""
    count = min(len(chunks), RUNS)
    each = max(1, SAMPLE // (count * header.batch))
    first, stop = header.span(layer, chunks[0])[0], header.tokens
    for start in np.linspace(first, max(first, stop - each), count).astype(int).tolist():
        yield start, min(stop, start + each)


def _fit(
    x: Floats, given: StreamStatistics | None, step: float, streams: int
) -> tuple[Table, Floats]:
    """Table and analysis for (heads, tokens, width), of the cache's own moments and calibration's."""
    mean = x.mean(axis=1, dtype=np.float64).astype(np.float32)
    centred = x - mean[:, None]
    count, width = x.shape[1], x.shape[2]
    covariance = centred.swapaxes(1, 2) @ centred / np.float32(count)
    if given is None:
        trace = np.trace(covariance, axis1=1, axis2=2)
        harm = TOKEN_NATS / (streams * len(x) * (trace + 1e-30))
        spread = (trace / width / (1 + count))[:, None, None] * np.eye(width)
        covariance = (covariance + spread).astype(np.float32)
        matrix = (harm[:, None, None] * np.eye(width)).astype(np.float32)
    else:
        share = np.float32(PRIOR / (PRIOR + count))
        covariance = covariance * (1 - share) + given.covariance * share
        matrix = given.harm
    table = fit_table(mean, basis_of(covariance, matrix), step)
    ridge = 1e-4 * np.trace(matrix, axis1=1, axis2=2)[:, None, None] / width
    return table, analysis_of(
        table, matrix + ridge.astype(np.float32) * np.eye(width, dtype=np.float32)
    )
