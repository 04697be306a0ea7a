"""A torch module in memory as a source: nothing is written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.sources.base import find_duplicates
from waterfill.sources.memory import bits_of, stored_dtype
from waterfill.types import Array

__all__ = ["ModuleSource"]


class ModuleSource:
    """The state of a module. Tensors that share memory appear once, under their first name.

    Parameters
    ----------
    module : torch.nn.Module
        Its ``config`` (as transformers' models have) becomes the configuration.
    tokenizer : callable as a transformers tokenizer, or None
    """

    def __init__(self, module: Any, tokenizer: Any | None = None) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.name = type(module).__name__
        self.path: Path | None = None
        self.files_beside: list[Path] = []
        self.trust_remote_code = False

    @property
    def config(self) -> dict[str, Any]:
        """The module's configuration with its class as the architecture; {} if it has none."""
        config = getattr(self.module, "config", None)
        if config is None:
            return {}
        return {**config.to_dict(), "architectures": [type(self.module).__name__]}

    @cached_property
    def _state(self) -> dict[str, Any]:
        seen: set[tuple[Any, ...]] = set()
        state = {}
        for name, tensor in self.module.state_dict().items():
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if tensor.numel() and key in seen:
                continue
            seen.add(key)
            state[name] = tensor
        return state

    @cached_property
    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (dtype, shape), in the order of ``state_dict``."""
        return {n: (stored_dtype(n, t), tuple(t.shape)) for n, t in self._state.items()}

    def read(self, name: str) -> Array:
        """A copy of a tensor in the storage form of `waterfill.types.DTYPES`."""
        return self._array(name, self._state[name])

    def read_slice(self, name: str, index: int) -> Array:
        """Entry `index` of a tensor along its first axis."""
        return self._array(name, self._state[name][index])

    def _array(self, name: str, tensor: Any) -> Array:
        return np.array(bits_of(tensor, self.tensors[name][0]))

    def fingerprint(self) -> str:
        """SHA-256 of names, shapes and every byte."""
        digest = hashlib.sha256()
        for name, (dtype, shape) in self.tensors.items():
            digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
            digest.update(np.ascontiguousarray(self.read(name)).tobytes())
        return digest.hexdigest()

    def duplicates(self) -> dict[str, str]:
        """Tensors over 1 KiB that repeat an earlier one bit for bit -> the name of that one."""
        return find_duplicates(
            [(n, self.tensors[n], self.read(n).nbytes) for n in self.tensors],
            head=lambda name: self.read(name).tobytes()[: 1 << 16],
            pieces=lambda name: [self.read(name).tobytes()],
        )
