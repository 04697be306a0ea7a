"""The folder around the weights file: what the ecosystem expects to find in it."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from waterfill.container import Reader
from waterfill.types import WaterfillError, make_codec

RECORD_FILE = "waterfill.json"


@contextlib.contextmanager
def new_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder under a temporary name that becomes `out` only if the body succeeds.

    Raises
    ------
    WaterfillError
        If `out` exists and `force` is not set, or the disk is full.
    """
    refuse_existing(out, force)
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.is_dir() and not out.is_symlink():
            shutil.rmtree(out)
        else:
            out.unlink(missing_ok=True)
        temporary.replace(out)
    except OSError as error:
        raise explain(error, out) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(out: Path, force: bool) -> None:
    """WaterfillError if `out` is there already and may not be replaced."""
    if (out.exists() or out.is_symlink()) and not force:
        raise WaterfillError(f"{out} exists; choose another name or replace it with --force")


def explain(error: OSError, path: Path) -> WaterfillError:
    """A plain sentence for what the file system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WaterfillError(
            f"the disk is full; nothing was written to {path}. Free some space and run again"
        )
    return WaterfillError(f"cannot write {path}: {error.strerror or error}")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json with the entry by which loaders recognise a waterfill artifact."""
    if config:
        entry = {"quant_method": "waterfill", "container_version": 1}
        text = json.dumps({**config, "quantization_config": entry}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def ledger(reader: Reader) -> list[dict[str, Any]]:
    """One row per tensor and one for the container; their bytes sum to the file."""
    rows: list[dict[str, Any]] = []
    for name, entry in reader.entries.items():
        info = entry.info
        rows.append(
            {
                "name": name,
                "kind": info.kind,
                "codec": f"same as {info.group}" if info.group else str(make_codec(entry.spec)),
                "shape": list(info.shape),
                "params": 0 if info.group else info.size,
                "nbytes": entry.nbytes,
                "original_nbytes": info.nbytes,
                "bits_per_weight": 8 * entry.nbytes / info.size if info.size else 0.0,
                "predicted_nats": entry.note.get("nats", 0.0),
                "why": entry.note.get("why", ""),
            }
        )
    container = dict.fromkeys(rows[0], 0) if rows else {}
    words = {"name": "(container)", "kind": "", "codec": "", "shape": [], "why": "header and index"}
    return [*rows, container | words | {"nbytes": reader.overhead_nbytes}]


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """README.md: a model card that says what was done and what it cost."""
    about = record["about"]
    bits, ratio = record["bits_per_weight"], record["nbytes"] / max(about["original_nbytes"], 1)
    base = f"base_model: {about['model']}\n" if "/" in about["model"] and not about["local"] else ""
    text = f"""---
library_name: waterfill
tags:
- waterfill
- compressed
{base}---
# {about["model"]}, {bits:.2f} bits per weight

Compressed by [waterfill](https://pypi.org/project/waterfill) {about["waterfill"]} to
{record["nbytes"]:,} bytes ({ratio:.1%} of the original weights; {about["budget_nbytes"]:,} were
allowed). Predicted harm: {record["predicted"]["kl_nats"]:.4g} nats of KL per token.

    {about["command"]}

The weights are coded. Loading this folder with a library that does not know waterfill would give
random weights: load it with

    import waterfill
    model = waterfill.load_model("path/to/this/folder")

or turn it back into a plain checkpoint with `waterfill decompress FOLDER -o DIR`.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """waterfill.json: the run's record, for `show`, `report` and whoever asks later."""
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """The record beside the weights, or {} where there is none."""
    path = folder / RECORD_FILE
    if not path.exists():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WaterfillError(f"{path} is not JSON; remove it or compress again") from error
    return record
