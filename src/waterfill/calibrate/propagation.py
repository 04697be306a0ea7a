"""What the layers before have lost, and how the next ones can make up for some of it.

The text runs through the model block by block, twice at a time: one half of the batch with the
original weights, the other with the compressed ones. In front of a block, where the original sees x
and the compressed model z, the best linear guess of what is missing is ``x - z = P z``. A matrix W
that is aimed at ``W + W P`` instead of W makes up for it, as far as a linear map can: quantisation
error propagation (Arai & Ichikawa 2025, arXiv 2504.09629). How much of P holds on other text is
seen from how far both halves of the text agree. Of that a part is taken, as what is missing flows on
past the block, and later blocks make up for it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from waterfill.calibrate.loader import Loader, own_name
from waterfill.calibrate.passes import model_inputs
from waterfill.calibrate.stream import block_names, build_skeleton, install_doors
from waterfill.calibrate.watch import Watch
from waterfill.coding.rounding import factor, solve
from waterfill.sources.base import Source
from waterfill.types import Floats, WaterfillError

__all__ = ["propagate"]

CHUNK = 512  # tokens of either half that are in a block at a time, or a window
RIDGE = 0.01  # of the mean diagonal
TAKEN = 0.7  # of what would be right if nothing flowed on past a block (docs/sensitivity.md)
KEPT_NBYTES = 128 << 20  # of hidden states between blocks, or a share of the model if that is more
KEPT_SHARE = 0.05

Matrix = Callable[[str], Floats]
Move = Callable[[str, Floats], None]


class _Reached(Exception):
    """The last block is done; what comes after need not run."""


class _TwoLoaders(Loader):
    """Reads the original's weights, or the compressed model's; those read last stay for a while."""

    def __init__(self, model: Any, original: Source, compressed: Source, watch: Watch) -> None:
        super().__init__(model, original)
        self.compressed = Loader(model, compressed)
        self.watch = watch
        self.of_compressed = False
        self._held: tuple[bool, set[str], dict[str, torch.Tensor]] = (False, set(), {})

    def load(self, names: set[str]) -> dict[str, torch.Tensor]:
        """As of the side in use; a block's weights stay until those of another are asked for."""
        if self._held[:2] != (self.of_compressed, names):
            self.drop()
            found = self.compressed.load(names) if self.of_compressed else super().load(names)
            self._held = self.of_compressed, set(names), found
        return dict(self._held[2])

    def drop(self) -> None:
        """Hold no weights."""
        self._held = False, set(), {}
        self.watch.sweep()


@dataclass
class _Pair:
    """Sums over tokens at one place: of z z^T, and of z (x - z)^T by half of the text."""

    square: torch.Tensor | None = None
    lost: list[torch.Tensor | None] = field(default_factory=lambda: [None, None])

    def add(self, half: int, both: torch.Tensor) -> None:
        x, z = both.flatten(0, -2).float().chunk(2)
        self.square = _plus(self.square, z, z)
        self.lost[half] = _plus(self.lost[half], z, x - z)

    def guess(self, matrices: list[Callable[[], Floats]]) -> tuple[Floats, list[float]] | None:
        """P, float32 (n, n), and the share of it that pays at the outputs of each matrix (m, n).

        What one half of the text says is right as far as the other half says the same: with a and
        b the moves, weighted, that is ``2 a b / (a a + b b)``. The sums are used up.
        """
        if self.square is None or any(part is None for part in self.lost):
            return None
        lost = [part.numpy() for part in self.lost if part is not None]
        lower = factor(self.square.numpy(), RIDGE)
        self.square = None
        for part in lost:
            solve(lower, part)  # now the half's P^T, but for a factor that both have
        shares = []
        for matrix in matrices:
            weight = matrix()
            a, b = (weight @ part.T @ lower for part in lost)
            both = float(np.vdot(a, a) + np.vdot(b, b))
            shares.append(TAKEN * max(2 * float(np.vdot(a, b)) / both, 0.0) if both > 0 else 0.0)
        lost[0] += lost[1]
        return lost[0].T, shares


