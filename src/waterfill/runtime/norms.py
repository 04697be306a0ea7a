"""Root-mean-square norms by one kernel in place of seven operations of torch.

Models write the formula in different ways: weights as they are or as differences from one, rounded
before the product with them or after. Which one a module has is not read but tried.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from waterfill.coding import native
from waterfill.runtime.extending import Extension, extend
from waterfill.runtime.weights import KERNEL_DTYPES

__all__ = ["Formula", "formula_of", "quicken_norm"]

# Of the numbers in 16 bits, so many are the same: the mean is summed in another order, which puts a
# few on the other side of a rounding. Rounding at another place changes every fourth.
SAME = 0.99
TRIED = 4096  # numbers, at least
_SCALES = (1.0, 1e-3, 30.0)  # of the input tried; with the second epsilon counts


class Formula(NamedTuple):
    """``x / sqrt(mean(x^2) + epsilon) * (offset + weight)``, perhaps rounded before the product."""

    epsilon: float
    offset: float
    rounds_first: bool

    def apply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Norm of x (..., n); both contiguous, on the CPU, and of one of the kernels' dtypes."""
        core = native.core()
        assert core is not None
        n, y = len(weight), torch.empty_like(x)
        rows = x.numel() // n
        core.rms_norm(
            x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, n, KERNEL_DTYPES[x.dtype],
            *self, native.threads() if rows > 1 else 1,
        )  # fmt: skip
        return y


class _Quick(Extension):
    """Common to norms that know their formula."""

    formula: Formula
    _parameters: dict[str, Any]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight: Any = self._parameters["weight"]
        if (
            args
            or kwargs
            or type(x) is not torch.Tensor
            or x.dtype != weight.dtype
            or not x.is_cpu
            or not weight.is_cpu
            or x.shape[-1:] != weight.shape
            or x.dtype not in KERNEL_DTYPES
            or not x.numel()
            or ((x.requires_grad or weight.requires_grad) and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
            or native.core() is None
        ):
            return self.plain.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        return self.formula.apply(x.contiguous(), weight)


def quicken_norm(module: nn.Module) -> None:
    """Let a module that computes a root-mean-square norm do so by the kernel; others stay as they are."""
    formula = formula_of(module)
    if formula is not None:
        extend(module, _Quick)
        module.formula = formula  # type: ignore[assignment]


def formula_of(module: nn.Module) -> Formula | None:
    """The formula with which the kernel gives what a module gives, found by trying; None if none does.

    Tried are modules named after the norm, with a weight on the CPU and nothing beside it.
    """
    weight = module._parameters.get("weight")
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        not type(module).__name__.endswith("RMSNorm")
        or isinstance(module, _Quick)
        or "forward" in module.__dict__
        or set(module._parameters) != {"weight"}
        or module._buffers
        or module._modules
        or not isinstance(epsilon, float)
        or weight is None
        or weight.dim() != 1
        or not weight.is_cpu
        or not weight.numel()
        or weight.dtype not in KERNEL_DTYPES
        or native.core() is None
    ):
        return None
    random = torch.Generator().manual_seed(0)
    n = len(weight)
    trial = copy.copy(module)
    tried = (1 + torch.randn(n, generator=random) / 4).to(weight.dtype)
    trial._parameters = {"weight": nn.Parameter(tried, requires_grad=False)}
    x = torch.randn(len(_SCALES), -(-TRIED // n), n, generator=random)
    x = (x * torch.tensor(_SCALES)[:, None, None]).to(weight.dtype)
    try:
        with torch.no_grad():
            wanted = type(trial).forward(trial, x.clone())
    except TypeError:  # it takes more than one argument
        return None
    formulas = (Formula(epsilon, o, first) for o in (0.0, 1.0) for first in (True, False))
    return next((f for f in formulas if _same(f.apply(x, tried), wanted)), None)


def _same(ours: torch.Tensor, wanted: torch.Tensor) -> bool:
    if wanted.shape != ours.shape or wanted.dtype != ours.dtype:
        return False
    error, size = (ours.double() - wanted.double()).abs(), wanted.double().abs()
    near = bool((error <= 4 * torch.finfo(ours.dtype).eps * size).all())
    equal = (ours == wanted).double().mean().item()
    return near and (ours.dtype == torch.float32 or equal >= SAME)
