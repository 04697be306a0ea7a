"""The vault: bytes <-> Encoded. It knows no codec.

The weights file is a valid safetensors file whose entries are all U8. Each part of a coded tensor
is an entry ``tensor//part``; the last entry, ``waterfill//index``, is a deflated JSON document that
describes the tensors. The header is a pure function of the index, so a reader rebuilds it and
compares: together with a CRC-32 of the index and of every part, any flipped bit is refused.
`docs/format/container.md` is the specification.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from waterfill.types import (
    DTYPES,
    Encoded,
    FormatError,
    Spec,
    TensorInfo,
    WaterfillError,
    is_shape,
)

__all__ = [
    "FILE_NAME",
    "MODEL",
    "PATCH",
    "Entry",
    "Reader",
    "chunks",
    "describe",
    "describe_entry",
    "file_nbytes",
    "format_of",
    "payload_nbytes",
    "write",
]

VERSION = 1
# What a file says it is, so that the changes to a model are never taken for a model.
MODEL, PATCH = "waterfill", "waterfill-patch"
FILE_NAME = "model.safetensors"
INDEX = "waterfill//index"
PARTS = "waterfill//parts"
MAX_HEADER_NBYTES = 100_000_000
MAX_INDEX_NBYTES = 400_000_000


@dataclass(frozen=True)
class Entry:
    """A coded tensor as the index describes it; its bytes stay in the file.

    Attributes
    ----------
    spec, info, extra : as in `Encoded`
    parts : part name -> (offset in the data section, length, CRC-32)
    note : mapping with what the ledger shows (why, predicted_nats)
    """

    spec: Spec
    info: TensorInfo
    extra: Mapping[str, Any]
    parts: Mapping[str, tuple[int, int, int]]
    note: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Payload bytes of all parts."""
        return sum(length for _, length, _ in self.parts.values())


def describe(encoded: Encoded, note: Mapping[str, Any]) -> dict[str, Any]:
    """The index entry of a coded tensor: all that `write` needs besides the bytes themselves."""
    info = encoded.info
    if not is_shape(info.shape):
        raise WaterfillError(f"{info.name}: no file here can hold the shape {list(info.shape)}")
    parts = {k: (0, len(v), zlib.crc32(v)) for k, v in encoded.parts.items()}
    return describe_entry(Entry(encoded.spec, info, encoded.extra, parts, note))


def describe_entry(entry: Entry) -> dict[str, Any]:
    """As `describe`, of what a file says of a tensor; offsets are left out."""
    info = entry.info
    described: dict[str, Any] = {
        "name": info.name,
        "codec": entry.spec.to_json(),
        "dtype": info.dtype,
        "shape": list(info.shape),
        "kind": info.kind,
        "parts": {k: [length, crc] for k, (_, length, crc) in entry.parts.items()},
    }
    optional = {
        "same_as": info.group,
        "index": info.index,
        "transposed": info.transposed,
        "extra": dict(entry.extra),
        "note": dict(entry.note),
    }
    absent: tuple[Any, ...] = (None, False, "", {})
    # By identity of kind, not by equality: slice 0 is not "no slice".
    return described | {
        k: v for k, v in optional.items() if not any(v == a and type(v) is type(a) for a in absent)
    }


def _header(described: Sequence[Mapping[str, Any]], index: bytes, format: str) -> bytes:
    """The safetensors header, a function of the index and of what the file is."""
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": format,
            "version": str(VERSION),
            "crc": f"{zlib.crc32(index):08x}",
        }
    }
    offset = 0
    for item in described:
        for part, (length, _) in item["parts"].items():
            key = f"{item['name']}//{part}"
            if key in entries or key == INDEX:
                raise FormatError(f"{key}: two parts of the file would have this name")
            entries[key] = _u8(offset, length)
            offset += length
    if format == PATCH:
        # An entry for each of many small changes would take more bytes than they do.
        entries = {"__metadata__": entries["__metadata__"], PARTS: _u8(0, offset)}
    entries[INDEX] = _u8(offset, len(index))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _u8(offset: int, length: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [length], "data_offsets": [offset, offset + length]}


