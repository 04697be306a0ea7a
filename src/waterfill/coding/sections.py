"""Several byte strings in one: a LEB128 length before each but the last, which runs to the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from waterfill.types import FormatError

Buffer = TypeVar("Buffer", bytes, memoryview)


def join(sections: Sequence[bytes]) -> bytes:
    """Concatenate, each but the last preceded by its length."""
    out: list[bytes | bytearray] = []
    for section in sections[:-1]:
        length, prefix = len(section), bytearray()
        while length >= 0x80:
            prefix.append(length & 0x7F | 0x80)
            length >>= 7
        prefix.append(length)
        out += [prefix, section]
    return b"".join([*out, sections[-1]])


def split(data: Buffer, count: int) -> list[Buffer]:
    """Inverse of `join` for a known count, copying nothing of a memoryview.

    Raises
    ------
    FormatError
        Where a length leaves the data.
    """
    sections: list[Buffer] = []
    at = 0
    for _ in range(count - 1):
        length, shift = 0, 0
        while True:
            if at >= len(data) or shift > 56:
                raise FormatError("a section length is cut off")
            byte = data[at]
            at += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if length > len(data) - at:
            raise FormatError(f"a section of {length} bytes where {len(data) - at} are left")
        sections.append(data[at : at + length])
        at += length
    sections.append(data[at:])
    return sections
