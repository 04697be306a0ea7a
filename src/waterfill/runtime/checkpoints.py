"""Checkpoints as a user has them: folders, hub ids, artifacts, or tensors in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from waterfill.container import FILE_NAME, MODEL, format_of
from waterfill.runtime.artifact import folder_of
from waterfill.runtime.files import Infos, header_of, original_files, original_texts
from waterfill.runtime.plain import OWN_FILES
from waterfill.runtime.reading import Artifact
from waterfill.sources import Checkpoint, StateSource, Tensors, resolve
from waterfill.sources.folder import may_lie_beside
from waterfill.types import Array, WaterfillError

__all__ = ["ArtifactCheckpoint", "open_checkpoint", "open_tensors"]


@contextlib.contextmanager
def open_checkpoint(model: str | Path) -> Iterator[Checkpoint]:
    """A folder of safetensors files, an artifact, ``demo``, or a hub id."""
    path = folder_of(model)
    if format_of(path / FILE_NAME) == MODEL:
        with Artifact(path) as artifact:
            yield ArtifactCheckpoint(path, artifact)
    else:
        yield resolve(str(model), any_files=True)


@contextlib.contextmanager
def open_tensors(model: Any) -> Iterator[Tensors]:
    """As `open_checkpoint`, or a torch module, a state dict, or a source."""
    if isinstance(model, (str, Path)):
        with open_checkpoint(model) as checkpoint:
            yield checkpoint
    elif isinstance(model, Mapping):
        yield StateSource(model)
    elif hasattr(model, "state_dict"):
        yield StateSource(model.state_dict())
    elif hasattr(model, "tensors"):
        yield model
    else:
        raise WaterfillError(
            f"{type(model).__name__} is no model: give a folder, a hub id, a torch module, or a "
            "dict of name -> tensor"
        )


class ArtifactCheckpoint:
    """The checkpoint that `waterfill decompress` would make of an artifact, without making it.

    Parameters
    ----------
    path : artifact folder
    artifact : the same, open
    """

    def __init__(self, path: Path, artifact: Artifact) -> None:
        self.path: Path | None = path
        self._folder, self._artifact = path, artifact
        self._texts = original_texts(artifact.about)

    @property
    def tensors(self) -> Infos:
        """Tensor name -> (dtype, shape)."""
        infos = map(self._artifact.info, self._artifact.names)
        return {info.name: (info.dtype, info.shape) for info in infos}

    def read(self, name: str) -> Array:
        """A tensor in the storage form of `waterfill.types.DTYPES`."""
        return self._artifact.read(name)

    @property
    def layout(self) -> list[tuple[str, bytes]]:
        """Name and header of each weights file of the original; of one where those are not known."""
        files = original_files(self._artifact.about, self.tensors)
        if not files:
            return [(FILE_NAME, header_of(self.tensors, {"format": "pt"}))]
        return [(file.name, file.header) for file in files]

    @property
    def beside(self) -> list[str]:
        """Names of the original's other files."""
        copied = [
            file.name
            for file in self._folder.iterdir()
            if file.is_file() and file.name not in OWN_FILES and may_lie_beside(file.name)
        ]
        return sorted({*copied, *self._texts})

    def read_beside(self, name: str) -> bytes | None:
        """A file beside the original's weights, or None if there is none of this name."""
        if name in self._texts:
            return self._texts[name]
        path = self._folder / name
        return path.read_bytes() if name in self.beside and path.is_file() else None
