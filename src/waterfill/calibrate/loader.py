"""Reads the parameters of a running model from the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from waterfill.calibrate.names import Job, jobs_for
from waterfill.sources.base import Source
from waterfill.types import FLOAT_DTYPES, WaterfillError, to_float32

__all__ = ["Loader", "Slot", "load_all", "own_name"]


@dataclass(frozen=True)
class Slot:
    """Where a parameter hangs: ``module._parameters[attribute]``, known under several names."""

    module: nn.Module
    attribute: str
    names: tuple[str, ...]


class Loader:
    """Reads parameters of a skeleton from a source, as float32.

    Attributes
    ----------
    jobs : parameter name -> the Job that makes it
    """

    def __init__(self, model: Any, source: Source) -> None:
        self.model = model
        self.source = source
        shapes = {name: shape for name, (_, shape) in source.tensors.items()}
        self.all_jobs = jobs_for(model, shapes)
        self.jobs: dict[str, Job] = {out: job for job in self.all_jobs for out in job.outputs}
        self._checked: set[str] = set()
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._names = names
        self._load_buffers()

    def slots(self, module: nn.Module, deep: bool) -> list[Slot]:
        """Parameters of a module, with those of the modules inside it where `deep`."""
        owners = module.modules() if deep else [module]
        return [
            Slot(owner, attribute, tuple(self._names[id(parameter)]))
            for owner in owners
            for attribute, parameter in owner._parameters.items()
            if parameter is not None
        ]

    def home(self, slot: Slot, own: str) -> str:
        """The name under which the checkpoint has a slot's parameter."""
        for name in (own, *slot.names):
            if name in self.jobs:
                return name
        raise WaterfillError(f"the checkpoint has no tensor for the parameter {slot.names[0]}")

    def load(self, names: set[str]) -> dict[str, torch.Tensor]:
        """Parameters by name, each float32 in memory of its own."""
        found: dict[str, torch.Tensor] = {}
        for name in sorted(names):
            if name not in found:
                job = self.jobs[name]
                made = job.run((self._tensor(file) for file in job.files), self.model)
                found.update({n: _own(t) for n, t in made.items() if n in names})
        return found

    def _tensor(self, name: str) -> torch.Tensor:
        dtype, _ = self.source.tensors[name]
        bits = self.source.read(name)
        if dtype not in FLOAT_DTYPES:
            if dtype.startswith("F8"):
                raise WaterfillError(f"tensor {name} is {dtype}: start from the unquantised model")
            return torch.from_numpy(np.ascontiguousarray(bits))
        values = to_float32(bits, dtype)
        if name not in self._checked:
            if not np.isfinite(values).all():
                # Even --keep would not do: the model cannot be run with it, nor calibrated.
                raise WaterfillError(
                    f"tensor {name} has NaN or infinite values (or beyond float32); "
                    "mend the checkpoint"
                )
            self._checked.add(name)
        return torch.from_numpy(values)

    def _load_buffers(self) -> None:
        for name, buffer in self.model.named_buffers():
            if name in self.jobs:
                buffer.copy_(self.load({name})[name])


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and alone in its storage: the watch knows parameters by storage."""
    tensor = tensor.contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def own_name(model: nn.Module, slot: Slot) -> str:
    if len(slot.names) == 1:
        return slot.names[0]
    for name in slot.names:
        if model.get_submodule(name.rpartition(".")[0]) is slot.module:
            return name
    return slot.names[0]


def load_all(loader: Loader) -> Mapping[str, nn.Parameter]:
    """Put every parameter in its place for good, for a model that fits in memory."""
    placed: dict[str, nn.Parameter] = {}
    for slot in loader.slots(loader.model, deep=True):
        home = loader.home(slot, own_name(loader.model, slot))
        if home not in placed:
            placed[home] = nn.Parameter(loader.load({home})[home], requires_grad=False)
        slot.module._parameters[slot.attribute] = placed[home]
    return placed