def _front(
    described: Sequence[Mapping[str, Any]], about: Mapping[str, Any], format: str = MODEL
) -> tuple[bytes, bytes]:
    document = json.dumps({"about": about, "tensors": described}, separators=(",", ":"))
    index = zlib.compress(document.encode(), 9)
    return _header(described, index, format), index


def payload_nbytes(described: Mapping[str, Any]) -> int:
    """Bytes of all parts of one index entry."""
    return sum(length for length, _ in described["parts"].values())


def file_nbytes(described: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> int:
    """Exact size of the file that `write` would make."""
    header, index = _front(described, about)
    return len(header) + len(index) + sum(map(payload_nbytes, described))


def chunks(
    described: Sequence[Mapping[str, Any]],
    payloads: Iterable[Iterable[bytes]],
    about: Mapping[str, Any],
    format: str = MODEL,
) -> Iterator[bytes]:
    """The file that `write` makes, piece by piece; FormatError if it is not as described."""
    header, index = _front(described, about, format)
    yield header
    wrote = 0
    for parts in payloads:
        for part in parts:
            yield part
            wrote += len(part)
    expected = sum(map(payload_nbytes, described))
    if wrote != expected:
        raise FormatError(f"{wrote} bytes of tensors where {expected} were described")
    yield index


def write(
    path: Path,
    described: Sequence[Mapping[str, Any]],
    payloads: Iterable[Iterable[bytes]],
    about: Mapping[str, Any],
    format: str = MODEL,
) -> int:
    """Write the weights file (to a temporary name, then renamed); returns its size in bytes.

    Parameters
    ----------
    described : what `describe` returned, in the order of the checkpoint.
    payloads : for each of them its parts, in the order of its ``parts``; read once, one at a time,
        so a model larger than memory streams through.
    about : JSON-able provenance for the index.
    format : what the file is, `MODEL` or `PATCH`.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks(described, payloads, about, format):
                file.write(chunk)
            nbytes = file.tell()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return nbytes


class Reader:
    """Random access to a weights file; opening it checks header and index, `read` each part.

    Parameters
    ----------
    path : artifact folder, its weights file, or the bytes of one
    formats : what the file may be: `MODEL`, `PATCH`, or both
    """

    def __init__(
        self,
        path: Path | str | bytes | bytearray | memoryview,
        formats: Sequence[str] = (MODEL,),
    ) -> None:
        self._formats = formats
        if isinstance(path, (bytes, bytearray, memoryview)):
            self.path = Path("(bytes)")
            # A copy of what its owner may change while it is read; of bytes it is none.
            self._bytes: bytes | None = bytes(path)
            self._file: BinaryIO = io.BytesIO(self._bytes)
            self.nbytes = len(self._bytes)
        else:
            self._open_file(Path(path))
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open_file(self, path: Path) -> None:
        self._bytes = None
        self.path = path / FILE_NAME if path.is_dir() else path
        try:
            self._file = self.path.open("rb")
        except FileNotFoundError:
            what = "artifact" if MODEL in self._formats else "patch"
            raise FormatError(f"{self.path}: no such file; expected a waterfill {what}") from None
        self.nbytes = self.path.stat().st_size

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> None:
        header, raw = _read_header(self._file, self.nbytes, self.path)
        self._data_start = len(raw)
        index = self._index_bytes(header)
        document = _inflate(index, self.path)
        try:
            self.about: Mapping[str, Any] = document["about"]
            described = document["tensors"]
            rebuilt = _header(described, index, self.format)
            self.entries = dict(_entries(described))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{self.path}: the index is not as specified ({error!r})") from error
        if rebuilt != raw:
            raise FormatError(
                f"{self.path}: the header does not agree with the index; the file is damaged"
            )
        if len(self.entries) != len(described):
            raise FormatError(f"{self.path}: the index names a tensor twice")
        end = self._data_start + sum(e.nbytes for e in self.entries.values()) + len(index)
        if end != self.nbytes:
            raise FormatError(f"{self.path}: {self.nbytes} bytes where the header says {end}")
        self.overhead_nbytes = self.nbytes - sum(e.nbytes for e in self.entries.values())

    def _format_of(self, meta: Mapping[str, Any]) -> str:
        found = meta.get("format")
        if found in self._formats:
            return str(found)
        if found == PATCH:
            raise FormatError(
                f"{self.path}: a patch, not a model: apply it with waterfill patch BASE PATCH -o NEW"
            )
        if found == MODEL:
            raise FormatError(f"{self.path}: a compressed model, not a patch")
        raise FormatError(f"{self.path}: a safetensors file, but not one written by waterfill")

    def _index_bytes(self, header: Mapping[str, Any]) -> bytes:
        meta = header.get("__metadata__", {})
        self.format = self._format_of(meta if isinstance(meta, dict) else {})
        version = str(meta.get("version"))
        if version != str(VERSION):
            number = version if version.isascii() and version.isdecimal() else ""
            if len(number) > 9 or int(number or 0) > VERSION:
                raise FormatError(
                    f"{self.path}: container version {version[:20]} is newer than this waterfill reads "
                    f"({VERSION}); upgrade waterfill"
                )
            raise FormatError(f"{self.path}: unknown container version {version!r}")
        try:
            start, end = header[INDEX]["data_offsets"]
            if type(start) is not int or type(end) is not int:
                raise FormatError(f"{self.path}: the index has no proper place")
            length = end - start
            position = self._data_start + start
            if not 0 <= length <= self.nbytes - position or start < 0:
                raise FormatError(
                    f"{self.path}: the index lies outside the file; it is truncated or damaged"
                )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{self.path}: the header has no index") from error
        index = self._pread(position, length)
        if f"{zlib.crc32(index):08x}" != meta.get("crc"):
            raise FormatError(f"{self.path}: the index fails its checksum; the file is damaged")
        return index

    def _pread(self, position: int, length: int) -> bytes:
        if self._bytes is not None:
            return self._bytes[position : position + length]
        data = os.pread(self._file.fileno(), length, position)
        while len(data) < length:  # one call returns at most 2 GiB
            more = os.pread(self._file.fileno(), length - len(data), position + len(data))
            if not more:
                raise FormatError(f"{self.path}: ends before its header says it does")
            data += more
        return data

    def read(self, name: str) -> Encoded:
        """The coded tensor of this name; FormatError if a part fails its checksum."""
        entry = self.entries[name]
        parts = {part: self._part(entry, part) for part in entry.parts}
        return Encoded(entry.spec, entry.info, parts, entry.extra)

    def _part(self, entry: Entry, part: str) -> bytes:
        offset, length, crc = entry.parts[part]
        data = self._pread(self._data_start + offset, length)
        if zlib.crc32(data) != crc:
            raise FormatError(
                f"{self.path}: {entry.info.name} ({part}) fails its checksum; the file is damaged"
            )
        return data

    def cut(self, name: str, lengths: Mapping[str, int], note: Mapping[str, Any]) -> Entry:
        """An entry with the beginnings of some of its parts only, and a note that says more.

        A part that is cut is read and checked, for the checksum of what is left of it.
        """
        entry = self.entries[name]
        parts = {}
        for part, length in lengths.items():
            offset, whole, crc = entry.parts[part]
            if length < whole:
                crc = zlib.crc32(self._part(entry, part)[:length])
            parts[part] = (offset, length, crc)
        return dataclasses.replace(entry, parts=parts, note={**entry.note, **note})

    def nbytes_with(self, entries: Mapping[str, Entry]) -> int:
        """Size of the file in which some entries of `cut` are in place of those there are."""
        described = [describe_entry(entry) for entry in {**self.entries, **entries}.values()]
        return file_nbytes(described, self.about)

    def narrow(self, entries: Mapping[str, Entry]) -> None:
        """From now on be that file."""
        self.nbytes = self.nbytes_with(entries)
        self.entries.update(entries)
        self.overhead_nbytes = self.nbytes - sum(e.nbytes for e in self.entries.values())

    def verify(self) -> Iterator[str]:
        """Check every part, yielding each tensor's name once it has passed."""
        for name in self.entries:
            self.read(name)
            yield name


def format_of(path: Path) -> str:
    """What a safetensors file says of itself: `MODEL`, `PATCH`, or another word, or nothing.

    Whether it is sound, `Reader` finds out.
    """
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        try:
            header, _ = _read_header(file, path.stat().st_size, path)
        except FormatError:
            return ""
    meta = header.get("__metadata__")
    return str(meta.get("format")) if isinstance(meta, dict) else ""


def _read_header(file: BinaryIO, nbytes: int, path: Path) -> tuple[dict[str, Any], bytes]:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(nbytes - 8, MAX_HEADER_NBYTES):
        raise FormatError(f"{path}: not a safetensors file, or truncated")
    raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not JSON") from error
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is not a JSON object")
    return header, prefix + raw


def _inflate(index: bytes, path: Path) -> Any:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(index, MAX_INDEX_NBYTES)
        if not inflater.eof or inflater.unused_data:
            raise FormatError(f"{path}: the index is longer than it may be")
        document = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the index cannot be read ({error})") from error
    if not isinstance(document, dict):
        raise FormatError(f"{path}: the index is not a JSON object")
    return document


_FIELDS: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "codec": (list,),
    "dtype": (str,),
    "shape": (list,),
    "kind": (str,),
    "parts": (dict,),
    "same_as": (str,),
    "index": (int,),
    "transposed": (bool,),
    "extra": (dict,),
    "note": (dict,),
}
_OPTIONAL = {"same_as", "index", "transposed", "extra", "note"}


