"""A model by its name, whether it is an artifact or as it was trained, ready to be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waterfill.container import FILE_NAME, MODEL, format_of
from waterfill.runtime.artifact import folder_of
from waterfill.runtime.torch_model import load_model, load_original
from waterfill.sources import resolve

__all__ = ["OpenedModel", "open_model"]


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model in memory.

    Attributes
    ----------
    name : what the user called it
    folder : where its files lie
    own_folder : whether that is a folder of the user's, not a download or part of the package
    model : transformers.PreTrainedModel, in evaluation mode
    """

    name: str
    folder: Path
    own_folder: bool
    model: Any


def open_model(
    name: str | Path, residency: str | None = None, trust_remote_code: bool = False
) -> OpenedModel:
    """An artifact, a model folder, a hub id or ``demo``, in the dtype it was stored in.

    Parameters
    ----------
    name : of the model
    residency : of an artifact's weights, as of `waterfill.load_model`
    trust_remote_code : run Python files that came with the model

    Raises
    ------
    WaterfillError
        If there is no such model, or it does not open.
    """
    folder = folder_of(name)
    if format_of(folder / FILE_NAME) == MODEL:
        model = load_model(folder, residency=residency, trust_remote_code=trust_remote_code)
        return OpenedModel(str(name), folder, True, model)
    found = resolve(str(name), trust_remote_code).path
    own = str(name) != "demo" and folder.expanduser().is_dir()
    return OpenedModel(str(name), found, own, load_original(found, trust_remote_code, "auto"))
