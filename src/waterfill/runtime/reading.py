"""One tensor of an artifact without the rest, into the caller's own array if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from waterfill.runtime.arrays import checkpoint_infos, read_tensor
from waterfill.runtime.buffers import fill_target
from waterfill.runtime.sizing import open_at
from waterfill.types import Array, TensorInfo, WaterfillError

__all__ = ["Artifact"]

T = TypeVar("T")


class Artifact:
    """Random access to the tensors of an artifact; numpy is enough. May serve many threads.

    >>> with waterfill.Artifact("out/demo") as artifact:                  # doctest: +SKIP
    ...     for name in artifact.names:
    ...         info = artifact.info(name)
    ...         bits = artifact.read(name)

    Parameters
    ----------
    path : artifact folder or its weights file
    size : bytes, or text such as ``3MB``, that the file might have been cut to (docs/stack.md)

    Raises
    ------
    FormatError
        If header or index are damaged. A tensor is checked when it is read.
    """

    def __init__(self, path: str | Path, size: str | int | None = None) -> None:
        self._reader = open_at(path, size)
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
        read_tensor(self._reader, name, info.dtype, info.shape, fill_target(out, info))
        return out
