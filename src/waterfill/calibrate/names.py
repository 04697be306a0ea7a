"""Which tensors of a checkpoint become which parameters of the model that runs.

transformers may rename, merge, split or transpose what it loads. Its own conversion rules are
applied here to the tensors of one parameter at a time; the project has no rules of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from waterfill.types import WaterfillError

__all__ = ["Job", "Placement", "jobs_for", "place"]

Shapes = Mapping[str, tuple[int, ...]]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Job:
    """File tensors in, parameters out.

    Attributes
    ----------
    files : names in the checkpoint, in the order the conversion wants them
    patterns : for each, the conversion's pattern that it matched
    key : the parameter that the conversion is known by
    converter : transformers' WeightConverter, or None where a tensor is only renamed
    outputs : parameter name -> shape
    """

    files: tuple[str, ...]
    patterns: tuple[str, ...]
    key: str
    converter: Any = None
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def run(self, tensors: Iterable[torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """The parameters made of tensors given in the order of `files`."""
        if self.converter is None:
            return {self.key: next(iter(tensors))}
        converter = deepcopy(self.converter)
        for name, pattern, tensor in zip(self.files, self.patterns, tensors, strict=True):
            converter.add_tensor(self.key, name, pattern, tensor)
        try:
            made = converter.convert(self.key, model=model, config=model.config)
        except Exception as error:
            raise WaterfillError(
                f"transformers could not make {self.key} out of {self.files[0]}"
                f"{' and others' if len(self.files) > 1 else ''}: {error}"
            ) from error
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


@dataclass(frozen=True)
class Placement:
    """Where a matrix of the file went: ``param[index][rows][:, columns] = matrix`` (a part of it).

    Attributes
    ----------
    file : tensor of the checkpoint
    file_index : slice of it along the first axis, or None
    parameter, index : parameter of the model and slice of it, or None
    transposed : whether the matrix lies transposed in the parameter
    file_rows, file_columns : which part of the file's matrix
    rows, columns : where those lie in the parameter, still along the file's axes
    """

    file: str
    file_index: int | None
    parameter: str
    index: int | None
    transposed: bool
    file_rows: Index
    file_columns: Index
    rows: Index
    columns: Index


def jobs_for(model: Any, shapes: Shapes) -> list[Job]:
    """Group a checkpoint's tensors by the parameter they make; unused ones are left out.

    Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, loading.WeightRenaming)]
    converters = [r for r in rules if isinstance(r, loading.WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    grouped: dict[str, list[tuple[str, str, Any]]] = {}
    for name in sorted(shapes, key=loading.dot_natural_key):
        key, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = loading.rename_source_key(name, [], [], prefix, state)
        if key in state:
            converter = None if pattern is None else by_pattern[pattern]
            grouped.setdefault(key, []).append((name, pattern or name, converter))
    jobs = []
    for key, members in grouped.items():
        converter = members[0][2]
        if converter is None and len(members) > 1:
            names = " and ".join(m[0] for m in members)
            raise WaterfillError(f"both {names} claim to be the parameter {key}")
        job = Job(tuple(m[0] for m in members), tuple(m[1] for m in members), key, converter)
        blank = [torch.empty(shapes[f], device="meta") for f in job.files]
        made = {n: tuple(t.shape) for n, t in job.run(blank, model).items()}
        for name, shape in made.items():
            if name in state and tuple(state[name].shape) != shape:
                raise WaterfillError(
                    f"tensor {job.files[0]} makes {name} of shape {list(shape)}, but config.json "
                    f"asks for {list(state[name].shape)}"
                )
        jobs.append(Job(job.files, job.patterns, key, converter, made))
    return jobs


def place(
    jobs: Iterable[Job], shapes: Shapes, model: Any
) -> dict[tuple[str, int | None], list[Placement]]:
    """Where each matrix of the file went, for tensors of two and three dimensions.

    A conversion is not asked what it does: it is run on labels. Every entry of its inputs is
    replaced by the number of its matrix, then of its row, then of its column, and the labels are
    read off the result. Layers alike are traced once.
    """
    traced: dict[Any, list[Placement]] = {}
    found: dict[tuple[str, int | None], list[Placement]] = {}
    for job in jobs:
        if job.converter is None:
            placements = _renamed(job, shapes)
        else:
            outputs = sorted(job.outputs)
            alike = (id(job.converter), job.patterns, tuple(shapes[f] for f in job.files))
            if alike not in traced:
                traced[alike] = _traced(job, shapes, model, outputs)
            placements = [
                replace(p, file=job.files[int(p.file)], parameter=outputs[int(p.parameter)])
                for p in traced[alike]
            ]
        for p in placements:
            found.setdefault((p.file, p.file_index), []).append(p)
    return found


def _matrices(shape: tuple[int, ...]) -> list[int | None]:
    """The matrices of a tensor: itself, or its slices."""
    if len(shape) == 3:
        return list(range(shape[0]))
    return [None] if len(shape) == 2 else []


def _renamed(job: Job, shapes: Shapes) -> list[Placement]:
    shape = shapes[job.files[0]]
    whole = [np.arange(n, dtype=np.int64) for n in shape[-2:]] * 2
    return [Placement(job.files[0], i, job.key, i, False, *whole) for i in _matrices(shape)]


def _traced(job: Job, shapes: Shapes, model: Any, outputs: list[str]) -> list[Placement]:
    """Placements with the files and outputs of the job given by number."""
    matrices = [(f, i) for f, name in enumerate(job.files) for i in _matrices(shapes[name])]
    if not all(len(shapes[name]) in (2, 3) for name in job.files):
        return []

    def run(label: Callable[[int, tuple[int, ...]], torch.Tensor]) -> list[torch.Tensor]:
        made = job.run((label(f, shapes[name]) for f, name in enumerate(job.files)), model)
        return [made[name] for name in outputs]

    def numbers(file: int, shape: tuple[int, ...]) -> torch.Tensor:
        first = matrices.index((file, _matrices(shape)[0]))
        count = torch.arange(first, first + math.prod(shape[:-2]), dtype=torch.int32)
        return count.reshape(*shape[:-2], 1, 1).expand(shape)

    try:
        owner = run(numbers)
        row = run(
            lambda _, shape: torch.arange(shape[-2], dtype=torch.int32)[:, None].expand(shape)
        )
        column = run(lambda _, shape: torch.arange(shape[-1], dtype=torch.int32).expand(shape))
    except WaterfillError:
        return []  # a conversion that computes rather than moves cannot be traced
    found = []
    for output, (owners, rows, columns) in enumerate(zip(owner, row, column, strict=True)):
        for index in _matrices(tuple(owners.shape)):
            part = [t if index is None else t[index] for t in (owners, rows, columns)]
            for number in sorted({*part[0][:, 0].tolist(), *part[0][0].tolist()}):
                file, file_index = matrices[number]
                where = _read_off(number, *part)
                if where is not None:
                    found.append(Placement(str(file), file_index, str(output), index, *where))
    return found


def _read_off(
    number: int, owner: torch.Tensor, row: torch.Tensor, column: torch.Tensor
) -> tuple[bool, Index, Index, Index, Index] | None:
    """(transposed, file rows, file columns, rows, columns) of one matrix in a parameter.

    None where the labels do not say so cleanly.
    """
    mine = owner == number
    across, down = mine.any(0), mine.any(1)
    if not bool(mine[down][:, across].all()):
        return None
    i, j = row[down][:, across], column[down][:, across]
    for transposed in (False, True):
        r, c = (i.T, j.T) if transposed else (i, j)
        if bool((r == r[:, :1]).all()) and bool((c == c[:1]).all()):
            at = [_index(down.nonzero()[:, 0]), _index(across.nonzero()[:, 0])]
            rows, columns = reversed(at) if transposed else at
            return transposed, _index(r[:, 0]), _index(c[0]), rows, columns
    return None


def _index(values: torch.Tensor) -> Index:
    return values.numpy().astype(np.int64)
