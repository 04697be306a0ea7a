"""Prices of a model's tensors, kept beside its statistics: each rung is priced once, whatever asks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self, TextIO

from waterfill import __version__
from waterfill.calibrate import Statistics
from waterfill.registry import Codec
from waterfill.types import Point, Spec


class PriceList:
    """What is known of (tensor, rung) pairs, in memory and as lines of a file."""

    def __init__(self, known: dict[tuple[str, str], Point], file: TextIO) -> None:
        self._known, self._file = known, file

    @classmethod
    @contextlib.contextmanager
    def open(cls, statistics: Statistics, write: bool) -> Iterator[Self]:
        """The list of these statistics; what is priced is kept if `write` and the folder allow it."""
        key = hashlib.sha256(f"{__version__} {statistics.digest}".encode()).hexdigest()[:16]
        path = statistics.folder / f"prices-{key}.jsonl"
        known = dict(_read(path))
        keep = write and os.access(statistics.folder, os.W_OK)
        with (path if keep else Path(os.devnull)).open("a", encoding="utf-8") as file:
            if keep and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                file.write("\n")  # an interrupt cut the last line off
            yield cls(known, file)

    def points(
        self,
        name: str,
        rungs: Sequence[Codec],
        price: Callable[[list[Codec]], list[Point]],
    ) -> list[Point]:
        """A point for each rung, in order; `price` is asked for those that are not known."""
        new = [rung for rung in rungs if (name, _key(rung.spec)) not in self._known]
        if new:
            found = price(new)
            self._known |= {(name, _key(p.spec)): p for p in found}
            rows = [[p.nbytes, p.distortion_nats, p.spec.to_json()] for p in found]
            self._file.write(json.dumps([name, rows]) + "\n")
            self._file.flush()
        return [self._known[name, _key(rung.spec)] for rung in rungs]


def _key(spec: Spec) -> str:
    return json.dumps(spec.to_json(), sort_keys=True)


def _read(path: Path) -> Iterator[tuple[tuple[str, str], Point]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            name, rows = json.loads(line)
            points = [Point(nbytes, nats, Spec.from_json(spec)) for nbytes, nats, spec in rows]
        except ValueError:
            continue  # the line that an interrupt cut off; it is priced again
        yield from (((name, _key(point.spec)), point) for point in points)
