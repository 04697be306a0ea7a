"""torch modules whose weight stays packed or coded.

A module is not replaced but given another class, so that what else it is (a scaled embedding, a
router) it stays, and whoever asks for ``isinstance(module, nn.Linear)`` hears yes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from waterfill.runtime.weights import KERNEL_DTYPES, LazyWeight, Weight, unchangeable
from waterfill.types import WaterfillError

__all__ = ["give", "hollow", "restore", "stored_transposed"]

_PREFIX = "weight_"

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class _Holding(_Base):
    """Common to modules with a `Weight`; buffers show its memory, and never leave the CPU."""

    held: Weight
    plain: Any  # the class that it had, with a dense weight
    weight: Any
    transposed = False

    def hold(self, weight: Weight, like: torch.Tensor) -> None:
        """Take a weight; a dense one would have the dtype of `like`, and lie on its device."""
        self.held = weight
        for name, buffer in weight.buffers.items():
            self.register_buffer(_PREFIX + name, buffer, persistent=False)
        self.weight = LazyWeight(weight, self.transposed, like.dtype, like.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and not isinstance(value, LazyWeight):
            raise unchangeable()  # `forward` would not look at it
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = {n: self._buffers.pop(n) for n in list(self._buffers) if n.startswith(_PREFIX)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(kept)
        like = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        self.weight = LazyWeight(self.held, self.transposed, like.dtype, like.device)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k != "weight"}
        state["_buffers"] = {k: v for k, v in self._buffers.items() if not k.startswith(_PREFIX)}
        like = torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)
        return _blank, (self.plain,), (state, like)

    def __setstate__(self, state: Any) -> None:
        attributes, like = state
        super().__setstate__(attributes)  # type: ignore[no-untyped-call]
        self.hold(self.held, like)


def _blank(plain: Any) -> nn.Module:
    import waterfill.runtime.quick  # noqa: F401  # the attention that the model's configuration names

    module: nn.Module = object.__new__(_class_for(plain))
    return module


class _Matmul(_Holding):
    """Rows of the matrix are outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Runs a hundred times a token: each look-up that torch makes slow is made once, or around it.
        held, bias, shape = self.held, self._parameters["bias"], x.shape
        m, n = held.shape
        code = KERNEL_DTYPES.get(x.dtype)
        trained = x.requires_grad and torch.is_grad_enabled()
        if code is None or not shape or shape[-1] != n or trained:
            raise self._refused(x)
        batch = x.numel() // n if n else shape[:-1].numel()
        if 0 < batch <= held.max_batch and x.is_cpu:
            if not x.is_contiguous():
                x = x.contiguous()
            y = x.new_empty((*shape[:-1], m))
            held.matmul(x.data_ptr(), code, y.data_ptr(), batch, held.threads)
        else:
            y = _tiled(held, x.reshape(batch, n)).view(*shape[:-1], m)
        return y if bias is None else y.add_(bias)

    def _refused(self, x: torch.Tensor) -> WaterfillError:
        m, n = self.held.shape
        what = f"a {self.plain.__name__} of {n} inputs and {m} outputs"
        if x.dtype not in KERNEL_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES)
            return WaterfillError(f"{what} takes {known}, not {x.dtype}")
        if x.shape[-1:] != (n,):
            return WaterfillError(f"{what} was given the shape {list(x.shape)}")
        return WaterfillError(
            "weights that stay packed or coded cannot be trained through: use torch.no_grad(), or load "
            'with residency="dense"'
        )


def _tiled(held: Weight, x: torch.Tensor) -> torch.Tensor:
    """(batch, n) -> (batch, m), the weight decoded on the CPU and brought to the device of x."""
    y = x.new_empty(len(x), held.shape[0])
    with held.scratch.lock:
        for first, last, tile in held.tiles(x.dtype) if y.numel() else ():
            y[:, first:last] = x @ tile.to(x.device).T
    return y


class Linear(_Matmul, nn.Linear):
    """`torch.nn.Linear` with a `Weight`."""

    plain = nn.Linear


class Embedding(_Holding, nn.Embedding):
    """`torch.nn.Embedding` with a `Weight`."""

    plain = nn.Embedding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        m, n = self.held.shape
        if input.dtype not in (torch.int64, torch.int32):
            raise WaterfillError(f"an embedding takes int64 or int32, not {input.dtype}")
        indices = input.reshape(-1).to("cpu", torch.int64).contiguous()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < m:
            raise IndexError(f"an index is not one of the {m} rows of this embedding")
        rows = self.held.gather(indices, self.weight.dtype)
        return rows.view(*input.shape, n).to(input.device)


@functools.cache
def _bases() -> dict[type[nn.Module], type[nn.Module]]:
    """Class of a module -> our class for it."""
    from transformers.pytorch_utils import Conv1D

    conv1d = type("Conv1D", (_Matmul, Conv1D), {"plain": Conv1D, "transposed": True})
    return {nn.Linear: Linear, nn.Embedding: Embedding, Conv1D: conv1d}


@functools.cache
def _class_for(plain: Any) -> Any:
    """A subclass of `plain` that holds a `Weight`."""
    base, ours = next((b, c) for b, c in _bases().items() if issubclass(plain, b))
    if plain is base:
        return ours
    # After the subclass, before its base: its ``super().forward()`` finds ours.
    return type(plain.__name__, (plain, ours), {"plain": plain, "__module__": plain.__module__})


def stored_transposed(module: nn.Module) -> bool | None:
    """Whether the weight lies as (inputs, outputs); None if the module is none that can hold a `Weight`."""
    if isinstance(module, _Holding) or not isinstance(module, tuple(_bases())):
        return None
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None  # it changes its rows as it reads them
    return not isinstance(module, (nn.Linear, nn.Embedding))


def hollow(module: nn.Module) -> None:
    """Take the dense weight away, so that nobody loads one; what asks for it finds none of its values."""
    weight = module._parameters.pop("weight")
    assert weight is not None
    stand_in = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    stand_in._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark: has its values
    module.weight = stand_in


def give(module: nn.Module, weight: Weight, like: torch.Tensor) -> None:
    """Let a `hollow` module hold a weight; a dense one would be of the kind of `like`."""
    kind: Any = type(module)
    module.__class__ = _class_for(kind)
    module.hold(weight, like)  # type: ignore[operator]


def restore(module: nn.Module, dense: nn.Parameter) -> None:
    """Give a `hollow` module back a dense weight."""
    del module.weight
    module.register_parameter("weight", dense)
