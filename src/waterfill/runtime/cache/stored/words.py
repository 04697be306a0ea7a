"""What saving and loading a cache share: torch's tensors as a file's arrays."""

from __future__ import annotations

import numpy as np
import torch

from waterfill.coding.cachegen_header import Rotation
from waterfill.runtime.cache.rotary import Rotary
from waterfill.types import DTYPES, Array

__all__ = ["DTYPE_NAMES", "Pair", "from_words", "rotation_of", "same_rotation", "words_of"]

Pair = tuple[torch.Tensor, torch.Tensor]
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
SAME = 1e-9  # radians per token


def words_of(tensor: torch.Tensor) -> Array:
    """A tensor as an array in the storage form of its dtype, nothing copied that is in memory here."""
    stored = DTYPES[DTYPE_NAMES[tensor.dtype]]
    if tensor.dtype != torch.bfloat16:
        return tensor.cpu().numpy()
    found: Array = tensor.cpu().view(torch.int16).numpy().view(stored)
    return found


def from_words(words: Array, dtype: str) -> torch.Tensor:
    """An array of the storage form of a dtype as a tensor of its shape."""
    return torch.from_numpy(words.view(f"<i{words.itemsize}")).view(TORCH_DTYPES[dtype])


def rotation_of(rotary: Rotary) -> Rotation:
    """As a file has it."""
    return Rotation(
        tuple(rotary.first.tolist()),
        tuple(rotary.second.tolist()),
        tuple(rotary.frequencies.tolist()),
    )


def same_rotation(one: Rotation | None, other: Rotation | None) -> bool:
    """Whether keys turn alike under both."""
    if one is None or other is None:
        return one is other
    return (one.first, one.second) == (other.first, other.second) and bool(
        np.allclose(one.frequencies, other.frequencies, rtol=0, atol=SAME)
    )
