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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from waterfill.calibrate.batches import joined, rows_of, spread
from waterfill.calibrate.loader import Loader, own_name
from waterfill.calibrate.memory import share_of, tokens_that_fit
from waterfill.calibrate.missing import Pair
from waterfill.calibrate.passes import model_inputs
from waterfill.calibrate.stream import block_names, build_skeleton, install_doors
from waterfill.calibrate.watch import Watch
from waterfill.sources.base import Source
from waterfill.types import Floats, WaterfillError

__all__ = ["propagate"]

CHUNK = 512  # tokens of either half that are in a block at a time, or a window
KEPT_NBYTES = 128 << 20  # of hidden states between blocks, or a share of the model if that is more
SUMS_NBYTES = 100 << 20  # the same of sums over tokens

Matrix = Callable[[str], Floats]
Move = Callable[[str, Floats, float], None]
Settle = Callable[[str], None]


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


def propagate(
    source: Source,
    compressed: Source,
    ids: NDArray[np.int64],
    movable: set[str],
    matrix: Matrix,
    move: Move,
    settle: Settle,
    progress: Callable[[int, int], None],
) -> None:
    """Walk the blocks; aim their matrices anew.

    Parameters
    ----------
    source : the original
    compressed : the model as it is so far; read again after each `settle`
    ids : int64 (windows, window)
    movable : tensors whose aim may be moved
    matrix : tensor -> its matrix (m, n) in the original
    move : told (tensor, P, s) that a matrix W should rather become ``W + s W P``
    settle : told of a tensor when it can be encoded anew; to change `compressed`
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
    walk = _Walk(
        loader, blocks, _places(loader, movable), ids.shape, matrix, move, settle, progress
    )
    _wrap(loader, blocks, walk.leaf, walk.block)
    try:
        with torch.no_grad():
            model(**model_inputs(model, np.concatenate([ids, ids])))
    except _Reached:
        return
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise WaterfillError(
            f"{type(model).__name__} cannot be run block by block: {error}"
        ) from error


@dataclass
class _Walk:
    """What stands in for the forward of blocks, and of modules outside of them."""

    loader: _TwoLoaders
    blocks: list[str]
    places: dict[str, str]
    shape: tuple[int, ...]  # windows of either half of the batch, tokens in each
    matrix: Matrix
    move: Move
    settle: Settle
    progress: Callable[[int, int], None]

    def leaf(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """A module outside all blocks."""
        count = self.shape[0]
        halves = [
            self._run(inner, second, (args, kwargs), range(count * second, count * (second + 1)))
            for second in (False, True)
        ]
        return joined([spread(half, count) for half in halves])

    def block(self, name: str, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """A block: as it was, to see what goes in; then as it is aimed anew."""
        count, window = self.shape
        size = max(1, min(CHUNK // window, (count + 1) // 2))  # two chunks at least
        chunks = [range(at, min(at + size, count)) for at in range(0, count, size)]
        whole: list[Any] = []
        for modules in self._turns(name):
            inputs = _Inputs(self.loader.model, modules)
            whole.clear()
            for number, rows in enumerate(chunks):
                beside = range(count + rows.start, count + rows.stop)
                with inputs.seen_in(number % 2, len(rows)):
                    whole.append(self._run(inner, False, (args, kwargs), rows))
                    self._run(inner, False, (args, kwargs), beside)
            self.loader.drop()
            for sharing, pair in inputs.pairs():
                for file in self._aim([self.places[module] for module in sharing], pair):
                    self.settle(file)
        lossy = [
            self._run(inner, True, (args, kwargs), range(count + rows.start, count + rows.stop))
            for rows in chunks
        ]
        self.progress(self.blocks.index(name) + 1, len(self.blocks))
        if name == self.blocks[-1]:
            raise _Reached
        return joined([*whole, *lossy])

    def _turns(self, block: str) -> list[list[str]]:
        """A block's modules, so many at a time that the sums of their inputs are not too large."""
        turns: list[list[str]] = [[]]
        room = left = share_of(self.loader.model, SUMS_NBYTES)
        for name in self.places:
            if name.startswith(block + "."):
                module: Any = self.loader.model.get_submodule(name)
                taken = 3 * 4 * getattr(module, "in_features", module.weight.shape[0]) ** 2
                if left < taken and turns[-1]:
                    turns.append([])
                    left = room
                turns[-1].append(name)
                left -= taken
        return turns

    def _run(self, inner: Any, of_compressed: bool, given: tuple[Any, Any], rows: Any) -> Any:
        self.loader.of_compressed = of_compressed
        args, kwargs = rows_of(given, 2 * self.shape[0], rows)
        return inner(*args, **kwargs)

    def _aim(self, files: list[str], pair: Pair) -> list[str]:
        """Move matrices that share their inputs; those that were."""
        found = pair.guess([partial(self.matrix, file) for file in files])
        if found is None:
            return []
        moved = [(file, share) for file, share in zip(files, found[1], strict=True) if share > 0]
        for file, share in moved:
            self.move(file, found[0], share)
        return [file for file, _ in moved]


def _that_fit(model: Any, ids: NDArray[np.int64], blocks: int) -> NDArray[np.int64]:
    """Windows whose hidden states may be kept, of both halves, before and after a block."""
    count = min(len(ids), tokens_that_fit(model, KEPT_NBYTES, 4) // ids.shape[1]) if blocks else 0
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
    """Pairs of what goes into some modules of a block; one for all that get the same."""

    def __init__(self, model: nn.Module, modules: list[str]) -> None:
        self.modules = {name: model.get_submodule(name) for name in modules}
        self._pairs: dict[str, Pair] = {}
        self._leaders: dict[str, str] = {}

    @contextmanager
    def seen_in(self, half: int, rows: int) -> Iterator[None]:
        """Add to this half of the text what is seen meanwhile: so many rows of x, then those of z."""
        seen: dict[int, tuple[torch.Tensor, str]] = {}  # held, so that no other gets its number
        waiting: dict[str, torch.Tensor] = {}

        def look(name: str, args: tuple[Any, ...]) -> None:
            if args[0].ndim < 3 or args[0].shape[0] != rows:
                return  # what an expert gets: not the same tokens in both models
            first = seen.setdefault(id(args[0]), (args[0], name))[1]
            leader = self._leaders.setdefault(name, first)
            if first == name and name in waiting:
                self._pairs.setdefault(leader, Pair()).add(half, waiting.pop(name), args[0])
            elif first == name:
                waiting[name] = args[0]

        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: look(name, args))
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def pairs(self) -> Iterator[tuple[list[str], Pair]]:
        """Modules that share their inputs, and their pair, which is given away."""
        for leader in list(self._pairs):
            yield (
                [m for m, first in self._leaders.items() if first == leader],
                self._pairs.pop(leader),
            )


def _wrap(loader: Loader, blocks: list[str], leaf: Any, block: Any) -> None:
    inside = tuple(name + "." for name in blocks)
    for name, module in loader.model.named_modules():
        inner = module.forward
        if name in blocks:
            module.forward = lambda *a, _n=name, _i=inner, **k: block(_n, _i, *a, **k)
        elif not name.startswith(inside) and loader.slots(module, deep=False):
            module.forward = lambda *a, _i=inner, **k: leaf(_i, *a, **k)
