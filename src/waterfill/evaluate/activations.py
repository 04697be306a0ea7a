"""Activations of eight bits, simulated: what W4A8 would cost, without kernels that compute so.

The inputs of the linear layers are rounded to numbers that eight bits can hold times a scale, as
ZeroQuant-FP (Wu et al. 2023) does; all else is computed as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from waterfill.types import SpecError, WaterfillError

__all__ = ["FORMS", "Activations"]

FORMS = {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0}  # and the largest number of each
SCALES = ("token", "tensor")


@dataclass(frozen=True)
class Activations:
    """How the inputs of linear layers are rounded.

    Attributes
    ----------
    form : int8 (-127 to 127), e4m3 or e5m2 (those of the Open Compute Project, 2023)
    scale : token: the largest magnitude of each token becomes the largest number; tensor: that of
        all tokens of a window. Neither needs calibration.
    """

    form: str
    scale: str = "token"

    def __post_init__(self) -> None:
        if self.form not in FORMS or self.scale not in SCALES:
            raise SpecError(
                f"activations are {', '.join(FORMS)}, scaled by {' or '.join(SCALES)}: "
                f"not {self.form}:{self.scale}"
            )

    @classmethod
    def parse(cls, text: str) -> Activations:
        """``int8``, or with a scale that is not the default ``int8:tensor``; SpecError on others."""
        form, _, scale = text.partition(":")
        return cls(form, scale or SCALES[0])

    def round(self, x: Any) -> Any:
        """A tensor (..., features) rounded, in its own dtype; not-a-number spreads over its scale."""
        import torch

        values, top = x.float(), FORMS[self.form]
        size = values.abs()
        largest = size.amax(-1, keepdim=True) if self.scale == "token" else size.amax()
        step = torch.where(largest == 0, 1.0, largest / top)
        values = (values / step).clamp(-top, top)
        match self.form:
            case "int8":
                values = values.round()
            case "e4m3":
                values = values.to(torch.float8_e4m3fn).float()
            case "e5m2":
                values = values.to(torch.float8_e5m2).float()
        return (values * step).to(x.dtype)

    @contextlib.contextmanager
    def simulated(self, model: Any) -> Iterator[None]:
        """Rounds what goes into the linear layers of a model, for as long as the context lasts."""

        def hook(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            rounded = tuple(self.round(a) if i == 0 else a for i, a in enumerate(arguments))
            # A layer called by keyword has one input all the same.
            return rounded, named if arguments else {k: self.round(v) for k, v in named.items()}

        hooks = [
            layer.register_forward_pre_hook(hook, with_kwargs=True)
            for layer in linear_layers(model).values()
        ]
        try:
            yield
        finally:
            for registered in hooks:
                registered.remove()

    def protocol(self, model: Any) -> str:
        """In words, for who wants the same figures again."""
        return (
            f"{self.form}, simulated: inputs of the {len(linear_layers(model))} linear layers of the "
            f"compressed model but its head, dynamic scale per {self.scale}"
        )


def linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers whose inputs are rounded: all but the head.

    Raises
    ------
    WaterfillError
        Of a model that has none, or has matrices of experts in one tensor, which no layer multiplies:
        they would stay as they are, and figures would claim what was not measured.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            if module is not head:
                found[name] = module
        elif not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            fused = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3]
            if fused:
                raise WaterfillError(
                    f"{name}.{fused[0]} holds many matrices: their inputs cannot be rounded yet, "
                    "evaluate without --activations"
                )
    if not found:
        raise WaterfillError(f"{type(model).__name__} has no linear layers whose inputs to round")
    return found
