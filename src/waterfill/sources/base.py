"""What every source of tensors can do."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from waterfill.types import Array

__all__ = ["Checkpoint", "Source", "Tensors", "find_duplicates"]


class Tensors(Protocol):
    """Named tensors: the least that any source has."""

    @property
    def path(self) -> Path | None:
        """The folder, or None for tensors in memory."""

    @property
    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (dtype, shape)."""

    def read(self, name: str) -> Array:
        """A tensor in the storage form of `waterfill.types.DTYPES`."""


@runtime_checkable
class Checkpoint(Tensors, Protocol):
    """Tensors in files, and the files that lie beside those: all that a folder is to a user."""

    @property
    def layout(self) -> list[tuple[str, bytes]]:
        """Name and safetensors header of each weights file."""

    @property
    def beside(self) -> list[str]:
        """Names of the other files that belong to the model."""

    def read_beside(self, name: str) -> bytes | None:
        """A file beside the weights, or None if there is none of this name."""


@runtime_checkable
class Source(Protocol):
    """Named tensors, a configuration, and the files that stand beside them."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def path(self) -> Path | None:
        """The folder, or None for a model in memory."""

    @property
    def config(self) -> dict[str, Any]:
        """The model's ``config.json``."""

    @property
    def files_beside(self) -> list[Path]:
        """Tokenizer, configuration and text files that belong to the model."""

    @property
    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (dtype, shape)."""

    @property
    def trust_remote_code(self) -> bool:
        """Whether Python files of the model folder may be run."""

    @property
    def tokenizer(self) -> Any | None:
        """A tokenizer in memory, or None: then it is looked for in the folder."""

    def read(self, name: str) -> Array:
        """A tensor in the storage form of `waterfill.types.DTYPES`."""

    def read_slice(self, name: str, index: int) -> Array:
        """Entry `index` of a tensor along its first axis."""

    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when the tensors do."""

    def duplicates(self) -> dict[str, str]:
        """Tensors that repeat an earlier one bit for bit -> the name of that one."""


# A repeated bias or scalar is an accident and saves nothing.
SMALLEST_DUPLICATE_NBYTES = 1024


def find_duplicates(
    sizes: Iterable[tuple[str, tuple[Any, ...], int]],
    head: Callable[[str], bytes],
    pieces: Callable[[str], Iterable[bytes]],
) -> dict[str, str]:
    """Names that repeat an earlier one.

    Parameters
    ----------
    sizes : (name, anything that equal tensors must share, bytes) in order
    head : name -> the first bytes, cheap to get
    pieces : name -> all bytes, in pieces
    """
    alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, shape, nbytes in sizes:
        if nbytes > SMALLEST_DUPLICATE_NBYTES:
            alike[shape].append(name)
    heads: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for shape, names in alike.items():
        if len(names) > 1:
            for name in names:
                heads[shape, hashlib.sha256(head(name)).digest()].append(name)
    first: dict[bytes, str] = {}
    found: dict[str, str] = {}
    for (shape, _), names in heads.items():
        if len(names) < 2:
            continue
        for name in names:
            digest = hashlib.sha256(repr(shape).encode())
            for piece in pieces(name):
                digest.update(piece)
            earlier = first.setdefault(digest.digest(), name)
            if earlier != name:
                found[name] = earlier
    return found
