"""Stored bits as torch tensors, at once or when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from waterfill.container import Reader
from waterfill.runtime.arrays import checkpoint_infos, read_tensor
from waterfill.sources.memory import OWN_NAMES
from waterfill.types import DTYPES, Array

if TYPE_CHECKING:
    import torch

__all__ = ["LazyTensor", "lazy_tensors", "to_torch", "torch_dtype"]


def torch_dtype(dtype: str) -> torch.dtype:
    """What torch calls a stored dtype."""
    import torch

    found: torch.dtype = getattr(torch, OWN_NAMES.get(dtype, DTYPES[dtype].name))
    return found


def to_torch(bits: Array, dtype: str) -> torch.Tensor:
    """Stored bits as a torch tensor of the checkpoint's dtype; shares memory where it can."""
    import torch

    if not bits.flags.writeable:
        bits = bits.copy()
    if dtype not in OWN_NAMES:
        return torch.from_numpy(bits)
    signed = np.dtype(f"i{bits.dtype.itemsize}")
    return torch.from_numpy(bits.view(signed)).view(torch_dtype(dtype))


class LazyTensor:
    """A tensor of an artifact that is decoded when it is indexed.

    To transformers it is one of the slices that `safetensors.safe_open` gives: it asks for shape
    and dtype, and for ``tensor[...]`` in one of its threads when the model has a place for it.
    """

    def __init__(self, reader: Reader, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self._reader, self._name, self._dtype, self._shape = reader, name, dtype, shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        bits = read_tensor(self._reader, self._name, self._dtype, self._shape)
        return to_torch(bits, self._dtype)[index]

    def get_dtype(self) -> str:
        """As safetensors calls it."""
        return self._dtype

    def get_shape(self) -> list[int]:
        """Shape as a list."""
        return list(self._shape)

    @property
    def dtype(self) -> torch.dtype:
        """As torch calls it."""
        return torch_dtype(self._dtype)

    @property
    def shape(self) -> torch.Size:
        """Shape as of a torch tensor."""
        import torch

        return torch.Size(self._shape)

    def is_floating_point(self) -> bool:
        """Whether its values are floats, fp8 included."""
        return self.dtype.is_floating_point


def lazy_tensors(reader: Reader) -> dict[str, LazyTensor]:
    """Every tensor of the checkpoint, in order, none decoded."""
    infos = checkpoint_infos(reader)
    return {name: LazyTensor(reader, name, *info) for name, info in infos.items()}
