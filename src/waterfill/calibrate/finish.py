"""Turns finished sums into the Statistics folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.calibrate.assemble import Evidence, Role, Square, combine, product_role
from waterfill.calibrate.loader import Loader
from waterfill.calibrate.names import Placement, place
from waterfill.calibrate.statistics import UNUSED, VERSION, Statistics, entry_of
from waterfill.calibrate.sums import write_json
from waterfill.types import FLOAT_DTYPES, TensorInfo, WaterfillError, Weighting

__all__ = ["finish"]

Item = tuple[str, int | None]
# Items that are one tensor, what is known of it, a first weighting -> factor for its rows
Rescale = Callable[[list[Item], TensorInfo, Weighting], float]


@dataclass
class _Writer:
    """Writes second moments, each once."""

    folder: Path
    evidence: Evidence
    written: dict[tuple[str, ...], tuple[str, int]] = field(default_factory=dict)
    count: int = 0

    def square(self, square: Square) -> tuple[str, int]:
        """(path within the folder, inputs that were always zero); "" for the identity."""
        if square.keys and square.keys in self.written:
            return self.written[square.keys]
        mean = self.evidence.square(square)
        if mean is None:
            return "", 0
        values = mean.astype(np.float32)
        del mean
        if not np.isfinite(values).all():
            raise WaterfillError(f"inputs overflow: the moment of {square.keys} is not finite")
        path = f"moments/{self.count:05}.safetensors"
        self.count += 1
        save({"second_moment": values}, self.folder / path)
        result = path, int((np.diagonal(values) == 0).sum())
        if square.keys:
            self.written[square.keys] = result
        return result


def save(tensors: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write safetensors to a temporary name, then rename."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(tensors), scratch)
    scratch.replace(path)


def finish(
    loader: Loader,
    folder: Path,
    evidence: Evidence,
    protocol: Mapping[str, Any],
    notes: list[str],
    fingerprint: str,
    rescale: Rescale | None = None,
) -> Statistics:
    """Normalise the sums, give each item of the checkpoint its weighting, and write it all."""
    source = loader.source
    shapes = {name: shape for name, (_, shape) in source.tensors.items()}
    groups = source.duplicates()
    roles = _roles(loader, evidence, shapes)
    for name, first in groups.items():
        for item in [i for i in roles if i[0] == name]:
            # Stored once, under the name of the first: that one bears the harm of both.
            roles.setdefault((first, item[1]), []).extend(roles[item])
    writer = _Writer(folder, evidence)
    entries: list[dict[str, Any]] = []
    rows: dict[str, NDArray[np.float32]] = {}
    remarks: dict[str, str] = {"": "; ".join(notes)} if any(notes) else {}
    used = {file for job in loader.all_jobs for file in job.files}
    for name, (dtype, shape) in source.tensors.items():
        slices = sorted(i for n, i in roles if n == name and i is not None)
        whole = range(shape[0]) if slices else [None]
        for index in whole:
            label = name if index is None else f"{name}[{index}]"
            own = shape if index is None else shape[1:]
            found = roles.get((name, index), []) if dtype in FLOAT_DTYPES else []
            words: list[str] = []
            entry: dict[str, Any] = {}
            kind, transposed = "other", False
            if found:
                role = _agree(evidence, found)
                kind, transposed = role.kind, role.transposed
                if rescale is not None and name not in groups:
                    info = TensorInfo(label, own, dtype, kind, "", index, transposed)
                    square = evidence.square(role.square)
                    first_guess = Weighting(
                        None if square is None else square.astype(np.float32),
                        role.rows.astype(np.float32),
                    )
                    same = [(name, index), *((n, index) for n, f in groups.items() if f == name)]
                    role = replace(role, rows=role.rows * rescale(same, info, first_guess))
                rows[label] = role.rows.astype(np.float32)
                if not np.isfinite(rows[label]).all():
                    raise WaterfillError(
                        f"the gradients at {label} overflow; calibrate with method='none'"
                    )
                path, silent = writer.square(role.square)
                entry["moment"] = path
                words += role.notes
                if silent:
                    words.append(f"{silent} of its {_inputs(role, own)} inputs were always zero")
            else:
                kind = _kind(loader, name, own)
                if name not in used:
                    words.append(UNUSED)
                elif len(own) > 1:
                    words.append("no product with a gradient was seen: kept exact")
            group = groups.get(name, "")
            if group and index is not None:
                group = f"{group}[{index}]"
            info = TensorInfo(label, own, dtype, kind, group, index, transposed)
            entries.append({**entry_of(info), **entry})
            if words:
                remarks[label] = "; ".join(dict.fromkeys(words))
    save(rows or {"": np.zeros(0, np.float32)}, folder / "rows.safetensors")
    write_json(
        folder / "statistics.json",
        {
            "version": VERSION,
            "source": {
                "name": source.name,
                "path": "" if source.path is None else str(source.path.resolve()),
                "fingerprint": fingerprint,
            },
            "protocol": protocol,
            "notes": remarks,
            "tensors": entries,
        },
    )
    return Statistics.open(folder)


def _roles(
    loader: Loader, evidence: Evidence, shapes: Mapping[str, tuple[int, ...]]
) -> dict[Item, list[Role]]:
    placed = place(loader.all_jobs, shapes, loader.model)
    roles: dict[Item, list[Role]] = {}
    for (name, index), placements in placed.items():
        parameter = placements[0].parameter
        if any(use.kind == "conv" for use, _ in evidence.uses.get((parameter, 0), [])):
            continue  # three dimensions, but not a stack of matrices
        found = [_look_up(evidence, placements), product_role(evidence, placements)]
        if any(found):
            roles[name, index] = [role for role in found if role is not None]
    for job in loader.all_jobs:
        if job.converter is None:
            for use, inputs in evidence.uses.get((job.key, 0), []):
                if use.kind == "conv":
                    rows = evidence.rows(use, inputs)
                    if rows is None:
                        continue
                    role = Role("conv", False, rows, Square((inputs,)))
                    roles.setdefault((job.files[0], None), []).append(role)
    return roles


def _look_up(evidence: Evidence, placements: list[Placement]) -> Role | None:
    p = placements[0]
    plain = len(placements) == 1 and p.index is None and not p.transposed
    return evidence.embedding(p.parameter) if plain else None


def _agree(evidence: Evidence, roles: list[Role]) -> Role:
    """All roles in one; those that see the matrix the other way round cannot be combined."""
    same = [r for r in roles if r.transposed == roles[0].transposed]
    return combine(evidence, same)


def _inputs(role: Role, shape: tuple[int, ...]) -> int:
    return TensorInfo("", shape, "F32", role.kind, transposed=role.transposed).matrix_shape[1]


def _kind(loader: Loader, name: str, shape: tuple[int, ...]) -> str:
    """norm for a vector that belongs to a normalisation, else other."""
    if len(shape) != 1:
        return "other"
    for job in loader.all_jobs:
        if name in job.files:
            owner = loader.model.get_submodule(job.key.rpartition(".")[0])
            return "norm" if "norm" in type(owner).__name__.lower() else "other"
    return "other"
