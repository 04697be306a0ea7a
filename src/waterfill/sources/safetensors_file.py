"""Reading a safetensors file, strictly, without mapping it into memory.

The layout (https://github.com/huggingface/safetensors#format): a little-endian u64 with the length
of the header, the header as a JSON object, then the tensors' bytes without holes. A mapped file
would count as resident memory page by page; here each tensor is read into its own array and
belongs to the caller.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.types import DTYPES, Array, FormatError, WaterfillError, is_shape

__all__ = ["SafetensorsFile", "TensorSpan", "open_safetensors", "parse_header"]

MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorSpan:
    """One tensor of a file: dtype (a key of `DTYPES`), shape, and its bytes [start, end)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header has been read and believed; tensors are read when asked for.

    Every read opens the file anew, so one object may serve many threads.

    Attributes
    ----------
    path : Path
    tensors : tensor name -> TensorSpan, in order of their bytes
    metadata : str -> str
    header : bytes
        The JSON as stored.
    """

    path: Path
    tensors: Mapping[str, TensorSpan]
    metadata: Mapping[str, str]
    header: bytes

    def read(self, name: str) -> Array:
        """A tensor in the storage form of `DTYPES`, shape as stored."""
        span = self.tensors[name]
        return self._read(name, span.dtype, span.shape, span.start)

    def read_slice(self, name: str, index: int) -> Array:
        """Entry `index` along the first axis."""
        span = self.tensors[name]
        if not span.shape or not 0 <= index < span.shape[0]:
            raise IndexError(f"{name}: no slice {index} in shape {span.shape}")
        shape = span.shape[1:]
        nbytes = math.prod(shape) * DTYPES[span.dtype].itemsize
        return self._read(name, span.dtype, shape, span.start + index * nbytes)

    def read_bytes(self, name: str, offset: int, nbytes: int) -> bytes:
        """Some of a tensor's bytes, as stored; fewer where the tensor ends."""
        span = self.tensors[name]
        offset = min(max(offset, 0), span.end - span.start)
        with self.path.open("rb") as file:
            file.seek(span.start + offset)
            return file.read(min(nbytes, span.end - span.start - offset))

    def _read(self, name: str, dtype: str, shape: tuple[int, ...], start: int) -> Array:
        array: Array = np.empty(shape, DTYPES[dtype])
        if array.nbytes:
            view = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                while len(view):  # the system may hand over less than was asked for
                    got = file.readinto(view)
                    if not got:
                        raise FormatError(f"{self.path}: the file ended inside tensor {name}")
                    view = view[got:]
        return array


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check a header; FormatError says what is wrong with it, and with which tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise FormatError(f"{path}: {size} bytes are too few for a safetensors file")
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER or 8 + length > size:
                raise FormatError(
                    f"{path}: not a safetensors file, or cut short: its header claims {length} "
                    f"bytes and the file has {size}"
                )
            header = file.read(length)
    except OSError as error:
        raise WaterfillError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_header(path, header, size)


def parse_header(path: Path, header: bytes, size: int) -> SafetensorsFile:
    """Check the header of a file of `size` bytes; FormatError as of `open_safetensors`."""
    table = _parse(path, header)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map names to strings")
    base = 8 + len(header)
    spans = {name: _span(path, name, entry, base) for name, entry in table.items()}
    spans = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)))
    at = base
    for name, span in spans.items():
        if span.start != at:
            what = "overlaps the tensor before it" if span.start < at else "leaves a hole before it"
            raise FormatError(f"{path}: tensor {name} {what}")
        at = span.end
    if at != size:
        raise FormatError(
            f"{path}: tensors end at byte {at} but the file has {size}: "
            + ("it was cut short" if at > size else "it has bytes that belong to no tensor")
        )
    return SafetensorsFile(path, spans, metadata, header)


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise FormatError(f"{path}: {twice!r} appears twice in the header")
        return table

    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise FormatError(f"{path}: the header is not a JSON object")
    return table


def _span(path: Path, name: str, entry: Any, base: int) -> TensorSpan:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if (
            all(type(number) is int for number in (*shape, start, end))
        ):
            pass
        case _:
            raise FormatError(f"{path}: tensor {name} has no proper dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise FormatError(f"{path}: tensor {name} has dtype {dtype}, which waterfill does not know")
    if not is_shape(shape):
        raise FormatError(f"{path}: tensor {name} has a shape that no array has")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if start < 0 or end - start != nbytes:
        raise FormatError(
            f"{path}: tensor {name} of {dtype} {shape} takes {nbytes} bytes, not {end - start}"
        )
    return TensorSpan(dtype, tuple(shape), base + start, base + end)
