"""A caller's array or tensor as stored bits: numpy, numpy with ml_dtypes, or torch; nothing copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from waterfill.types import DTYPES, Array, TensorInfo, WaterfillError

__all__ = ["bits_of", "describe", "fill_target"]

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


def describe(x: Any, name: str = "the array") -> tuple[str, tuple[int, ...]]:
    """Dtype (a key of `DTYPES`) and shape of a numpy array or torch tensor."""
    _require_array(x, name)
    kind = x.dtype.name if isinstance(x, np.ndarray) else str(x.dtype).removeprefix("torch.")
    if kind not in STORED:
        raise WaterfillError(f"{name}: {kind} is no dtype that safetensors has")
    return STORED[kind], tuple(x.shape)


def bits_of(x: Any, dtype: str, name: str = "the array") -> Array:
    """The bits of a numpy array or torch tensor, as `DTYPES` holds them.

    Contiguous; shares memory with `x` where that is contiguous and on the CPU, else a copy.
    """
    if isinstance(x, np.ndarray):
        native = x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))
        return np.ascontiguousarray(native).reshape(x.shape).view(DTYPES[dtype])
    _require_array(x, name)
    import torch

    octets: Array = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return octets.view(DTYPES[dtype]).reshape(tuple(x.shape))


def fill_target(out: Any, info: TensorInfo) -> Array:
    """The memory of `out` as an array of stored bits; WaterfillError if it does not fit `info`."""
    if isinstance(out, np.ndarray):
        _check(out.dtype.name, out.shape, info)
        if not out.flags.c_contiguous or not out.flags.writeable:
            raise WaterfillError(f"{info.name}: out must be C-contiguous and writeable")
        if not out.dtype.isnative:
            raise WaterfillError(f"{info.name}: out must be little-endian")
        return out.view(DTYPES[info.dtype])
    _require_array(out, f"{info.name}: out")
    _check(str(out.dtype).removeprefix("torch."), tuple(out.shape), info)
    if out.device.type != "cpu" or not out.is_contiguous():
        raise WaterfillError(f"{info.name}: out must be a contiguous tensor on the CPU")
    return bits_of(out, info.dtype, info.name)


def _require_array(x: Any, name: str) -> None:
    if not isinstance(x, np.ndarray) and not hasattr(x, "data_ptr"):
        raise WaterfillError(f"{name} must be a numpy array or a torch tensor, not {type(x).__name__}")  # fmt: skip


def _check(dtype: str, shape: tuple[int, ...], info: TensorInfo) -> None:
    stored = DTYPES[info.dtype].name
    right = OWN_NAMES.get(info.dtype, stored)
    if dtype not in (stored, right) or shape != info.shape:
        raise WaterfillError(
            f"{info.name} is {right}{list(info.shape)}, and out is {dtype}{list(shape)}"
        )
