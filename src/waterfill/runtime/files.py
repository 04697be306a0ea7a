"""The files a checkpoint came in: remembered in the index, given back byte for byte.

An artifact holds tensors. Whoever checks a sum of the original's files needs more: which tensor was
in which file, each header as it was written, and the few texts that ours take the place of. The
index keeps them under ``files`` and ``texts`` of its ``about`` (docs/format/files.md). Like all that
is read from a file they may lie: names must be plain, and headers those of the tensors that are there.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waterfill.sources.folder import FolderSource
from waterfill.sources.safetensors_file import SafetensorsFile, parse_header
from waterfill.types import DTYPES, FormatError

__all__ = [
    "OriginalFile",
    "check_name",
    "header_of",
    "original_files",
    "original_texts",
    "remember",
]

Infos = Mapping[str, tuple[str, tuple[int, ...]]]

# What an artifact has one of its own of, or has no use for.
REPLACED = ("README.md", "config.json", "waterfill.json")
INDEX_SUFFIX = ".index.json"
TEXT_SUFFIXES = (".md", ".json")
LONGEST_NAME_NBYTES = 255


@dataclass(frozen=True)
class OriginalFile:
    """A safetensors file as it was: its header, and its tensors in the order of their bytes."""

    name: str
    header: bytes
    tensors: Infos


def remember(source: FolderSource) -> dict[str, Any]:
    """What the index must say for `original_files` and `original_texts` to give it all back."""
    files = [_describe(file) for file in source.files]
    texts = {
        path.name: path.read_bytes().decode("utf-8", "surrogateescape")
        for path in sorted(source.path.iterdir())
        if path.is_file() and (path.name in REPLACED or path.name.endswith(INDEX_SUFFIX))
    }
    return {"files": files} | ({"texts": texts} if texts else {})


def _describe(file: SafetensorsFile) -> dict[str, Any]:
    infos = {name: (span.dtype, span.shape) for name, span in file.tensors.items()}
    check_name(file.path.name, (".safetensors",))
    described: dict[str, Any] = {"name": file.path.name, "tensors": len(infos)}
    if header_of(infos, file.metadata) != file.header:
        return described | {"header": file.header.decode("utf-8")}
    return described | ({"metadata": dict(file.metadata)} if file.metadata else {})


def header_of(infos: Infos, metadata: Mapping[str, str]) -> bytes:
    """The header that the safetensors library writes for tensors in the order of their bytes."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, info in infos.items():
        end = offset + nbytes_of(info)
        table[name] = {"dtype": info[0], "shape": list(info[1]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
        data = json.dumps(table, separators=(",", ":")).encode()
    return data + b" " * (-len(data) % 8)


def nbytes_of(info: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return math.prod(info[1]) * DTYPES[info[0]].itemsize


def original_files(about: Mapping[str, Any], infos: Infos) -> list[OriginalFile]:
    """The files that the tensors of an artifact came in; [] where none are remembered.

    Raises
    ------
    FormatError
        If a name is not that of a file in a folder, or a header is not that of the tensors.
    """
    listed = about.get("files", []) if isinstance(about, dict) else []
    if not isinstance(listed, list):
        raise FormatError("the index has no proper list of original files")
    rest = iter(infos.items())
    files = [_file(item, rest) for item in listed]
    if len({file.name for file in files}) != len(files):
        raise FormatError("the index names an original file twice")
    if files and any(rest):
        raise FormatError("the index has tensors that were in none of the original files")
    return files


def _file(item: Any, rest: Iterator[tuple[str, tuple[str, tuple[int, ...]]]]) -> OriginalFile:
    match item:
        case {"name": str(name), "tensors": int(count), **other} if (
            type(count) is int
            and 0 <= count < 2**48
            and other.keys() <= {"header", "metadata"}
            and len(other) < 2
        ):
            check_name(name, (".safetensors",))
        case _:
            raise FormatError("the index has no proper description of an original file")
    infos = dict(itertools.islice(rest, count))
    if len(infos) != count:
        raise FormatError(f"{name}: the index has fewer tensors than were in this file")
    return OriginalFile(name, _header(name, other, infos), infos)


def _header(name: str, other: Mapping[Any, Any], infos: Infos) -> bytes:
    metadata, text = other.get("metadata", {}), other.get("header")
    if not isinstance(metadata, dict):
        raise FormatError(f"{name}: the index has no proper metadata of this file")
    try:
        header = header_of(infos, metadata) if text is None else text.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise FormatError(f"{name}: the index has no proper header of this file") from error
    size = 8 + len(header) + sum(map(nbytes_of, infos.values()))
    parsed = parse_header(Path(name), header, size)
    if [(n, (s.dtype, s.shape)) for n, s in parsed.tensors.items()] != list(infos.items()):
        raise FormatError(f"{name}: its header is not that of the tensors in it")
    return header


def original_texts(about: Mapping[str, Any]) -> dict[str, bytes]:
    """Name -> content of the texts that an artifact has its own in place of."""
    texts = about.get("texts", {})
    if not isinstance(texts, dict):
        raise FormatError("the index has no proper table of original texts")
    found = {}
    for name, text in texts.items():
        check_name(name, TEXT_SUFFIXES)
        try:
            found[name] = text.encode("utf-8", "surrogateescape")
        except (AttributeError, UnicodeEncodeError) as error:
            raise FormatError(f"{name}: the index has no proper text of this file") from error
    return found


def check_name(name: str, suffixes: Iterable[str]) -> None:
    """FormatError unless a file of this name lies in its folder, is not hidden, and ends as it should."""
    try:
        plain = len(os.fsencode(name)) <= LONGEST_NAME_NBYTES
    except UnicodeEncodeError:
        plain = False
    plain = plain and not set(name) & set("/\\:\0") and not name.startswith(".")
    if not plain or not name.endswith(tuple(suffixes)):
        raise FormatError(f"{name!r} is no name that an original file may have")
