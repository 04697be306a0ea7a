"""The file of a stored cache: a front that says what every part is, then the parts, layer by layer.

Keys and values of a prefix, at one or more levels of quality, in chunks of tokens: each chunk of each
level of each layer is a part that can be had without the others. The front has length and CRC-32 of
every part, so a reader knows what it may skip, and any flipped bit is refused.
`docs/format/cache.md` is the specification.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from waterfill.types import FLOAT_DTYPES, FormatError

__all__ = [
    "Header",
    "Layer",
    "Level",
    "Part",
    "PartStream",
    "Reader",
    "Rotation",
    "Writer",
    "front_nbytes",
    "parts_of",
]

MAGIC = b"\x89WFKV\r\n\x1a"
VERSION = 1
FRONT = struct.Struct("<8sIII")  # magic, version, bytes of the description, parts; then its CRC-32
ENTRY = np.dtype([("nbytes", "<u4"), ("crc", "<u4")])
MAX_DESCRIPTION, MAX_PARTS = 1 << 26, 1 << 26
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


class Writer:
    """Writes parts in order, to a temporary name; the front comes last, where room was left for it.

    As a context manager: the file has its name once the block is left without an error.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self._text = _description(header)
        self._count = parts_count(header)
        self._front = FRONT.pack(MAGIC, VERSION, len(self._text), self._count)
        self._entries = np.zeros(self._count, ENTRY)
        self._at = 0
        self._temporary = path.with_name(path.name + ".partial")
        self._file = self._temporary.open("wb")
        self._file.seek(_front_nbytes(len(self._text), self._count))

    def add(self, data: bytes) -> None:
        """The next part."""
        self._entries[self._at] = len(data), zlib.crc32(data)
        self._file.write(data)
        self._at += 1

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._at != self._count:
            raise FormatError(f"{self._at} parts where {self._count} were described")
        body = self._text + self._entries.tobytes()
        self._file.seek(0)
        self._file.write(self._front + _crc(self._front) + body + _crc(body))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._temporary.replace(self.path)


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _description(header: Header) -> bytes:
    text = json.dumps(asdict(header), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode()


def front_nbytes(header: Header) -> int:
    """Bytes before the first part."""
    return _front_nbytes(len(_description(header)), parts_count(header))


def _front_nbytes(description: int, count: int) -> int:
    return FRONT.size + 4 + description + ENTRY.itemsize * count + 4


class PartStream:
    """Takes a file's bytes as they come, gives its parts as they are complete.

    Parameters
    ----------
    wanted : which parts to give, asked once the header is there; others are passed over, unchecked
    name : of the file, for messages
    """

    def __init__(
        self, wanted: Callable[[Header, Part], bool] = lambda header, part: True, name: str = "stream"
    ) -> None:  # fmt: skip
        self._wanted, self._name = wanted, name
        self._buffer = bytearray()
        self.header: Header | None = None
        self._parts: Iterator[Part] = iter(())
        self._entries = np.zeros(0, ENTRY)
        self._next = 0
        self._part: Part | None = None
        self._skip = 0

    @property
    def done(self) -> bool:
        """Whether the file has come to its end."""
        return self.header is not None and self._next == len(self._entries) and not self._skip

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[Part, bytes]]:
        """More bytes; whatever parts they complete, each checked.

        Raises
        ------
        FormatError
            If they are not those of such a file.
        """
        self._buffer += data
        if self.header is None and not self._open():
            return
        at = 0
        try:
            while True:
                if self._skip:
                    gone = min(self._skip, len(self._buffer) - at)
                    at, self._skip = at + gone, self._skip - gone
                if self._skip or self._next == len(self._entries):
                    break
                nbytes, crc = (int(x) for x in self._entries[self._next])
                part = self._part or next(self._parts)
                self._part = part
                assert self.header is not None
                if not self._wanted(self.header, part):
                    self._skip = nbytes
                elif nbytes > len(self._buffer) - at:
                    break
                else:
                    found = bytes(self._buffer[at : at + nbytes])
                    at += nbytes
                    check(found, nbytes, crc, self._name, part)
                    yield part, found
                self._part = None
                self._next += 1
        finally:
            del self._buffer[:at]
        if self.done and self._buffer:
            raise FormatError(f"{self._name}: bytes after the end of a stored cache")

    def close(self) -> None:
        """Say that there are no more bytes; FormatError if some are missing."""
        if not self.done:
            raise FormatError(f"{self._name}: a stored cache that is cut short")

    def _open(self) -> bool:
        if len(self._buffer) < FRONT.size + 4:
            return False
        description, count = read_front(bytes(self._buffer[: FRONT.size + 4]), self._name)
        nbytes = _front_nbytes(description, count)
        if len(self._buffer) < nbytes:
            return False
        body = bytes(self._buffer[FRONT.size + 4 : nbytes])
        self.header, self._entries = read_description(body, description, count, self._name)
        self._parts = parts_of(self.header)
        del self._buffer[:nbytes]
        return True


