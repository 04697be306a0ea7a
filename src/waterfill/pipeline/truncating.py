"""A smaller artifact from a larger one, without the model or any text: layers of quality left out."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from waterfill.container import FILE_NAME, Reader, describe_entry, write
from waterfill.plan.budget import budget_nbytes
from waterfill.runtime import artifact
from waterfill.runtime.sizing import narrow
from waterfill.types import Record

WRITTEN = (FILE_NAME, artifact.RECORD_FILE, "README.md", "report.html")


def truncate(
    path: str | Path,
    out: str | Path,
    *,
    size: str | int | None = None,
    bits: float | None = None,
    ratio: str | float | None = None,
    force: bool = False,
    command: str = "waterfill.truncate(...)",
) -> Record:
    """Write an artifact of at most some size, by leaving out what another one can spare.

    Parameters
    ----------
    path : artifact folder with tensors in layers, as ``compress(codec={"*": "stack"})`` makes it
    out : folder to make
    size, bits, ratio : the size, exactly one of them, as of `waterfill.compress`; one that is larger
        than the artifact's own leaves it whole
    force : replace `out` if it exists

    Returns
    -------
    Record

    Raises
    ------
    BudgetError
        If the artifact cannot be so small; it states the least.
    WaterfillError
        If `out` exists, or the artifact is damaged; nothing is left at `out`.
    """
    folder, out = artifact.folder_of(path), Path(out)
    artifact.refuse_existing(out, force, [folder])
    with artifact.new_folder(out, force) as new, Reader(folder) as reader:
        before = reader.nbytes
        infos = [entry.info for entry in reader.entries.values()]
        params = sum(info.size for info in infos if not info.group)
        budget = budget_nbytes(
            params=params,
            original_nbytes=sum(info.nbytes for info in infos),
            size=size,
            bits=bits,
            ratio=ratio,
        )
        narrow(reader, budget)
        payloads = (reader.read(name).parts.values() for name in reader.entries)
        described = [describe_entry(entry) for entry in reader.entries.values()]
        write(new / FILE_NAME, described, payloads, reader.about)
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name not in WRITTEN:
                shutil.copyfile(file, new / file.name)
        facts = {"budget_nbytes": budget, "command": command, "cut_from_nbytes": before}
        return _finish(new, out.name, params, artifact.read_record(folder), facts)


def _finish(
    folder: Path, name: str, params: int, stored: dict[str, Any], facts: dict[str, Any]
) -> Record:
    """Check the file as written; its record and card are the larger one's, with what has changed."""
    with Reader(folder / FILE_NAME) as reader:
        for _ in reader.verify():
            pass
        rows = artifact.ledger(reader)
        nbytes = reader.nbytes
    facts = {**facts, "plan_digest": artifact.plan_digest(rows)}
    record = Record(
        name=name,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / max(params, 1),
        predicted={"kl_nats": sum(r["predicted_nats"] for r in rows)},
        ledger=tuple(rows),
        curve=tuple(stored.get("curve", ())),
        about={**stored.get("about", {}), **facts},
    )
    if stored:
        kept = {**dataclasses.asdict(record), "ledger": ()}
        artifact.write_record(folder, kept)
        artifact.write_card(folder, kept)
    return record
