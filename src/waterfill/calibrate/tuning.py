"""Codes and numbers of a compressed model, bettered on text: PV-Tuning.

Two kinds of steps take turns (Malinovskii et al. 2024, arXiv 2405.14852). A V-step changes the
continuous numbers (scales, entries of codebooks) along the gradient of KL(original || compressed). A
P-step changes codes: from the dense update that the gradient asks for, back to the nearest values
that the codebook has, in those few places alone where that gains most. In a small subspace the step
may be long; in all places at once it would have to be so short that no code changed. Nothing is kept
of the update beside the codes: that would be straight-through estimation.

A P-step must prove itself on text that its gradient has not seen, else it is halved, then dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from waterfill.calibrate.loader import Loader, load_all
from waterfill.calibrate.logits import streamed_logits
from waterfill.calibrate.names import Placement, place
from waterfill.calibrate.passes import model_inputs
from waterfill.calibrate.stream import build_skeleton
from waterfill.calibrate.tunables import Moves, Tuned
from waterfill.sources.base import Source
from waterfill.types import TensorInfo, Tunable, WaterfillError, Weighting

__all__ = ["Tuning", "tune"]

BATCH_TOKENS = 2048
BATCH_LOGITS = 1 << 24  # numbers, of one model: 64 MB as float32
PERIOD = 4  # V-steps to a P-step
ALONE = 8  # the first of the V-steps have no P-steps between them: one in so many
ATTEMPTS = 4  # at a P-step, each shorter than the one before
DAMPING = 8.0  # of the first: curvature of many changes at once, in that of one alone
THROUGH = 256.0  # the same where all dense updates are added up; a quarter of it diverges
EASING = 1.5  # of damping, from one attempt to the next


@dataclass(frozen=True)
class Tuning:
    """How to tune.

    Attributes
    ----------
    method : what comes between V-steps. pv: P-steps; v: nothing, codes stay; ste: straight-through
        estimation, all updates of dense weights added up and rounded anew
    steps : V-steps, a batch of text each
    seed : of the order of the text
    share : of a row's codes, at most, that a P-step changes
    rate : of V-steps at first, relative to the numbers; it falls to nothing like a cosine
    price : of a bit in the file, in nats, where codes are entropy coded
    """

    method: str = "pv"
    steps: int = 64
    seed: int = 0
    share: float = 0.03
    rate: float = 1e-2
    price: float = 0.0


def tune(
    source: Source,
    compressed: Source,
    ids: NDArray[np.int64],
    infos: Mapping[str, TensorInfo],
    tunables: Mapping[str, Tunable],
    weighting: Callable[[str], Weighting | None],
    how: Tuning,
    progress: Callable[[int, int], None],
) -> dict[str, Tunable]:
    """Better the codes and numbers of a compressed model.

    The model is held in float32, with its gradient and the mean of that.

    Parameters
    ----------
    source : the original, of which a block at a time is in memory
    compressed : the same tensors as they are decoded
    ids : int64 (windows, window), the text
    infos : of all items of the checkpoint
    tunables : item -> what may change
    weighting : of an item; its diagonal stands for the curvature of the harm
    progress : told (done, total), in V-steps

    Returns
    -------
    dict
        Item -> as it is now, those alone that the running model takes as they are.

    Raises
    ------
    WaterfillError
        Where the model has no logits, or cannot be run or differentiated.
    """
    model = build_skeleton(source)
    loader = Loader(model, compressed)
    parameters = load_all(loader)
    spots = _spots(loader, parameters, infos, tunables)
    held = {
        name: _Item(Tuned(tunables[name], weighting(name) or Weighting()), spots[name])
        for name in tunables
        if spots[name]
    }
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 1
    run = _Run(model, list(held.values()), how)
    try:
        run.all(source, _batches(ids, vocabulary), progress)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise WaterfillError(f"{type(model).__name__} cannot be tuned: {error}") from error
    return {name: item.tuned.done() for name, item in held.items()}


def _batches(ids: NDArray[np.int64], vocabulary: int) -> list[NDArray[np.int64]]:
    room = min(BATCH_TOKENS, BATCH_LOGITS // vocabulary)
    per_batch = max(1, room // ids.shape[1])
    return np.array_split(ids, -(-len(ids) // per_batch))


@dataclass
class _Run:
    model: Any
    items: list[_Item]
    how: Tuning

    def __post_init__(self) -> None:
        self.damping = DAMPING
        self.turn = 0

    def all(
        self,
        source: Source,
        batches: list[NDArray[np.int64]],
        progress: Callable[[int, int], None],
    ) -> None:
        """Every step."""
        steps = self.how.steps
        order = _order(len(batches), steps, self.how.seed)
        references = streamed_logits(source, [batches[i] for i in order])
        for item in self.items:
            item.write()
        for number, (which, reference) in enumerate(zip(order, references, strict=True)):
            if reference is None:
                raise WaterfillError(f"{type(self.model).__name__} has no logits to tune by")
            if number >= max(steps // ALONE, 1) and number % PERIOD == 0:
                self._change(batches[which], reference)
            self._learn(batches[which], reference, number / steps)
            progress(number + 1, steps)

    def _learn(self, ids: NDArray[np.int64], reference: torch.Tensor, at: float) -> None:
        """A V-step; the gradient is kept for the next P-step."""
        rate = self.how.rate * 0.5 * (1 + math.cos(math.pi * at))
        with torch.enable_grad():
            logits = self._logits(ids)
            slope = _divergence(reference, logits.detach())[1]
            torch.autograd.backward([logits], [slope])
        for item in self.items:
            gradient = item.gradient()
            item.tuned.see(gradient)
            item.tuned.step(gradient, rate)
            item.write()
        for parameter in self.model.parameters():
            parameter.grad = None

    def _change(self, ids: NDArray[np.int64], reference: torch.Tensor) -> None:
        """What comes between V-steps."""
        match self.how.method:
            case "pv":
                self._choose(ids, reference)
            case "ste":
                for item in self.items:
                    item.tuned.drag(THROUGH)
                    for term in range(len(item.tuned.codes)):
                        item.tuned.apply(item.tuned.moves(term, 1.0, THROUGH))
                    item.tuned.forget()
                self._write()

    def _choose(self, ids: NDArray[np.int64], reference: torch.Tensor) -> None:
        """A P-step, kept if it is good for this text."""
        before = self._harm(ids, reference)
        for attempt in range(ATTEMPTS):
            damping = self.damping * EASING**attempt
            back = [(i, i.tuned.apply(self._moves(i, damping))) for i in self.items]
            self._write()
            if self._harm(ids, reference) <= before:
                # None that are worth it, or good ones: bolder next time.
                self.damping = damping / EASING
                for item in self.items:
                    item.tuned.forget()
                break
            for item, moves in back:
                item.tuned.apply(moves)
        else:
            self._write()
            self.damping *= EASING
        self.turn += 1

    def _moves(self, item: _Item, damping: float) -> Moves:
        term = self.turn % len(item.tuned.codes)
        return item.tuned.moves(term, self.how.share, damping, self.how.price)

    def _write(self) -> None:
        for item in self.items:
            item.write()

    def _logits(self, ids: NDArray[np.int64]) -> torch.Tensor:
        logits: torch.Tensor = self.model(**model_inputs(self.model, ids)).logits
        return logits.reshape(-1, logits.shape[-1])

    def _harm(self, ids: NDArray[np.int64], reference: torch.Tensor) -> float:
        with torch.no_grad():
            return _divergence(reference, self._logits(ids))[0]


def _divergence(p: torch.Tensor, q: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean KL in nats per token of logits (tokens, vocabulary), and its gradient by those of q."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    chance = p.exp()
    return float((chance * (p - q)).sum(-1).mean()), (q.exp() - chance) / len(p)


def _order(count: int, steps: int, seed: int) -> list[int]:
    """Numbers below `count`, all of them in a random order, then in another."""
    random = np.random.default_rng(seed)
    rounds = [random.permutation(count) for _ in range(-(-steps // count))]
    return [int(i) for i in np.concatenate(rounds)[:steps]]


@dataclass(frozen=True)
class _Spot:
    """Where a part of a matrix lies in a parameter."""

    parameter: torch.Tensor
    index: int | None
    inside: Any  # of the parameter, or of its slice
    part: Any  # of the matrix
    turned: bool

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.index is None else tensor[self.index]


@dataclass(frozen=True)
class _Item:
    tuned: Tuned
    spots: list[_Spot]

    def gradient(self) -> torch.Tensor:
        """Of the values (m, n), from all places where they are used."""
        found = torch.zeros(self.tuned.tunable.shape)
        for spot in self.spots:
            if spot.parameter.grad is not None:
                own = spot.view(spot.parameter.grad)[spot.inside]
                found[spot.part] += (own.T if spot.turned else own).reshape(found[spot.part].shape)
        return found

    def write(self) -> None:
        """Put the values where they are used."""
        with torch.no_grad():
            values = self.tuned.values()
            for spot in self.spots:
                target, own = spot.view(spot.parameter), values[spot.part]
                own = own.T if spot.turned else own
                target[spot.inside] = own.reshape(target[spot.inside].shape)


def _spots(
    loader: Loader,
    parameters: Mapping[str, torch.Tensor],
    infos: Mapping[str, TensorInfo],
    tunables: Mapping[str, Tunable],
) -> dict[str, list[_Spot]]:
    """Where each item is used; gradients are asked for there."""
    shapes = {name: shape for name, (_, shape) in loader.source.tensors.items()}
    placed = place(loader.all_jobs, shapes, loader.model)
    plain = {job.files[0]: job.key for job in loader.all_jobs if job.converter is None}
    found: dict[str, list[_Spot]] = {name: [] for name in tunables}
    for info in infos.values():
        name = info.group or info.name
        if name not in found:
            continue
        places = placed.get((info.tensor, info.index), [])
        found[name] += [
            _spot(p, parameters[p.parameter], info) for p in places if p.parameter in parameters
        ]
        home = plain.get(info.name)
        if not places and home in parameters:
            found[name].append(_Spot(parameters[str(home)], None, ..., ..., False))
    for spots in found.values():
        for spot in spots:
            spot.parameter.requires_grad_(True)
    return found


def _spot(p: Placement, parameter: torch.Tensor, info: TensorInfo) -> _Spot:
    inside = _at(p.columns, p.rows) if p.transposed else _at(p.rows, p.columns)
    turned = p.transposed != info.transposed
    part = (p.file_columns, p.file_rows) if info.transposed else (p.file_rows, p.file_columns)
    return _Spot(parameter, p.index, inside, _at(*part), turned)


def _at(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Any:
    """An index of a matrix: slices where they will do, for they make no copy."""
    spans = [slice(int(i[0]), int(i[-1]) + 1) for i in (rows, columns)]
    whole = all(np.array_equal(i, np.arange(i[0], i[-1] + 1)) for i in (rows, columns))
    return tuple(spans) if whole else (torch.from_numpy(rows)[:, None], torch.from_numpy(columns))