def check(data: bytes, nbytes: int, crc: int, name: str, part: Part) -> None:
    """FormatError if a part is not what the front says."""
    if len(data) != nbytes or zlib.crc32(data) != crc:
        raise FormatError(f"{name}: a part fails its checksum ({part}); the file is damaged")


def read_front(front: bytes, name: str) -> tuple[int, int]:
    """Bytes of the description, and number of parts."""
    if front[:8] != MAGIC:
        raise FormatError(f"{name}: not a stored cache")
    if len(front) < FRONT.size + 4 or _crc(front[: FRONT.size]) != front[FRONT.size :]:
        raise FormatError(f"{name}: the front fails its checksum; the file is damaged")
    _, version, description, count = FRONT.unpack(front[: FRONT.size])
    if version != VERSION:
        raise FormatError(f"{name}: a stored cache of version {version}; this reads {VERSION}")
    if description > MAX_DESCRIPTION or count > MAX_PARTS:
        raise FormatError(f"{name}: a front of unlikely size")
    return description, count


def read_description(body: bytes, description: int, count: int, name: str) -> tuple[Header, Any]:
    """The header, and (length, CRC-32) of each part."""
    if _crc(body[:-4]) != body[-4:]:
        raise FormatError(f"{name}: the index fails its checksum; the file is damaged")
    try:
        header = _header(json.loads(body[:description]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{name}: the description is not as specified ({error!r})") from error
    if parts_count(header) != count:
        raise FormatError(f"{name}: {count} parts where {parts_count(header)} are described")
    return header, np.frombuffer(body, ENTRY, count, description)


class Reader:
    """Random access to the parts of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except FileNotFoundError:
            raise FormatError(f"{path}: no such file; expected a stored cache") from None
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        self.nbytes = self.path.stat().st_size
        name = str(self.path)
        description, count = read_front(self._file.read(FRONT.size + 4), name)
        front = _front_nbytes(description, count)
        if front > self.nbytes:
            raise FormatError(f"{name}: a stored cache that is cut short")
        body = self._file.read(front - FRONT.size - 4)
        self.header, self._entries = read_description(body, description, count, name)
        ends = front + np.cumsum(self._entries["nbytes"], dtype=np.int64)
        if int(ends[-1]) != self.nbytes:
            raise FormatError(f"{name}: {self.nbytes} bytes where its front says {int(ends[-1])}")
        self._starts = ends - self._entries["nbytes"]
        self.numbers: Mapping[Part, int] = {p: i for i, p in enumerate(parts_of(self.header))}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def part_nbytes(self, part: Part) -> int:
        """Bytes of a part."""
        return int(self._entries["nbytes"][self.numbers[part]])

    def read(self, part: Part) -> bytes:
        """A part, checked."""
        at = self.numbers[part]
        self._file.seek(int(self._starts[at]))
        data = self._file.read(int(self._entries["nbytes"][at]))
        self.check(part, data)
        return data

    def check(self, part: Part, data: bytes) -> None:
        """FormatError if a part is not what the front says."""
        nbytes, crc = (int(x) for x in self._entries[self.numbers[part]])
        check(data, nbytes, crc, str(self.path), part)


def _header(found: Mapping[str, Any]) -> Header:
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
