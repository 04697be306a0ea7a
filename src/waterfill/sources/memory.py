"""Arrays and tensors in memory as stored bits: numpy, numpy with ml_dtypes, or torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from waterfill.types import DTYPES, Array, WaterfillError

__all__ = ["OWN_NAMES", "bits_of", "require_array", "stored_dtype"]

# Names that numpy (with ml_dtypes) and torch have for dtypes which travel as unsigned integers.
OWN_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
STORED: Mapping[str, str] = {
    **{kind.name: dtype for dtype, kind in DTYPES.items() if dtype not in OWN_NAMES},
    **{name: dtype for dtype, name in OWN_NAMES.items()},
}


def stored_dtype(name: str, tensor: Any) -> str:
    """What safetensors calls the dtype of a torch tensor or numpy array."""
    dtype = getattr(tensor, "dtype", None)
    known = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    if known not in STORED:
        what = type(tensor).__name__ if dtype is None else f"tensors of {known}"
        raise WaterfillError(f"{name}: {what} cannot be stored")
    return STORED[known]


def require_array(x: Any, name: str) -> None:
    """WaterfillError unless this is a numpy array, or a torch tensor whose words lie in memory."""
    if isinstance(x, np.ndarray):
        return
    if not hasattr(x, "data_ptr"):
        kind = type(x).__name__
        raise WaterfillError(f"{name} must be a numpy array or a torch tensor, not {kind}")
    import torch

    if x.is_meta or x.layout is not torch.strided:
        what = "on the meta device" if x.is_meta else f"of layout {x.layout}"
        raise WaterfillError(f"{name} is {what}: it has no words in memory that could be read")


def bits_of(tensor: Any, dtype: str) -> Array:
    """A tensor in the storage form of `DTYPES`: a view where it lies in one piece on the CPU."""
    shape = tuple(tensor.shape)
    if isinstance(tensor, np.ndarray):
        if tensor.dtype.byteorder == (">" if sys.byteorder == "little" else "="):
            tensor = tensor.astype(tensor.dtype.newbyteorder("<"))
        return np.ascontiguousarray(tensor).reshape(-1).view(DTYPES[dtype]).reshape(shape)
    require_array(tensor, "the tensor")
    import torch

    if dtype == "BOOL":  # a copy of bools makes a 1 of every other byte
        tensor = tensor.view(torch.uint8)
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.asarray(flat.view(DTYPES[dtype]).reshape(shape))
