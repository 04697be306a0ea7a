"""Parts of a stored cache back to keys and values, with numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import lossless
from waterfill.coding.cachegen import Table, read_table
from waterfill.coding.cachegen_chunk import decode_rows
from waterfill.coding.cachegen_file import Reader
from waterfill.coding.cachegen_header import Header, Layer, Part
from waterfill.coding.cachegen_rows import UNTURNED, Runs, Turn, one_run, turn_of
from waterfill.coding.cachegen_symbols import Columns, read_columns
from waterfill.coding.sections import split
from waterfill.types import DTYPES, Array, Floats, FormatError, to_float32

__all__ = ["LayerDecoder", "positions_of", "read_ids", "read_layers", "wanted_at"]

Arrays = tuple[Array, Array]


def wanted_at(level: int | None, name: str | None = None) -> Callable[[Header, Part], bool]:
    """Which parts a reader of one level needs; by number, or by name where the header decides."""

    def wanted(header: Header, part: Part) -> bool:
        own = header.number(name) if level is None else level
        if part.kind in ("models", "chunk"):
            return part.level == own
        return not (part.kind == "table" and header.levels[own].step is None)

    return wanted


def read_ids(data: bytes, header: Header) -> NDArray[np.int64]:
    """Token ids, int64 (batch, tokens)."""
    if len(data) != 4 * header.batch * header.tokens:
        raise FormatError("token ids of another number than the tokens of the cache")
    return np.frombuffer(data, "<u4").astype(np.int64).reshape(header.batch, header.tokens)


def positions_of(header: Header, first: int, stop: int) -> NDArray[np.int64]:
    """Positions of tokens, int64 (batch or 1, stop - first)."""
    rows = max(len(offsets) for _, offsets in header.runs)
    out = np.tile(np.arange(first, stop), (rows, 1))
    for (start, offsets), (end, _) in zip(
        header.runs, (*header.runs[1:], (header.tokens, ())), strict=True
    ):
        low, high = max(start, first) - first, min(end, stop) - first
        if low < high:
            out[:, low:high] = np.arange(low + first, high + first) + np.array(offsets)[:, None]
    return out


class LayerDecoder:
    """One layer's parts, in the order of the file, to arrays (batch, heads, tokens, width)."""

    def __init__(self, header: Header, layer: Layer) -> None:
        self.header, self.layer = header, layer
        self.tables: tuple[Table, Table] | None = None
        self.columns: dict[int, Columns] = {}

    def turn(self, chunk: int) -> Turn:
        """How keys of a chunk turn."""
        if self.layer.rotation is None:
            return UNTURNED
        one = self.header.rotations[self.layer.rotation]
        positions = positions_of(self.header, *self.header.span(self.layer, chunk))
        return turn_of(one.first, one.second, np.array(one.frequencies), positions)

    def table(self, data: bytes) -> None:
        """Take the layer's tables, of keys and of values."""
        if data:
            one = self.layer
            keys, values = split(data, 2)
            self.tables = (
                read_table(keys, one.heads, one.key_width),
                read_table(values, one.heads, one.value_width),
            )

    def models(self, data: bytes, level: int) -> None:
        """Take a level's models."""
        if data:
            if self.tables is None:
                raise FormatError("models without a table")
            sizes = self.tables[0].components, self.tables[1].components
            self.columns[level] = read_columns(data, sizes)

    def first(self, data: bytes) -> Arrays | None:
        """The tokens that are kept as they were: arrays as stored; None where there are none."""
        if self.layer.first:
            return self._exact(data, self.layer.first)
        if data:
            raise FormatError("bytes of tokens where there are none")
        return None

    def exact(self, data: bytes, chunk: int) -> Arrays:
        """A chunk of an exact level: arrays as stored, keys at their positions."""
        first, stop = self.header.span(self.layer, chunk)
        return self._exact(data, stop - first)

    def coded(self, data: bytes, chunk: int, level: int, turn: Turn) -> Arrays:
        """A chunk of another level: arrays as stored, keys turned to their positions."""
        first, stop = self.header.span(self.layer, chunk)
        one, header = self.layer, self.header
        keys, values = (
            np.empty((header.batch, one.heads, stop - first, width), DTYPES[header.dtype])
            for width in (one.key_width, one.value_width)
        )
        self.coded_to(data, level, turn, (one_run(keys), one_run(values)))
        return keys, values

    def coded_to(self, data: bytes, level: int, turn: Turn, out: tuple[Runs, Runs]) -> None:
        """As `coded`, into room that is there, of as many tokens as the chunk has."""
        step = self.header.levels[level].step
        if step is None or self.tables is None or level not in self.columns:
            raise FormatError("a chunk without its table or models")
        keys, values = self.tables
        decode_rows(
            data, self.header.dtype, out, (turn, UNTURNED), (keys.across, values.across),
            (keys.mean, values.mean), step, self.columns[level],
        )  # fmt: skip

    def _exact(self, data: bytes, tokens: int) -> Arrays:
        one, header = self.layer, self.header
        word = np.dtype(f"<u{DTYPES[header.dtype].itemsize}")
        found = []
        for part, width in zip(split(data, 2), (one.key_width, one.value_width), strict=True):
            words = np.empty(header.batch * one.heads * tokens * width, word)
            lossless.decode(part, words, header.dtype, 1)
            shape = header.batch, one.heads, tokens, width
            found.append(words.view(DTYPES[header.dtype]).reshape(shape))
        return found[0], found[1]


def read_layers(path: Path, level: str | None = None) -> Iterator[tuple[Layer, Floats, Floats]]:
    """Layer after layer of a stored cache: keys and values, float32 (batch, heads, tokens, width).

    Parameters
    ----------
    level : name of a level; None: the finest

    Raises
    ------
    FormatError
        If the file is damaged or none of the kind.
    KeyError
        If it has no such level.
    """
    with Reader(path) as reader:
        header = reader.header
        number = header.number(level)
        for i, layer in enumerate(header.layers):
            decoder = LayerDecoder(header, layer)
            if header.levels[number].step is not None:
                decoder.table(reader.read(Part("table", i)))
            pairs = []
            first = decoder.first(reader.read(Part("first", i)))
            if first is not None:
                pairs.append(_floats(first, header.dtype))
            decoder.models(reader.read(Part("models", i, number)), number)
            for chunk in header.chunks(layer):
                pairs.append(
                    _chunk(decoder, reader.read(Part("chunk", i, number, chunk)), chunk, number)
                )
            keys, values = zip(*pairs, strict=True)
            yield layer, np.concatenate(keys, 2), np.concatenate(values, 2)


def _floats(pair: Arrays, dtype: str) -> tuple[Floats, Floats]:
    return to_float32(pair[0], dtype), to_float32(pair[1], dtype)


def _chunk(decoder: LayerDecoder, data: bytes, chunk: int, level: int) -> tuple[Floats, Floats]:
    header = decoder.header
    if header.levels[level].step is None:
        return _floats(decoder.exact(data, chunk), header.dtype)
    return _floats(decoder.coded(data, chunk, level, decoder.turn(chunk)), header.dtype)
