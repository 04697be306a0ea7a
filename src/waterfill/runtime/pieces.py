"""Encoded tensors on disk while a run is under way: what makes an interrupted run resume."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waterfill.container import describe
from waterfill.types import Encoded, FormatError, Point


class Pieces:
    """A folder of content-addressed pieces: one index entry and its payload each.

    A piece's address covers the model's and the statistics' fingerprints, the tensor and the full
    codec specification, so a piece found is the piece wanted. Pieces are written to a temporary
    name and renamed.
    """

    def __init__(self, folder: Path, context: str) -> None:
        self.folder = folder
        self.context = context

    def _path(self, name: str, point: Point) -> Path:
        key = json.dumps([self.context, name, point.spec.to_json()])
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:32]

    def get(self, name: str, point: Point) -> dict[str, Any] | None:
        """The index entry of a piece, or None if it was never made, or has been damaged since."""
        path = self._path(name, point)
        if not path.exists():
            return None
        with path.open("rb") as file:
            try:
                described: dict[str, Any] = json.loads(file.readline())
                sound = all(
                    zlib.crc32(file.read(length)) == crc
                    for length, crc in described["parts"].values()
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                return None
            return described if sound and not file.read(1) else None

    def put(
        self, name: str, point: Point, encoded: Encoded, note: dict[str, Any]
    ) -> dict[str, Any]:
        """Store a piece; returns its index entry."""
        path = self._path(name, point)
        described = describe(encoded, note)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as file:
            file.write(json.dumps(described).encode() + b"\n")
            for part in encoded.parts.values():
                file.write(part)
        temporary.replace(path)
        return described

    def payload(self, name: str, point: Point) -> Iterator[bytes]:
        """The parts of a piece, in order."""
        with self._path(name, point).open("rb") as file:
            described = json.loads(file.readline())
            for length, _ in described["parts"].values():
                data = file.read(length)
                if len(data) != length:
                    raise FormatError(
                        f"{name}: a piece of unfinished work was cut off; run the same command again"
                    )
                yield data
