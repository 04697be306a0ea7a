"""Running sums on disk, so that one block's are in memory at a time and work can resume."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.types import Array

__all__ = ["Sums", "open_sums", "write_json"]

PIECE = 1 << 17  # numbers added at a time

Moment = tuple[int, int]  # (batch, event within the batch): later events compare greater


def write_json(path: Path, value: Any) -> None:
    """Write to a temporary name, then rename."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
    scratch.replace(path)


@dataclass(frozen=True)
class Sums:
    """A folder of sums; each file says up to which event it has counted."""

    folder: Path

    @property
    def batches(self) -> int:
        """Batches that are entirely in."""
        path = self.folder / "batches.json"
        return int(json.loads(path.read_text())) if path.is_file() else 0

    def finish_batch(self, count: int) -> None:
        """Say that `count` batches are in."""
        write_json(self.folder / "batches.json", count)

    def add(
        self, key: str, at: Moment, about: Mapping[str, Any], make: Callable[[], dict[str, Array]]
    ) -> None:
        """Add arrays to those under a key, unless they are in already (after an interruption)."""
        path = self._path(key)
        if path.is_file() and tuple(_header(path)["at"]) >= at:
            return
        held = make()
        if path.is_file():
            _add_file(path, held)
        header = {"key": key, "at": at, "about": about}
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        with scratch.open("wb") as file:
            np.savez(file, header=np.array(json.dumps(header)), **held)  # type: ignore[arg-type]
        scratch.replace(path)

    def read(self, key: str) -> dict[str, Array]:
        """The arrays under a key; {} if there are none."""
        path = self._path(key)
        if not path.is_file():
            return {}
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name != "header"}

    def all(self) -> dict[str, Any]:
        """Key -> what `add` was told about it."""
        found = {}
        for path in sorted(self.folder.glob("*.npz")):
            header = _header(path)
            found[header["key"]] = header["about"]
        return found

    def _path(self, key: str) -> Path:
        return self.folder / (hashlib.sha256(key.encode()).hexdigest()[:24] + ".npz")


def _header(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        header: dict[str, Any] = json.loads(str(file["header"]))
    return header


def _add_file(path: Path, arrays: dict[str, Array]) -> None:
    """Add a file's arrays to those of the same name, piece by piece: a moment fits memory once."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            with archive.open(member) as stream:
                if name == "header":
                    continue
                if name not in arrays:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
                    continue
                np.lib.format.read_magic(stream)
                _, _, dtype = np.lib.format.read_array_header_1_0(stream)
                arrays[name] = np.asarray(arrays[name], order="C")
                flat = arrays[name].reshape(-1)
                for start in range(0, flat.size, PIECE):
                    part = flat[start : start + PIECE]
                    part += np.frombuffer(stream.read(part.size * dtype.itemsize), dtype)


def open_sums(folder: Path, protocol: Mapping[str, Any]) -> Sums:
    """Sums made under the same protocol are continued; any others are thrown away."""
    about = folder / "protocol.json"
    if folder.is_dir():
        same = about.is_file() and json.loads(about.read_text()) == json.loads(json.dumps(protocol))
        if same:
            return Sums(folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(about, protocol)
    return Sums(folder)
