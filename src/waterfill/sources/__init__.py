"""Where tensors come from. Importing this loads numpy only; torch and the hub on first need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from waterfill.sources.base import Source, Tensors
from waterfill.sources.folder import FolderSource
from waterfill.sources.hub import resolve
from waterfill.sources.module import ModuleSource
from waterfill.sources.state import StateSource
from waterfill.types import WaterfillError

__all__ = [
    "FolderSource",
    "ModuleSource",
    "Source",
    "StateSource",
    "Tensors",
    "open_source",
    "open_tensors",
    "resolve",
]


def open_source(model: Any, trust_remote_code: bool = False, any_files: bool = False) -> Source:
    """A folder, a hub id, ``demo``, a torch module, or a source, as a source.

    With `any_files` a folder of safetensors files will do, whatever they are of.
    """
    if isinstance(model, (str, Path)):
        return resolve(str(model), trust_remote_code, any_files)
    if hasattr(model, "state_dict"):
        return ModuleSource(model)
    source: Source = model
    return source


def open_tensors(model: Any) -> Tensors:
    """A folder, a hub id, a torch module, a state dict, or a source, as named tensors."""
    if isinstance(model, (str, Path)):
        return resolve(str(model), any_files=True)
    if isinstance(model, Mapping):
        return StateSource(model)
    if hasattr(model, "state_dict"):
        return StateSource(model.state_dict())
    if not hasattr(model, "tensors"):
        raise WaterfillError(
            f"{type(model).__name__} is no model: give a folder, a hub id, a torch module, or a "
            "dict of name -> tensor"
        )
    source: Tensors = model
    return source
