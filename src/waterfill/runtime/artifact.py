"""The folder around the weights file: what the ecosystem expects to find in it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from waterfill.container import FILE_NAME, Entry, Reader
from waterfill.registry import make_codec
from waterfill.sources import Source
from waterfill.sources.folder import may_lie_beside
from waterfill.types import FormatError, Record, WaterfillError

RECORD_FILE = "waterfill.json"
METHOD = "waterfill"
ORIGINAL = "original"  # where our entry in config.json keeps the one that it replaces
# transformers takes a method that it does not know for none and would fill a model with random
# numbers. This key names a weights file; what is no such name it refuses, and quotes.
WEIGHTS_KEY = "transformers_weights"
WEIGHTS_WORDS = "weights coded by waterfill: pip install waterfill, then import waterfill before from_pretrained"
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# By one of these a folder is known as a model's or its statistics: only such a one is replaced.
MARKS = ("config.json", FILE_NAME, f"{FILE_NAME}.index.json", RECORD_FILE, "statistics.json")


def folder_of(path: str | Path) -> Path:
    """The artifact's folder, whether a user named it or the weights file in it."""
    path = Path(path)
    return path.parent if path.name == FILE_NAME and path.is_file() else path


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
        replace(temporary, out)
    except OSError as error:
        raise explain(error, out) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace(new: Path, out: Path) -> None:
    """Rename folder `new` to `out`; what was there before is removed only once `new` is in place."""
    old = out.with_name(out.name + ".old")
    if not (out.exists() or out.is_symlink()):
        new.replace(out)
        return
    _remove(old)
    out.replace(old)
    try:
        new.replace(out)
    except BaseException:
        old.replace(out)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(out: Path, force: bool, inputs: Iterable[Path | None] = ()) -> None:
    """WaterfillError if `out` is there already and may not be replaced.

    Even `force` replaces only what looks like the product of an earlier run, and never the
    folder one stands in or one of the `inputs`.
    """
    old = out.with_name(out.name + ".old") if out.name else out
    if old.is_dir() and not out.exists():  # a run was killed between two renamings
        old.replace(out)
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise WaterfillError(f"{out} exists; choose another name or replace it with --force")
    place = out.resolve()
    for used in (Path.cwd(), *(p for p in inputs if p is not None)):
        if place == used.resolve() or place in used.resolve().parents:
            raise WaterfillError(f"{out} is in use by this very run; choose another name")
    if place.is_dir() and not _may_replace(place):
        raise WaterfillError(
            f"{out} holds other things than a model, which --force would delete; choose another name"
        )


def _may_replace(folder: Path) -> bool:
    """Whether a folder is empty, a model's, or holds weights and what lies beside them alone."""
    found = list(folder.iterdir())
    weights = [path for path in found if path.suffix == ".safetensors"]
    return (
        not found
        or any((folder / mark).exists() for mark in MARKS)
        or (bool(weights) and all(p.is_file() and _belongs(p.name) for p in found))
    )


def _belongs(name: str) -> bool:
    return name.endswith((".safetensors", ".index.json")) or may_lie_beside(name)


def explain(error: OSError, path: Path) -> WaterfillError:
    """A plain sentence for what the file system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WaterfillError(
            f"the disk is full; nothing was written to {path}. Free some space and run again"
        )
    why = error.strerror or str(error)
    if error.filename and not str(Path(error.filename).absolute()).startswith(str(path.absolute())):
        return WaterfillError(f"{error.filename}: {why}")
    return WaterfillError(f"cannot write {path}: {why}")


def write_config(
    folder: Path, config: Mapping[str, Any], dtype: str | None = None, **wish: str | int | None
) -> None:
    """config.json with the entry by which loaders recognise a waterfill artifact.

    Parameters
    ----------
    config : of the original
    dtype : torch's name of the tensors' dtype, for a configuration that does not say it
    wish : ``residency`` or ``memory`` that the model is loaded with unless told otherwise
    """
    if config:
        entry: dict[str, Any] = {"quant_method": METHOD, "container_version": 1}
        entry |= {k: v for k, v in wish.items() if v is not None}
        if dtype is not None and not {"dtype", "torch_dtype"} & config.keys():
            entry["dtype"] = dtype
        kept = {key: config[key] for key in (WEIGHTS_KEY,) if key in config}
        if "quantization_config" in config:
            entry[ORIGINAL] = config["quantization_config"]
        if kept:
            entry["replaced"] = kept
        ours = {"quantization_config": entry, WEIGHTS_KEY: WEIGHTS_WORDS}
        text = json.dumps({**config, **ours}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it was before `write_config`."""
    plain = dict(config)
    entry = plain.pop("quantization_config", None)
    if not isinstance(entry, dict):
        return plain
    if entry.get("quant_method") == METHOD:
        plain.pop(WEIGHTS_KEY, None)
    if ORIGINAL in entry:
        plain["quantization_config"] = entry[ORIGINAL]
    replaced = entry.get("replaced")
    return plain | replaced if isinstance(replaced, dict) else plain


