"""An artifact opened at a smaller size than its own: layers of quality left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from waterfill.container import Entry, Reader
from waterfill.plan.budget import parse_size
from waterfill.plan.layers import Prefixes, fit, keep, nats_at
from waterfill.registry import make_codec
from waterfill.runtime.arrays import damage_of
from waterfill.types import BudgetError

__all__ = ["CUT", "narrow", "open_at", "prefixes_of"]

CUT = "cut to size"


def open_at(path: Path | str, size: str | int | None = None) -> Reader:
    """An artifact, as if it had been cut to so many bytes before.

    Parameters
    ----------
    path : artifact folder or its weights file
    size : bytes, or text such as ``3MB``, that the file may have; None for all of it

    Raises
    ------
    BudgetError
        If it cannot be had in so little; it states the least.
    """
    reader = Reader(path)
    try:
        if size is not None:
            narrow(reader, parse_size(size) if isinstance(size, str) else size)
    except BaseException:
        reader.close()
        raise
    return reader


def prefixes_of(reader: Reader) -> dict[str, Prefixes]:
    """What can be kept of each tensor that is coded in layers."""
    found = {}
    for name, entry in reader.entries.items():
        if entry.info.group:
            continue
        with damage_of(name):
            layers = make_codec(entry.spec).layers(_sizes(entry), entry.extra, entry.info)
        if layers is not None:
            found[name] = layers
    return found


def narrow(reader: Reader, budget: int) -> None:
    """Have an open file stand for its own beginning: the best one of at most so many bytes."""
    if budget >= reader.nbytes:
        return
    prefixes = prefixes_of(reader)
    if not prefixes:
        raise BudgetError(
            f"none of this artifact's tensors can be read in part, so that it has one size alone: "
            f"{reader.nbytes:,} bytes, where {budget:,} were allowed; compress again to a smaller one, "
            "or with --codec '*=stack' to one that can be cut"
        )

    def file_nbytes(kept: Mapping[str, int]) -> int:
        return reader.nbytes_with(_cut(reader, prefixes, kept))

    kept = fit(prefixes, budget, file_nbytes)
    if kept is None:
        raise BudgetError(
            f"{budget:,} bytes is too small: what cannot be left out takes "
            f"{file_nbytes(keep(prefixes, 0)):,}"
        )
    reader.narrow(_cut(reader, prefixes, kept))


def _cut(
    reader: Reader, prefixes: Mapping[str, Prefixes], kept: Mapping[str, int]
) -> dict[str, Entry]:
    """Entries of the tensors of which less is kept than there is."""
    cut = {}
    for name, nbytes in kept.items():
        entry = reader.entries[name]
        if nbytes < entry.nbytes:
            with damage_of(name):
                lengths = make_codec(entry.spec).truncate(
                    _sizes(entry), entry.extra, entry.info, nbytes
                )
            why = str(entry.note.get("why", ""))
            nats = float(f"{nats_at(prefixes[name], sum(lengths.values())):.4g}")
            note = {"why": why if why.endswith(CUT) else f"{why}; {CUT}", "nats": nats}
            cut[name] = reader.cut(name, lengths, note)
    return cut


def _sizes(entry: Entry) -> dict[str, int]:
    return {part: length for part, (_, length, _) in entry.parts.items()}
