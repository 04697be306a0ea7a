"""One tensor of an artifact without the rest, into the caller's own array if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from waterfill.container import Reader
from waterfill.runtime.arrays import checkpoint_infos, read_tensor
from waterfill.types import DTYPES, Array, TensorInfo, WaterfillError

__all__ = ["Artifact"]

T = TypeVar("T")

# Names that numpy (with ml_dtypes) and torch have for dtypes which travel as unsigned integers.
OWN_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class Artifact:
    """Random access to the tensors of an artifact; numpy is enough. May serve many threads.

    >>> with waterfill.Artifact("out/demo") as artifact:                  # doctest: +SKIP
    ...     for name in artifact.names:
    ...         info = artifact.info(name)
    ...         bits = artifact.read(name)

    Parameters
    ----------
    path : artifact folder or its weights file

    Raises
    ------
    FormatError
        If header or index are damaged. A tensor is checked when it is read.
    """

    def __init__(self, path: str | Path) -> None:
        self._reader = Reader(path)
        try:
            self._infos = checkpoint_infos(self._reader)
        except BaseException:
            self._reader.close()
            raise

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    @property
    def about(self) -> Mapping[str, Any]:
        """What the index says of where the file comes from."""
        return self._reader.about

    @property
    def names(self) -> list[str]:
        """Tensor names, in the order of the checkpoint."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Name, dtype (a key of `waterfill.types.DTYPES`) and shape of a tensor."""
        if name not in self._infos:
            raise WaterfillError(f"{self._reader.path} has no tensor {name}")
        dtype, shape = self._infos[name]
        return TensorInfo(name, shape, dtype)

    @overload
    def read(self, name: str, out: None = None) -> Array: ...

    @overload
    def read(self, name: str, out: T) -> T: ...

    def read(self, name: str, out: Any = None) -> Any:
        """Decode one tensor; no byte of another is read, and none of another is checked.

        Parameters
        ----------
        name : tensor, fused ones as a whole
        out : numpy array or torch tensor to fill: C-contiguous, on the CPU, of the tensor's shape
            and dtype. For BF16 and fp8, which numpy lacks, an array of the unsigned integers of
            their width will do too. After an error its content means nothing.

        Returns
        -------
        `out`, or a new array of the stored bits: BF16 as uint16 and fp8 as uint8, others as
        themselves.

        Raises
        ------
        FormatError
            If the tensor's bytes are damaged.
        WaterfillError
            If there is no such tensor, or `out` cannot hold it.
        """
        info = self.info(name)
        if out is None:
            return read_tensor(self._reader, name, info.dtype, info.shape)
        read_tensor(self._reader, name, info.dtype, info.shape, _bits(out, info))
        return out


def _bits(out: Any, info: TensorInfo) -> Array:
    """The memory of an array or tensor as an array of stored bits; WaterfillError if it does not fit."""
    if isinstance(out, np.ndarray):
        _check(out.dtype.name, out.shape, info)
        if not out.flags.c_contiguous or not out.flags.writeable:
            raise WaterfillError(f"{info.name}: out must be C-contiguous and writeable")
        if not out.dtype.isnative:
            raise WaterfillError(f"{info.name}: out must be little-endian")
        return out.view(DTYPES[info.dtype])
    if not type(out).__module__.partition(".")[0] == "torch" and not hasattr(out, "data_ptr"):
        raise WaterfillError(
            f"{info.name}: out must be a numpy array or a torch tensor, not {type(out).__name__}"
        )
    import torch

    _check(str(out.dtype).removeprefix("torch."), tuple(out.shape), info)
    if out.device.type != "cpu" or not out.is_contiguous():
        raise WaterfillError(f"{info.name}: out must be a contiguous tensor on the CPU")
    octets: Array = out.detach().reshape(-1).view(torch.uint8).numpy()
    return octets.view(DTYPES[info.dtype]).reshape(info.shape)


def _check(dtype: str, shape: tuple[int, ...], info: TensorInfo) -> None:
    stored = DTYPES[info.dtype].name
    right = OWN_NAMES.get(info.dtype, stored)
    if dtype not in (stored, right) or shape != info.shape:
        raise WaterfillError(
            f"{info.name} is {right}{list(info.shape)}, and out is {dtype}{list(shape)}"
        )