def wishes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an artifact's config.json says of how to load it: ``residency`` or ``memory``."""
    entry = config.get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
        return {}
    return {k: entry[k] for k in ("residency", "memory") if entry.get(k) is not None}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an artifact, or WaterfillError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = None
    except (ValueError, RecursionError) as error:
        raise WaterfillError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise WaterfillError(
            f"{folder} has no proper config.json; waterfill.load gives its arrays all the same"
        )
    return config


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
                **_told(entry),
            }
        )
    container = {
        "name": "(container)",
        "kind": "",
        "codec": "",
        "shape": [],
        "params": 0,
        "nbytes": reader.overhead_nbytes,
        "original_nbytes": 0,
        "bits_per_weight": 0,
        "predicted_nats": 0,
        "why": "header and index",
    }
    return [*rows, container]


def _told(entry: Entry) -> dict[str, Any]:
    """What a tensor's note says, if it is what notes say: sums and tables are made of it."""
    nats, why = entry.note.get("nats", 0.0), entry.note.get("why", "")
    number = type(nats) is float or (type(nats) is int and abs(nats) < 1 << 53)
    if not number or math.isnan(nats) or type(why) is not str:
        raise FormatError(f"{entry.info.name}: its note is not as specified")
    return {"predicted_nats": nats, "why": why}


def plan_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of which tensor was coded how: equal plans have equal digests."""
    choices = json.dumps([[r["name"], r["codec"]] for r in rows])
    return hashlib.sha256(choices.encode()).hexdigest()[:16]


def furnish(folder: Path, source: Source, record: Record) -> None:
    """Put around the weights file what an artifact needs: the model's own files, record, card."""
    for file in source.files_beside:
        if file.name not in ("README.md", "config.json"):
            shutil.copyfile(file, folder / file.name)
    write_config(folder, source.config, _dtype_of(source))
    stored = {**dataclasses.asdict(record), "ledger": ()}
    write_record(folder, stored)
    write_card(folder, stored)


def _dtype_of(source: Source) -> str | None:
    """What transformers would take for the model's dtype: that of the first tensor of floats."""
    floats = [dtype for dtype, _ in source.tensors.values() if dtype in _TORCH_NAMES]
    return _TORCH_NAMES[floats[0]] if floats else None


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """README.md: a model card that says what was done and what it cost."""
    about = record["about"]
    ratio = record["nbytes"] / max(about["original_nbytes"], 1)
    size = f"{record['nbytes']:,} bytes ({ratio:.1%} of the original weights"
    if "budget_nbytes" in about:
        title = f"{record['bits_per_weight']:.2f} bits per weight"
        harm = record["predicted"]["kl_nats"]
        done = f"""{size}; {about["budget_nbytes"]:,} were
allowed). Predicted harm: {harm:.4g} nats of KL per token."""
    else:
        title = "lossless"
        done = f"""{size}).
Nothing was changed: every tensor comes back bit for bit."""
    base = f"base_model: {about['model']}\n" if "/" in about["model"] and not about["local"] else ""
    text = f"""---
library_name: waterfill
tags:
- waterfill
- compressed
{base}---
# {about["model"]}, {title}

Compressed by [waterfill](https://pypi.org/project/waterfill) {about["waterfill"]} to
{done}

    {about["command"]}

The weights are coded: load them with waterfill imported.

    pip install waterfill

    import waterfill
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")

Any `AutoModel` class and `pipeline` work the same way; `waterfill.load_model` needs no class. Without the
import, `from_pretrained` stops with an error that says so; it never makes up weights. Set
`WATERFILL_RESIDENCY=packed` (fast) or `coded` (smallest) to keep the weights compressed in memory.

`waterfill decompress FOLDER -o DIR` gives a plain checkpoint.
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
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WaterfillError(f"{path} is not JSON; remove it or compress again") from error
    if not isinstance(record, dict):
        raise WaterfillError(f"{path} is not a record; remove it or compress again")
    return record
