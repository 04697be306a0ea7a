"""What a stored cache says of itself: its header, and the parts that follow, layer by layer.

Keys and values of a prefix, at one or more levels of quality, in chunks of tokens: each chunk of each
level of each layer is a part that can be had without the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from waterfill.types import FLOAT_DTYPES

__all__ = [
    "Header",
    "Layer",
    "Level",
    "Part",
    "Rotation",
    "description_of",
    "header_of",
    "parts_count",
    "parts_of",
]

MAX_CHUNK_NUMBERS = 1 << 28  # of a chunk of a layer: bounds what a reader holds
MAX_TOKENS = 1 << 32


@dataclass(frozen=True)
class Rotation:
    """Pairs of a key's dimensions that turn with its position, and how fast, in radians per token."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    frequencies: tuple[float, ...]


@dataclass(frozen=True)
class Level:
    """A quality: `step` of all components in units of a root of a nat; None: bit for bit."""

    name: str
    step: float | None


@dataclass(frozen=True)
class Layer:
    """One layer's share.

    Attributes
    ----------
    index : of the layer in the model
    heads, key_width, value_width : of its keys and values
    start : the first token that it has; 0 but for layers with a window
    first : so many tokens from there are kept as they were, at every level
    rotation : index into the header's rotations; None: keys do not turn
    """

    index: int
    heads: int
    key_width: int
    value_width: int
    start: int
    first: int
    rotation: int | None

    @property
    def numbers(self) -> int:
        """Numbers of a token's key and value."""
        return self.heads * (self.key_width + self.value_width)


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes
    ----------
    model, tokenizer : fingerprints in hexadecimal; no tokenizer: None
    dtype : of keys and values, a float dtype of safetensors
    batch, tokens : rows, and tokens of each
    chunk : tokens of a chunk; chunk c has tokens c * chunk to (c + 1) * chunk
    levels, layers, rotations : see there
    runs : (token where it begins, position less token index for each row or for all)
    """

    model: str
    tokenizer: str | None
    dtype: str
    batch: int
    tokens: int
    chunk: int
    levels: tuple[Level, ...]
    layers: tuple[Layer, ...]
    rotations: tuple[Rotation, ...]
    runs: tuple[tuple[int, tuple[int, ...]], ...]

    def chunks(self, layer: Layer) -> range:
        """Numbers of a layer's chunks."""
        coded = layer.start + layer.first
        return range(coded // self.chunk if coded < self.tokens else self.count, self.count)

    @property
    def count(self) -> int:
        """Chunks of a layer that has all tokens."""
        return -(-self.tokens // self.chunk)

    def span(self, layer: Layer, chunk: int) -> tuple[int, int]:
        """First token of a chunk in a layer, and the one after its last."""
        first = max(layer.start + layer.first, chunk * self.chunk)
        return first, min(self.tokens, (chunk + 1) * self.chunk)

    def number(self, name: str | None) -> int:
        """Number of the level of this name; None: the finest. KeyError lists what there is."""
        if name is None:
            steps = [level.step or 0.0 for level in self.levels]
            return steps.index(min(steps))
        names = [level.name for level in self.levels]
        if name not in names:
            raise KeyError(f"no level is called {name!r}; there are: {', '.join(names)}")
        return names.index(name)


@dataclass(frozen=True)
class Part:
    """What a part is: token ids, or of a layer its table, its first tokens, a level's models, a chunk."""

    kind: str
    layer: int | None = None  # index into the header's layers
    level: int | None = None
    chunk: int | None = None


def parts_of(header: Header) -> Iterator[Part]:
    """All parts in the order of the file."""
    yield Part("ids")
    for i, layer in enumerate(header.layers):
        yield Part("table", i)
        yield Part("first", i)
        yield from (Part("models", i, level) for level in range(len(header.levels)))
        for chunk in header.chunks(layer):
            yield from (Part("chunk", i, level, chunk) for level in range(len(header.levels)))


def parts_count(header: Header) -> int:
    """How many parts there are."""
    levels = len(header.levels)
    return 1 + sum(2 + levels * (1 + len(header.chunks(one))) for one in header.layers)


def description_of(header: Header) -> bytes:
    """A header as JSON."""
    text = json.dumps(asdict(header), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode()


def header_of(found: Mapping[str, Any]) -> Header:
    """A header from its JSON; ValueError says what is wrong."""
    layers = tuple(Layer(**one) for one in found["layers"])
    levels = tuple(Level(**one) for one in found["levels"])
    rotations = tuple(
        Rotation(tuple(one["first"]), tuple(one["second"]), tuple(one["frequencies"]))
        for one in found["rotations"]
    )
    runs = tuple((start, tuple(offsets)) for start, offsets in found["runs"])
    plain = {k: found[k] for k in ("model", "tokenizer", "dtype", "batch", "tokens", "chunk")}
    if set(found) != {*plain, "layers", "levels", "rotations", "runs"}:
        raise ValueError("a description of other members")
    header = Header(**plain, layers=layers, levels=levels, rotations=rotations, runs=runs)
    _check_header(header)
    return header


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _count(value: Any, low: int, high: int, what: str) -> None:
    _need(type(value) is int and low <= value <= high, what)


def _check_header(header: Header) -> None:
    _need(type(header.model) is str, "model")
    _need(header.tokenizer is None or type(header.tokenizer) is str, "tokenizer")
    _need(header.dtype in FLOAT_DTYPES, "dtype")
    _count(header.batch, 1, 1 << 20, "batch")
    _count(header.tokens, 1, MAX_TOKENS, "tokens")
    _count(header.chunk, 1, 1 << 20, "chunk")
    _need(bool(header.levels) and bool(header.layers), "levels and layers")
    names = [level.name for level in header.levels]
    _need(all(type(name) is str for name in names) and len(set(names)) == len(names), "level names")
    for level in header.levels:
        step = level.step
        _need(step is None or (type(step) is float and 0 < step < math.inf), "step")
    for rotation in header.rotations:
        _check_rotation(rotation)
    for layer in header.layers:
        _check_layer(layer, header)
    _check_runs(header)


def _check_rotation(rotation: Rotation) -> None:
    pairs = len(rotation.first)
    _need(len(rotation.second) == pairs == len(rotation.frequencies), "pairs")
    used = [*rotation.first, *rotation.second]
    for one in used:
        _count(one, 0, 1 << 16, "pairs")
    _need(len(set(used)) == len(used), "pairs")
    _need(all(type(f) is float and math.isfinite(f) for f in rotation.frequencies), "frequencies")


def _check_layer(layer: Layer, header: Header) -> None:
    for value in (layer.heads, layer.key_width, layer.value_width):
        _count(value, 1, 1 << 16, "shape")
    _count(layer.index, 0, 1 << 20, "layer index")
    _count(layer.start, 0, header.tokens - 1, "start")
    _count(layer.first, 0, header.tokens - layer.start, "first")
    together = max(min(header.chunk, header.tokens), layer.first)
    _need(header.batch * together * layer.numbers <= MAX_CHUNK_NUMBERS, "chunk size")
    if layer.rotation is not None:
        _count(layer.rotation, 0, len(header.rotations) - 1, "rotation")
        one = header.rotations[layer.rotation]
        _need(max([*one.first, *one.second], default=0) < layer.key_width, "pairs")


def _check_runs(header: Header) -> None:
    starts = [start for start, _ in header.runs]
    for start, offsets in header.runs:
        _count(start, 0, header.tokens - 1, "runs")
        _need(len(offsets) in (1, header.batch), "runs")
        for offset in offsets:
            _count(offset, -MAX_TOKENS, MAX_TOKENS, "runs")
    _need(starts[:1] == [0] and starts == sorted(set(starts)), "runs")
