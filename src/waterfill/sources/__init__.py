"""Where tensors come from. Importing this loads numpy only; torch and the hub on first need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from waterfill.sources.base import Checkpoint, Source, Tensors
from waterfill.sources.folder import FolderSource
from waterfill.sources.hub import resolve
from waterfill.sources.module import ModuleSource
from waterfill.sources.state import StateSource

__all__ = [
    "Checkpoint",
    "FolderSource",
    "ModuleSource",
    "Source",
    "StateSource",
    "Tensors",
    "open_source",
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
