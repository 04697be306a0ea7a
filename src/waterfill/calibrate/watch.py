"""Sees every matrix product and learns what goes into and comes out of each weight.

No list of layer classes: an operand is known by the memory it lies in. In the forward pass the
axis of a weight that is summed over is its input axis. In the backward pass the incoming gradient
is multiplied by the same weight, summed over the other axis: its rows are the output gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from waterfill.calibrate.tallies import BLOCK, Array64, Inputs, Tally, Use, locate, moment_of
from waterfill.types import WaterfillError

__all__ = ["Watch"]

aten = torch.ops.aten
_META = torch.device("meta")


def _holders(tensor: torch.Tensor) -> int:
    """How many tensors share this one's memory (and a constant)."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


_ALONE = _holders(torch.empty(1))


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Active around the forward and the backward pass of a batch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.backward = False
        self.tally = Tally({}, {}, {}, {})
        self._loaded: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.expected: Array64 | None = None
        self.scales: dict[int, float] = {}
        self._squared: dict[str, float] = {}
        self._leaving: list[torch.Tensor] = []
        self._calls: dict[Use, list[tuple[Any, torch.Tensor, Callable[[], torch.Tensor]]]] = {}
        self._axes: dict[tuple[str, int], set[Use]] = {}

    def arrive(self, name: str, parameter: torch.Tensor, scale: float = 1.0) -> None:
        """A parameter is in memory now, `scale` times what it is in the checkpoint."""
        self.sweep()
        self._squared[name] = scale**2
        if parameter.numel():
            where = parameter.untyped_storage().data_ptr()
            self._loaded[where] = (name, tuple(parameter.shape))

    def leave(self, parameter: torch.Tensor) -> None:
        """A parameter is no longer needed by its module.

        The backward pass may need it for some time after. Until its last view is gone a parameter
        is held here, so that it is known and no other tensor gets its address.
        """
        self._leaving.append(parameter)
        self.sweep()

    def sweep(self) -> None:
        """Forget parameters that nothing but this watch still holds."""
        held = []
        for parameter in self._leaving:
            if _holders(parameter) > _ALONE:
                held.append(parameter)
            else:
                self._loaded.pop(parameter.untyped_storage().data_ptr(), None)
        self._leaving = held

    def scale(self, operation: Any, parameter: torch.Tensor, *args: Any) -> None:
        """The model changes a weight that is not in memory: scaling is made up for, later."""
        if not parameter.is_meta:
            return
        factor = args[0] if len(args) == 1 and isinstance(args[0], (int, float)) else None
        if factor is None or operation not in (aten.mul_, aten.div_):
            raise WaterfillError("the model changes its own weights as it runs")
        factor = factor if operation is aten.mul_ else 1 / factor
        self.scales[id(parameter)] = self.scales.get(id(parameter), 1.0) * factor

    def find(self, tensor: Any) -> tuple[str, tuple[int, ...]] | None:
        """Name and shape of the parameter in whose memory a tensor lies."""
        if not self._loaded or not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            return None
        return self._loaded.get(tensor.untyped_storage().data_ptr())

    def collect(self) -> list[Inputs]:
        """Inputs seen since the last call, one entry for all weights that got the same."""
        groups: dict[Any, list[Use]] = {}
        for use, calls in self._calls.items():
            groups.setdefault(tuple(key for key, _, _ in calls), []).append(use)
        found = []
        for uses in groups.values():
            make = [rows for _, _, rows in self._calls[uses[0]]]
            shares = self._calls[uses[0]][0][0][-1]
            found.append(Inputs(uses, partial(moment_of, make, shares)))
        self._calls = {}
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        if name in _PRODUCTS and self._loaded:
            _PRODUCTS[name](self, *args, **kwargs)
        elif func._schema.is_mutable and args and isinstance(args[0], torch.nn.Parameter):
            self.scale(name, *args)
        if kwargs.get("device") == _META:
            kwargs = {**kwargs, "device": "cpu"}  # "where the weight is": it is not here just now
        return func(*args, **kwargs)

    # -- products ----------------------------------------------------------------------------

    def mm(self, a: torch.Tensor, b: torch.Tensor, **_: Any) -> None:
        """A (p, k) times B (k, q)."""
        if self.find(b):
            self.pair(a, b)
        if self.find(a):
            self.pair(b.transpose(-1, -2), a.transpose(-1, -2))

    def bmm(self, a: torch.Tensor, b: torch.Tensor, **_: Any) -> None:
        """A (e, p, k) times B (e, k, q)."""
        if self.find(a) or self.find(b):
            for i in range(a.shape[0]):
                self.mm(a[i], b[i])

    def grouped_mm(
        self, a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> None:
        """Rows of A (p, k) up to each offset times the next matrix of B (e, k, q)."""
        if self.find(b) and a.ndim == 2 and b.ndim == 3 and offs is not None:
            start = 0
            for i, stop in enumerate(offs.tolist()):
                if stop > start:
                    self.pair(a[start:stop], b[i])
                start = stop

    def pair(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """x (p, k) times a view (k, q) of a parameter."""
        found = self.find(weight)
        assert found is not None
        name, shape = found
        where = locate(shape, weight)
        if where is None:
            return
        index, axis, first, start = where
        size, others = weight.shape
        if not self.backward:
            if first == 0 and size == shape[-2:][axis]:
                kind = "expert" if len(shape) == 3 else "linear"
                self._record(Use(name, index, axis, start, start + others, kind), x, lambda: x, 1)
            return
        # Where a block is recomputed the forward product is seen again; its axis tells them apart.
        for use in self._axes.get((name, index), ()):
            if use[2:5] == (1 - axis, first, first + size) and others == shape[-2:][1 - axis]:
                self.add_rows(use, x)

    def convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Any,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
        **_: Any,
    ) -> None:
        """A convolution is a product with the patches it slides over."""
        found = self.find(weight)
        if found is None or self.backward or transposed or weight.ndim not in (3, 4):
            return
        name, shape = found
        use = Use(name, 0, 1, 0, shape[0], "conv")
        kernel = shape[2:]

        def patches() -> torch.Tensor:
            image = x if weight.ndim == 4 else x.unsqueeze(2)
            lead = [1] if weight.ndim == 3 else []
            cols = torch.nn.functional.unfold(
                image,
                (*lead, *kernel),
                dilation=(*lead, *dilation),
                padding=(*([0] if lead else []), *padding),
                stride=(*lead, *stride),
            )
            cols = cols.reshape(cols.shape[0], groups, -1, cols.shape[-1])
            return cols.permute(0, 3, 1, 2).reshape(-1, cols.shape[2])

        self._record(use, x, patches, groups, (tuple(kernel), *map(tuple, (stride, padding))))

    def convolve_back(self, gradient: torch.Tensor, x: Any, weight: torch.Tensor, *_: Any) -> None:
        """The backward pass of a convolution hands over the output gradient itself."""
        found = self.find(weight)
        if found is not None:
            for use in self._axes.get((found[0], 0), ()):
                self.add_rows(use, gradient.transpose(0, 1).reshape(gradient.shape[1], -1).T)

    def add_rows(self, use: Use, gradient: torch.Tensor) -> None:
        """Output gradients (positions, m) of a weight."""
        total: Any = 0.0
        for block in torch.split(gradient.float(), BLOCK):
            squares = block.square().sum(0).double().cpu().numpy()
            total = total + squares * self._squared[use.parameter]
        expected, self.expected = self.expected, None
        if expected is not None and expected.shape == total.shape and expected.sum() > 0:
            # The first weight on the way back makes the logits. Of a token whose turn never came
            # the sampled labels say too little; what they would say in the mean is known.
            total = expected * (total.sum() / expected.sum())
        self.tally.rows[use] = self.tally.rows.get(use, 0.0) + total

    def _record(
        self,
        use: Use,
        x: torch.Tensor,
        rows: Callable[[], torch.Tensor],
        groups: int,
        how: tuple[Any, ...] = (),
    ) -> None:
        # The tensor is kept alive until `collect`, so that its address cannot name another one.
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x._version, how, groups)
        self._calls.setdefault(use, []).append((key, x, rows))
        self._axes.setdefault((use.parameter, use.slice), set()).add(use)


# Registered as operations of torch, not as layers.
_PRODUCTS: dict[Any, Callable[..., None]] = {
    aten.mm: lambda w, a, b, **k: w.mm(a, b),
    aten.addmm: lambda w, bias, a, b, **k: w.mm(a, b),
    aten.bmm: lambda w, a, b, **k: w.bmm(a, b),
    aten.baddbmm: lambda w, bias, a, b, **k: w.bmm(a, b),
    aten.mv: lambda w, a, b, **k: w.mm(a, b[:, None]),
    aten.linear: lambda w, x, weight, bias=None: w.mm(x.reshape(-1, x.shape[-1]), weight.t()),
    aten.convolution: Watch.convolve,
    aten.convolution_backward: Watch.convolve_back,
    aten._grouped_mm: Watch.grouped_mm,
}
