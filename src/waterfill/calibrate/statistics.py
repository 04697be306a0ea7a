"""What calibration leaves behind: a folder that can be opened, moved and read tensor by tensor.

``statistics.json`` lists every item of the checkpoint in order, with its notes and the protocol;
``moments/*.safetensors`` hold one input second moment each (items with the same input share it);
``rows.safetensors`` holds all row weights; ``sample.safetensors`` a few windows of the text.
Opening it loads numpy only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.sources.folder import read_json
from waterfill.sources.safetensors_file import SafetensorsFile, open_safetensors
from waterfill.types import DTYPES, FormatError, TensorInfo, WaterfillError, Weighting

__all__ = ["Statistics"]

VERSION = 1
SAMPLE = "sample.safetensors"
UNUSED = "kept exact: the model that config.json describes does not use it"
REMEDY = "make statistics with: waterfill calibrate MODEL -o"


@dataclass(frozen=True)
class Statistics:
    """Second moments and sensitivities of a model, on disk.

    Attributes
    ----------
    folder : Path
    infos : item name -> TensorInfo, every tensor of the checkpoint once, in its order
    notes : item name ("" for the whole model) -> what should be known about it, in words
    source_name, source_path, source_fingerprint : str
        What was calibrated; the path is "" for a model in memory.
    protocol : texts, tokens, window, bos, method, seed
    digest : SHA-256 of ``statistics.json``
    """

    folder: Path
    infos: Mapping[str, TensorInfo]
    notes: Mapping[str, str]
    source_name: str
    source_path: str
    source_fingerprint: str
    protocol: Mapping[str, Any]
    digest: str
    _moments: Mapping[str, str] = field(repr=False)
    _rows: SafetensorsFile = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Statistics:
        """Open a folder that `calibrate` left; FormatError says what is wrong with it."""
        folder = Path(folder)
        path = folder / "statistics.json"
        if not path.is_file():
            unfinished = (folder / "partial").is_dir()
            raise WaterfillError(
                f"{folder} has no statistics.json"
                + (
                    "; its calibration was interrupted: run it again"
                    if unfinished
                    else f"; {REMEDY} {folder if not folder.exists() else 'STATS'}"
                )
            )
        table = read_json(path)
        if table.get("version") != VERSION:
            raise FormatError(
                f"{path} is of version {table.get('version')}, not {VERSION}; {REMEDY} STATS"
            )
        try:
            infos = {e["name"]: _info(e) for e in table["tensors"]}
            moments = {e["name"]: e["moment"] for e in table["tensors"] if "moment" in e}
            origin = table["source"]
            opened = cls(
                folder,
                infos,
                dict(table["notes"]),
                origin["name"],
                origin["path"],
                origin["fingerprint"],
                dict(table["protocol"]),
                hashlib.sha256(path.read_bytes()).hexdigest(),
                moments,
                open_safetensors(folder / "rows.safetensors"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} lacks or garbles {error}; {REMEDY} STATS") from error
        opened._check()
        return opened

    def is_weighted(self, name: str) -> bool:
        """Whether `weighting` has something to give, without reading it."""
        return name in self._moments

    def weighting(self, name: str) -> Weighting | None:
        """Local model of harm of an item, read when asked for; None: keep it exact."""
        info = self.infos[name]
        if name not in self._moments:
            return None
        rows = self._rows.read(name)
        _, n = info.matrix_shape
        moment = None
        if self._moments[name]:
            file = open_safetensors(self.folder / self._moments[name])
            moment = file.read("second_moment")
            if moment.shape not in ((n, n), (n,)) or moment.dtype != np.float32:
                raise FormatError(
                    f"{file.path}: {name} needs float32 {n} x {n}, not {moment.shape}"
                )
        return Weighting(moment, rows)

    @property
    def sample(self) -> NDArray[np.int64] | None:
        """Windows of the text (count, window) to measure a finished file on; None if not kept."""
        return self._windows("ids")

    @property
    def rest(self) -> NDArray[np.int64] | None:
        """All windows but the sample; None if not kept."""
        return self._windows("rest")

    def _windows(self, key: str) -> NDArray[np.int64] | None:
        path = self.folder / SAMPLE
        if not path.is_file():
            return None
        file = open_safetensors(path)
        if key == "rest" and (key not in file.tensors or 0 in file.tensors[key].shape):
            return None
        ids = file.read(key)
        if ids.ndim != 2 or ids.dtype != np.int64 or not ids.size:
            raise FormatError(f"{path} holds no windows of tokens; {REMEDY} STATS")
        return ids

    @property
    def unused(self) -> list[str]:
        """Matrices of the checkpoint that take no part in the model, as layers too many would."""
        return [
            name
            for name, info in self.infos.items()
            if len(info.shape) > 1 and not info.group and UNUSED in self.notes.get(name, "")
        ]

    def _check(self) -> None:
        for name, path in self._moments.items():
            m, _ = self.infos[name].matrix_shape
            span = self._rows.tensors.get(name)
            if span is None or span.dtype != "F32" or span.shape != (m,):
                raise FormatError(f"{self._rows.path}: {name} needs {m} row weights")
            if not isinstance(path, str) or (path and not _inside(path)):
                raise FormatError(f"{self.folder}: {name} has no proper moment file: {path!r}")


def _inside(path: str) -> bool:
    return Path(path).parent == Path("moments") and Path(path).suffix == ".safetensors"


def _info(entry: Mapping[str, Any]) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise FormatError(f"{entry['name']} has the unknown dtype {entry['dtype']}")
    return TensorInfo(
        str(entry["name"]),
        tuple(int(d) for d in entry["shape"]),
        entry["dtype"],
        str(entry["kind"]),
        str(entry.get("group", "")),
        None if entry.get("index") is None else int(entry["index"]),
        bool(entry.get("transposed", False)),
    )


def entry_of(info: TensorInfo) -> dict[str, Any]:
    """A TensorInfo as JSON, defaults left out."""
    entry: dict[str, Any] = {
        "name": info.name,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "kind": info.kind,
    }
    if info.group:
        entry["group"] = info.group
    if info.index is not None:
        entry["index"] = info.index
    if info.transposed:
        entry["transposed"] = True
    return entry


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
