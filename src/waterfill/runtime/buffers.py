"""A caller's own memory, to be filled with stored bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from waterfill.sources.memory import OWN_NAMES, bits_of, require_array
from waterfill.types import DTYPES, Array, TensorInfo, WaterfillError

__all__ = ["fill_target"]


def fill_target(out: Any, info: TensorInfo) -> Array:
    """The memory of `out` as an array of stored bits; WaterfillError if it does not fit `info`."""
    if isinstance(out, np.ndarray):
        _check(out.dtype.name, out.shape, info)
        if not out.flags.c_contiguous or not out.flags.writeable:
            raise WaterfillError(f"{info.name}: out must be C-contiguous and writeable")
        if not out.dtype.isnative:
            raise WaterfillError(f"{info.name}: out must be little-endian")
        return out.view(DTYPES[info.dtype])
    require_array(out, f"{info.name}: out")
    _check(str(out.dtype).removeprefix("torch."), tuple(out.shape), info)
    if out.device.type != "cpu" or not out.is_contiguous():
        raise WaterfillError(f"{info.name}: out must be a contiguous tensor on the CPU")
    return bits_of(out, info.dtype)


def _check(dtype: str, shape: tuple[int, ...], info: TensorInfo) -> None:
    stored = DTYPES[info.dtype].name
    right = OWN_NAMES.get(info.dtype, stored)
    if dtype not in (stored, right) or shape != info.shape:
        raise WaterfillError(
            f"{info.name} is {right}{list(info.shape)}, and out is {dtype}{list(shape)}"
        )