def _plus(known: torch.Tensor | None, z: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return z.T @ other if known is None else known.addmm_(z.T, other)


def propagate(
    source: Source,
    compressed: Source,
    ids: NDArray[np.int64],
    movable: set[str],
    matrix: Matrix,
    move: Move,
    progress: Callable[[int, int], None],
) -> None:
    """Walk the blocks; aim their matrices anew.

    Parameters
    ----------
    source : the original
    compressed : the model as it is so far; read again after each `move`
    ids : int64 (windows, window)
    movable : tensors whose aim may be moved
    matrix : tensor -> its matrix (m, n) in the original
    move : told (tensor, P) that a matrix should rather become ``W + W P``; to change `compressed`
    progress : told (done, total), in blocks
    """
    model = build_skeleton(source)
    blocks = block_names(model)
    ids = _that_fit(model, ids, len(blocks))
    if len(ids) < 2:
        return
    watch = Watch()
    loader = _TwoLoaders(model, source, compressed, watch)
    install_doors(loader, watch, lambda: False, lambda _: None)
    places = _places(loader, movable)
    count, window = len(ids), ids.shape[1]
    size = max(1, min(CHUNK // window, (count + 1) // 2))  # two chunks at least
    starts = range(0, count, size)

    def half_with(inner: Any, of_compressed: bool, parts: tuple[Any, Any]) -> Any:
        loader.of_compressed = of_compressed
        args, kwargs = parts
        return inner(*args, **kwargs)

    def leaf(inner: Any, *args: Any, **kwargs: Any) -> Any:
        """A module outside all blocks."""
        halves = [
            half_with(inner, second, _rows((args, kwargs), 2 * count, range(count * second, count * (second + 1))))
            for second in (False, True)
        ]  # fmt: skip
        return _joined([_spread(half, count) for half in halves])

    def block(name: str, inner: Any, *args: Any, **kwargs: Any) -> Any:
        here = {m: files for m, files in places.items() if m.startswith(name + ".")}
        pairs: dict[Any, _Pair] = {}
        shared: dict[str, Any] = {}
        whole = []
        for number, start in enumerate(starts):
            rows = [*range(start, min(start + size, count))]
            both = _rows((args, kwargs), 2 * count, rows + [count + r for r in rows])
            with _Inputs(model, here, pairs, shared, number % 2, 2 * len(rows)):
                out = half_with(inner, False, both)
            whole.append(_rows(out, 2 * len(rows), range(len(rows))))
        loader.drop()
        for leader in list(pairs):
            files = [file for module, file in here.items() if shared.get(module) == leader]
            found = pairs.pop(leader).guess([partial(matrix, file) for file in files])
            if found is None:
                continue
            for file, share in zip(files, found[1], strict=True):
                if share > 0:
                    move(file, share * found[0])
        lossy = [
            half_with(
                inner,
                True,
                _rows((args, kwargs), 2 * count, range(count + s, count + min(s + size, count))),
            )
            for s in starts
        ]
        progress(blocks.index(name) + 1, len(blocks))
        out = _joined([*whole, *lossy])
        if name == blocks[-1]:
            raise _Reached
        return out

    _wrap(loader, blocks, leaf, block)
    try:
        with torch.no_grad():
            model(**model_inputs(model, np.concatenate([ids, ids])))
    except _Reached:
        return
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise WaterfillError(
            f"{type(model).__name__} cannot be run block by block: {error}"
        ) from error


def _that_fit(model: Any, ids: NDArray[np.int64], blocks: int) -> NDArray[np.int64]:
    """Windows whose hidden states may be kept, of both halves, before and after a block."""
    hidden = getattr(model.config.get_text_config(), "hidden_size", 0) or 1024
    model_nbytes = 4 * sum(p.numel() for p in model.parameters())
    tokens = int(max(KEPT_NBYTES, KEPT_SHARE * model_nbytes) / (4 * 4 * hidden))
    count = min(len(ids), tokens // ids.shape[1]) if blocks else 0
    if 2 * count == ids.shape[1]:
        count -= 1  # else rows of the batch could not be told from positions
    return ids[:count]


def _places(loader: Loader, movable: set[str]) -> dict[str, str]:
    """Module -> tensor of the checkpoint, of those that multiply by one movable tensor."""
    found = {}
    for name, module in loader.model.named_modules():
        parameter = module._parameters.get("weight")
        if parameter is None or parameter.ndim != 2 or isinstance(module, nn.Embedding):
            continue
        for slot in loader.slots(module, deep=False):
            if slot.attribute == "weight" and len(slot.names) == 1:
                job = loader.jobs.get(own_name(loader.model, slot))
                if job is not None and job.converter is None and job.files[0] in movable:
                    found[name] = job.files[0]
    return found


class _Inputs:
    """While active, adds what goes into some modules to their pairs; once for those that share it."""

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, str],
        pairs: dict[Any, _Pair],
        shared: dict[str, Any],
        half: int,
        rows: int,
    ) -> None:
        self.model, self.modules, self.pairs, self.shared = model, modules, pairs, shared
        self.half, self.rows = half, rows
        self.seen: dict[int, tuple[torch.Tensor, str]] = {}

    def __enter__(self) -> None:
        self.handles = [
            self.model.get_submodule(name).register_forward_pre_hook(self._hook(name))
            for name in self.modules
        ]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].detach()
            if rows.ndim < 3 or rows.shape[0] != self.rows:
                return  # not the two halves: what an expert gets
            first = self.seen.setdefault(id(args[0]), (args[0], name))[1]
            leader = self.shared.setdefault(name, first)
            if first == name:
                self.pairs.setdefault(leader, _Pair()).add(self.half, rows)

        return hook


def _wrap(loader: Loader, blocks: list[str], leaf: Any, block: Any) -> None:
    inside = tuple(name + "." for name in blocks)
    for name, module in loader.model.named_modules():
        inner = module.forward
        if name in blocks:
            module.forward = lambda *a, _n=name, _i=inner, **k: block(_n, _i, *a, **k)
        elif not name.startswith(inside) and loader.slots(module, deep=False):
            module.forward = lambda *a, _i=inner, **k: leaf(_i, *a, **k)


def _rows(value: Any, count: int, rows: Any) -> Any:
    """Some rows of every tensor that has `count` of them, all else as it is."""
    if isinstance(value, torch.Tensor):
        return value[list(rows)] if value.ndim > 1 and value.shape[0] == count else value
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(v, count, rows) for v in value)
    if isinstance(value, dict):
        return {key: _rows(v, count, rows) for key, v in value.items()}
    return value


def _spread(value: Any, count: int) -> Any:
    """What is the same for all rows (as positions are), once for each."""
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == 1:
        return value.expand(count, *value.shape[1:])
    return value


def _joined(parts: list[Any]) -> Any:
    """Outputs of parts of a batch as one."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(list(each)) for each in zip(*parts, strict=True))
    return first
