"""The file of a stored cache: a front that says what every part is, then the parts.

The front has the header, and length and CRC-32 of every part, so a reader knows what it may skip, and any
flipped bit is refused.
`docs/format/cache.md` is the specification.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from waterfill.coding.cachegen_header import (
    Header,
    Part,
    description_of,
    header_of,
    parts_count,
    parts_of,
)
from waterfill.types import FormatError

__all__ = ["PartStream", "Reader", "Writer", "front_nbytes"]

MAGIC = b"\x89WFKV\r\n\x1a"
VERSION = 1
FRONT = struct.Struct("<8sIII")  # magic, version, bytes of the description, parts; then its CRC-32
ENTRY = np.dtype([("nbytes", "<u4"), ("crc", "<u4")])
MAX_DESCRIPTION, MAX_PARTS = 1 << 26, 1 << 26


class Writer:
    """Writes parts in order, to a temporary name; the front comes last, where room was left for it.

    As a context manager: the file has its name once the block is left without an error.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self._text = description_of(header)
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


def front_nbytes(header: Header) -> int:
    """Bytes before the first part."""
    return _front_nbytes(len(description_of(header)), parts_count(header))


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
        header = header_of(json.loads(body[:description]))
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
