"""Sees every matrix product and learns what goes into and comes out of each weight.

No list of layer classes: an operand is known by the memory it lies in. In the forward pass the
axis of a weight that is summed over is its input axis. In the backward pass the incoming gradient
is multiplied by the same weight, summed over the other axis: its rows are the output gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from waterfill.types import WaterfillError

__all__ = ["EmbeddingWatch", "Inputs", "Tally", "Use", "Watch"]

aten = torch.ops.aten
Sums = NDArray[np.float64]

BLOCK = 4096  # tokens per float32 product; blocks are added in float64


class Use(NamedTuple):
    """Outputs [start, stop) of a parameter, or of its slice `slice`, as used in a product.

    `axis` is the input axis of the matrix: 1 for (outputs, inputs), 0 for (inputs, outputs).
    """

    parameter: str
    slice: int
    axis: int
    start: int
    stop: int
    kind: str


@dataclass
class Inputs:
    """Inputs that one or several weights share.

    Attributes
    ----------
    uses : who got them
    moment : () -> float64 (n, n), sum of x x^T, and the number of input vectors x
    """

    uses: list[Use]
    moment: Callable[[], tuple[Sums, int]]


@dataclass
class Tally:
    """What one batch's gradients say, summed in float64.

    Attributes
    ----------
    rows : Use -> (m,) sum over positions of squared output gradients
    tokens : embedding parameter -> (V,) how often each row was looked up
    embedded : embedding parameter -> (d, d) sum of g g^T at its output
    energy : embedding parameter -> (V,) sum of |g|^2 over the look-ups of each row
    """

    rows: dict[Use, Sums]
    tokens: dict[str, Sums]
    embedded: dict[str, Sums]
    energy: dict[str, Sums]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Active around the forward and the backward pass of a batch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.backward = False
        self.tally = Tally({}, {}, {}, {})
        self._loaded: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.expected: Sums | None = None
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

        The backward pass needs the weights of a recomputed block for some time after. Until its
        last view is gone a parameter is held here, so that no other tensor gets its address.
        """
        self._leaving.append(parameter)
        self.sweep()

    def sweep(self) -> None:
        """Forget parameters that nothing but this watch still holds."""
        held = []
        for parameter in self._leaving:
            if self.backward and _holders(parameter) > _ALONE:
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
            found.append(Inputs(uses, partial(_moment, make, shares)))
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
        where = _locate(shape, weight)
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


class EmbeddingWatch(TorchFunctionMode):
    """Sees embedding look-ups; their outputs are where the backward graph starts."""

    def __init__(self, watch: Watch, gradients: bool) -> None:
        super().__init__()
        self.watch = watch
        self.gradients = gradients

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.embedding:
            return out
        ids, weight = args[0], args[1]
        found = self.watch.find(weight)
        if found is None:
            return out
        name, shape = found
        rows = ids.reshape(-1).cpu().numpy()
        if not self.watch.backward:
            counts = np.bincount(rows, minlength=shape[0])
            tokens = self.watch.tally.tokens
            tokens[name] = tokens.get(name, np.zeros(shape[0])) + counts
        if self.gradients and torch.is_grad_enabled():
            out = out.detach().requires_grad_()
            out.register_hook(lambda g: self._gradient(name, g, rows, shape[0]))
        return out

    def _gradient(self, name: str, gradient: torch.Tensor, rows: Any, count: int) -> None:
        tally = self.watch.tally
        gradient = gradient.reshape(-1, gradient.shape[-1])
        sums, _ = _moment([lambda: gradient], 1)
        tally.embedded[name] = tally.embedded.get(name, 0.0) + sums
        each = gradient.square().sum(-1).cpu().numpy()
        energy = np.bincount(rows, each, minlength=count)
        tally.energy[name] = tally.energy.get(name, 0.0) + energy


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


def _holders(tensor: torch.Tensor) -> int:
    """How many tensors share this one's memory (and a constant)."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


_ALONE = _holders(torch.empty(1))


def _locate(shape: tuple[int, ...], view: torch.Tensor) -> tuple[int, int, int, int] | None:
    """(slice, contracted axis, where the view starts along it, and along the other axis).

    For a view (k, q) of a parameter, contracted over k. None for one that is not made of rows and
    columns of one slice.
    """
    a, b = shape[-2:]
    axes = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            axes.append(-1)  # may have any stride
        elif stride == b:
            axes.append(0)
        elif stride == 1:
            axes.append(1)
        else:
            return None
    match axes:
        case [-1, -1]:
            axes = [1, 0] if b == 1 else [0, 1]
        case [-1, other]:
            axes = [1 - other, other]
        case [one, -1]:
            axes = [one, 1 - one]
    if axes[0] == axes[1]:
        return None
    index, rest = divmod(int(view.storage_offset()), a * b)
    at = divmod(rest, b)
    return index, axes[0], at[axes[0]], at[axes[1]]


def _moment(make: list[Callable[[], torch.Tensor]], groups: int) -> tuple[Sums, int]:
    """Sum of x x^T over all rows in float64, and their number.

    The groups of a convolution count as one: both are divided by them.
    """
    total: torch.Tensor | None = None
    count = 0
    for rows in make:
        x = rows().detach().float()
        count += x.shape[0]
        for block in torch.split(x, BLOCK):
            part = (block.T @ block).double()
            total = part if total is None else total.add_(part)
    assert total is not None
    return (total / groups).cpu().numpy(), count // groups
