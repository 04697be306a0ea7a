"""A patch as it lies in its file: which model it is for, what it makes of it, tensor by tensor."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.coding import delta
from waterfill.container import PATCH, Entry, Reader
from waterfill.runtime.arrays import unpack
from waterfill.types import DTYPES, Array, Encoded, FormatError, Spec, TensorInfo, WaterfillError

__all__ = ["CHANGES", "FILE", "MAX_FILE_NBYTES", "Patch", "as_integers", "most_nbytes"]

FILE = "waterfill//file/"  # begins the name of an entry that is a file beside the weights
MAX_FILE_NBYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
CHANGES = ("delta", "xor")  # codecs that need the old tensor
_MODES = {"deflate": "file", "lossless": "whole, lossless", "raw": "whole, raw"}

Info = tuple[str, tuple[int, ...]]


class Patch:
    """An open patch; its index has been checked, each tensor is when it is read.

    Attributes
    ----------
    base, result : digest of the model it is for, and of the model it makes
    entries : tensor name -> container entry of what changes or is new
    removed : names of tensors that the result lacks
    files : name and safetensors header of each weights file of the result; None where the patch
        was made from tensors in memory
    beside : name -> [bytes, digest] of each file beside the result's weights, or None
    """

    def __init__(self, patch: str | Path | bytes | bytearray | memoryview) -> None:
        self._reader = Reader(patch, (PATCH,))
        try:
            self._open(self._reader.about)
        except BaseException:
            self._reader.close()
            raise

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def _open(self, about: Mapping[str, Any]) -> None:
        self.path = self._reader.path
        match about:
            case {"base": str(base), "result": str(result), "removed": [*removed]} if (
                _DIGEST.fullmatch(base)
                and _DIGEST.fullmatch(result)
                and all(isinstance(name, str) for name in removed)
            ):
                self.base, self.result, self.removed = base, result, frozenset(removed)
            case _:
                raise FormatError(f"{self.path}: the index does not say which models this is for")
        self.files: list[Any] | None = about.get("files")
        self.beside: dict[str, Any] | None = about.get("beside")
        if not isinstance(self.files, list | None) or not isinstance(self.beside, dict | None):
            raise FormatError(f"{self.path}: the index lists files in another way than it may")
        self.entries = {n: e for n, e in self._reader.entries.items() if e.info.kind != "file"}
        for name, entry in self.entries.items():
            group = entry.info.group
            if group and not _alike(entry, self.entries.get(group)):
                raise FormatError(
                    f"{self.path}: {name} repeats {group!r}, which is not in it or is another"
                )
            if name in self.removed:
                raise FormatError(f"{self.path}: {name} is both changed and removed")

    @property
    def nbytes(self) -> int:
        """Bytes of the whole patch."""
        return self._reader.nbytes

    def ledger(self) -> list[dict[str, Any]]:
        """One row for each tensor and file, one for the container; their bytes sum to the patch."""
        rows = []
        for name, entry in self._reader.entries.items():
            info, mode = entry.info, entry.spec.id
            rows.append(
                {
                    "name": name.removeprefix(FILE) if info.kind == "file" else name,
                    "mode": f"same as {info.group}" if info.group else _MODES.get(mode, mode),
                    "shape": list(info.shape),
                    "nbytes": entry.nbytes,
                    "changed": _share(entry.note.get("changed")),
                }
            )
        for name in sorted(self.removed):
            rows.append(
                {"name": name, "mode": "removed", "shape": [], "nbytes": 0, "changed": None}
            )
        rest: dict[str, Any] = {"name": "(container)", "mode": "", "shape": [], "changed": None}
        return [*rows, rest | {"nbytes": self._reader.overhead_nbytes}]

    def require_base(self, found: str) -> None:
        """WaterfillError unless this is the digest of the model the patch is for."""
        if found == self.base:
            return
        has = "already the model it makes" if found == self.result else "not the model it is for"
        raise WaterfillError(
            f"{self.path}: this patch is for {self.base[:8]}, you gave {found[:8]}: {has}"
        )

    def require_result(self, found: str) -> None:
        """FormatError unless this is the digest of the model the patch promises."""
        if found != self.result:
            raise FormatError(
                f"{self.path}: makes {found[:8]} where it promises {self.result[:8]}; the patch is "
                "damaged, and nothing was changed"
            )

    def infos(self, before: Mapping[str, Info]) -> dict[str, Info]:
        """(dtype, shape) of each tensor once the patch is applied to tensors like these."""
        if not self.removed <= before.keys():
            raise FormatError(f"{self.path}: removes {sorted(self.removed - before.keys())[0]!r}")
        after = {n: (e.info.dtype, e.info.shape) for n, e in self.entries.items()}
        made = sum(
            self.entries[n].info.nbytes for n, info in after.items() if before.get(n) != info
        )
        coded = self.nbytes - self._reader.overhead_nbytes
        if made > most_nbytes(coded):
            raise FormatError(f"{self.path}: promises {made} bytes that are new, in {coded}")
        return {n: i for n, i in before.items() if n not in self.removed} | after

    def restore(self, name: str, old: Array | None, before: Info | None) -> Array:
        """The new bits of a tensor, given the old (None for one that is new)."""
        entry = self.entries[name]
        encoded = self._reader.read(name)
        mode = entry.spec.id
        if mode not in CHANGES:
            return unpack(encoded)
        if entry.spec.version != 1:
            raise FormatError(f"{name}: {mode} version {entry.spec.version} is not known")
        if old is None or before != (entry.info.dtype, entry.info.shape):
            raise FormatError(f"{name}: changes a tensor that the base does not have")
        if mode == "xor":
            return _xor(encoded, old)
        try:
            return delta.decode(encoded.parts["delta"], old, entry.info.dtype)
        except KeyError as error:
            raise FormatError(f"{name}: the part {error} is missing") from error
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error

    def file(self, name: str) -> bytes | None:
        """A file beside the weights, or None if the patch does not carry it."""
        entry = self._reader.entries.get(FILE + name)
        if entry is None or entry.info.kind != "file":
            return None
        data = b"".join(self._reader.read(FILE + name).parts.values())
        inflater = zlib.decompressobj()
        try:
            text = inflater.decompress(data, MAX_FILE_NBYTES + 1)
        except zlib.error as error:
            raise FormatError(f"{self.path}: {name} cannot be inflated ({error})") from error
        if not inflater.eof or inflater.unused_data or len(text) != entry.info.nbytes:
            raise FormatError(f"{self.path}: {name} is not as long as it should be")
        return text


def _alike(entry: Entry, first: Entry | None) -> bool:
    """Whether an entry can repeat another: one that stands for itself, of the same shape and dtype."""
    return (
        first is not None
        and not first.info.group
        and (first.info.dtype, first.info.shape) == (entry.info.dtype, entry.info.shape)
    )


def _share(noted: Any) -> float | None:
    return noted if type(noted) in (int, float) and 0 <= noted <= 1 else None


def most_nbytes(coded: int) -> int:
    """What a patch of so many coded bytes may add to its base: constants could promise any size."""
    return (1 << 30) + (coded << 12)


def as_integers(info: TensorInfo) -> TensorInfo:
    """The same tensor with its words as unsigned integers."""
    return replace(info, dtype=f"U{8 * DTYPES[info.dtype].itemsize}")


def _xor(encoded: Encoded, old: Array) -> Array:
    try:
        spec = Spec.from_json(encoded.spec.config.get("of"))
    except FormatError as error:
        raise FormatError(f"{encoded.info.name}: {error}") from error
    info = as_integers(encoded.info)
    change = unpack(replace(encoded, spec=spec, info=info))
    return np.asarray(change ^ old.view(change.dtype)).view(old.dtype)
