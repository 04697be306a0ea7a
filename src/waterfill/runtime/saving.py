"""A model with packed or coded weights back to an artifact folder: the same file again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from waterfill.container import FILE_NAME, Reader
from waterfill.runtime.artifact import (
    RECORD_FILE,
    original_config,
    read_config,
    wishes,
    write_config,
)
from waterfill.runtime.digests import digest
from waterfill.runtime.extending import Extension, extend
from waterfill.types import WaterfillError

__all__ = ["saves_artifact"]


@dataclass(frozen=True)
class _Origin:
    """What a model was loaded from: the file, and digests of it and of each dense tensor."""

    file: Path
    fingerprint: str
    digests: Mapping[str, str]


class _Saves(Extension):
    """Common to models that are saved as the artifact that they come from."""

    saved_from: _Origin

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write the artifact that this model was loaded from, with its configuration as it is now.

        Raises
        ------
        WaterfillError
            If weights were changed since, the artifact was, or `push_to_hub` is asked for.
        """
        if push_to_hub:
            raise WaterfillError("save to a folder, then upload it: hf upload NAME FOLDER")
        if options.get("is_main_process", True):
            _save(self, self.saved_from, Path(save_directory))


def saves_artifact(model: Any, reader: Reader) -> None:
    """Have the model's `save_pretrained` write what it was loaded from."""
    # A class, for a method that the model kept would keep the model: it would outlive its last user.
    extend(model, _Saves)
    model.saved_from = _Origin(reader.path.absolute(), _fingerprint(reader), _digests(model))


def _save(model: Any, origin: _Origin, folder: Path) -> None:
    file, digests = origin.file, origin.digests
    now = _digests(model)
    changed = [name for name in {**digests, **now} if digests.get(name) != now.get(name)]
    if changed:
        raise WaterfillError(
            f"{changed[0]} is not as it was loaded, and weights that are packed or coded are saved only "
            'as they were: to change and save a model, load it with residency="dense"'
        )
    with Reader(file) as reader:
        if _fingerprint(reader) != origin.fingerprint:
            raise WaterfillError(
                f"{file} is not the file that this model was loaded from, or it was loaded at a smaller "
                "size: waterfill truncate writes it at one"
            )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / FILE_NAME).exists() or not (folder / FILE_NAME).samefile(file):
        temporary = folder / f"{FILE_NAME}.partial"
        shutil.copyfile(file, temporary)
        temporary.replace(folder / FILE_NAME)
    for name in (RECORD_FILE, "README.md"):
        if (file.parent / name).is_file() and folder.absolute() != file.parent:
            shutil.copyfile(file.parent / name, folder / name)
    _write_config(model, folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write_config(model: Any, folder: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    config = read_config(folder)
    dtype = config["quantization_config"].get("dtype")
    write_config(folder, original_config(config), dtype, **wishes(config))


def _fingerprint(reader: Reader) -> str:
    """Of all bytes: their checksums are in the index."""
    parts = [[name, entry.parts] for name, entry in reader.entries.items()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digests(model: Any) -> dict[str, str]:
    """Of all that `save_pretrained` would write of a plain model."""
    return {name: _digest(tensor) for name, tensor in model.state_dict().items()}


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return f"{tensor.dtype} {list(tensor.shape)} {digest(flat.view(torch.uint8).numpy())}"