def _entries(described: list[dict[str, Any]]) -> Iterator[tuple[str, Entry]]:
    offset = 0
    for item in described:
        _check_item(item)
        info = TensorInfo(
            name=item["name"],
            shape=tuple(item["shape"]),
            dtype=item["dtype"],
            kind=item["kind"],
            group=item.get("same_as", ""),
            index=item.get("index"),
            transposed=item.get("transposed", False),
        )
        parts = {}
        for part, (length, crc) in item["parts"].items():
            if not _count(length, 2**62) or not _count(crc, 2**32):
                raise FormatError(f"{info.name}: {part} has no proper length or checksum")
            parts[part] = (offset, length, crc)
            offset += length
        spec = Spec.from_json(item["codec"])
        yield info.name, Entry(spec, info, item.get("extra", {}), parts, item.get("note", {}))


def _check_item(item: dict[str, Any]) -> None:
    if not _FIELDS.keys() - _OPTIONAL <= item.keys() <= _FIELDS.keys():
        raise FormatError(f"the index has an entry with other fields than it may: {sorted(item)}")
    for key, value in item.items():
        if type(value) not in _FIELDS[key]:
            raise FormatError(f"{item['name']!r}: {key} may not be {value!r}")
    name, shape = item["name"], item["shape"]
    if item["dtype"] not in DTYPES:
        raise FormatError(f"{name}: unknown dtype {item['dtype']!r}")
    if not all(type(d) is int for d in shape) or not is_shape(shape):
        raise FormatError(f"{name}: {shape} is no shape")
    if "index" in item and (item["index"] < 0 or not name.endswith(f"[{item['index']}]")):
        raise FormatError(f"{name}: is not the name of slice {item['index']}")
    if "same_as" in item and item["parts"]:
        raise FormatError(f"{name}: repeats another tensor and yet has parts")


def _count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit
