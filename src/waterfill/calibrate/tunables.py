"""A coded matrix in torch: its values, a step in its numbers, and the codes worth changing."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from waterfill.types import Tunable, Weighting

__all__ = ["Moves", "Tuned"]

BETAS = 0.9, 0.95  # of Adam
FLOOR = 0.01  # of the mean curvature: below it one says nothing
SCORES = 1 << 22  # numbers worked on at once


@dataclass(frozen=True)
class Moves:
    """Codes to change in one term: where, and to what."""

    term: int
    rows: torch.Tensor
    columns: torch.Tensor
    codes: torch.Tensor


class Tuned:
    """What is tuned of one matrix (m, n).

    Parameters
    ----------
    tunable : as it was coded
    weighting : of the matrix; its diagonal is taken for the curvature of the harm
    """

    def __init__(self, tunable: Tunable, weighting: Weighting) -> None:
        self.tunable = tunable
        self.codes = [torch.from_numpy(t.codes.copy()) for t in tunable.terms]
        self._books = [torch.from_numpy(np.ascontiguousarray(t.book)) for t in tunable.terms]
        tables = {f"table {i}": t.table for i, t in enumerate(tunable.terms)}
        arrays = {"scales": tunable.scales, "columns": tunable.columns, **tables}
        self.numbers = {k: torch.from_numpy(v.copy()) for k, v in arrays.items()}
        self.learned = [
            k for k in self.numbers if k.replace("table ", "tables ").split()[0] in tunable.learned
        ]
        self._unit = {k: _unit(k, self.numbers[k]) for k in self.learned}
        self._first = {k: torch.zeros_like(self.numbers[k]) for k in self.learned}
        self._second = {k: torch.zeros_like(self.numbers[k]) for k in self.learned}
        self._steps = 0
        fixed = tunable.fixed
        self._fixed = None if fixed is None else torch.from_numpy(fixed.copy())
        self.across, self.down = _curvature(tunable.shape, weighting)
        self.gradient = torch.zeros(tunable.shape)
        self._seen = 0
        self._dense: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """Float32 (m, n)."""
        made = [self._term(i) for i in range(len(self.codes))]
        values = sum(made[1:], made[0]) * self.numbers["columns"] * self._scales()
        if self._fixed is None:
            return values
        return torch.where(self._fixed.isnan(), values, self._fixed)

    def see(self, gradient: torch.Tensor) -> None:
        """Add to the mean gradient of the values since codes changed last."""
        self._seen += 1
        self.gradient += (gradient - self.gradient) / self._seen

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """One step of Adam in the numbers, relative to their size, against a gradient of the values."""
        if not self.learned:
            return
        learned = [self.numbers[k].requires_grad_() for k in self.learned]
        with torch.enable_grad():
            found = torch.autograd.grad(self.values(), learned, gradient)
        self._steps += 1
        for name, slope in zip(self.learned, found, strict=True):
            number = self.numbers[name].requires_grad_(False)
            unit, first, second = self._unit[name], self._first[name], self._second[name]
            first.lerp_(slope * unit, 1 - BETAS[0])
            second.lerp_((slope * unit).square(), 1 - BETAS[1])
            mean = first / (1 - BETAS[0] ** self._steps)
            root = (second / (1 - BETAS[1] ** self._steps)).sqrt()
            number -= rate * unit * mean / (root + 1e-12)

    def moves(self, term: int, share: float, damping: float, price: float = 0.0) -> Moves:
        """Changes of a share of each row's codes: those that a step along the gradient asks for most.

        The dense update of the values is ``-gradient / (damping * curvature)``. Of the entries that
        a block could be, the one next to its updated values (in the metric of the curvature) gains
        most by the linearised harm with its curvature, less `price` (nats a bit) for what it takes
        in the file where codes are entropy coded.
        """
        codes, table = self.codes[term], self.numbers[f"table {term}"]
        entry, gains = torch.empty_like(codes), torch.empty(codes.shape)
        size = table[0, 0].numel()
        book = self._books[term].expand(codes.shape)
        bits = price * self._bits(term)
        step = max(1, SCORES // max(codes.shape[1] * table.shape[1] * size, 1))
        for at in range(0, len(codes), step):
            rows = slice(at, at + step)
            slope, bend = self._blocks(term, rows)
            bend *= damping
            now = table[book[rows].long(), codes[rows].long()].reshape(slope.shape)
            slope -= bend * now
            score = _score(slope, bend, table.reshape(*table.shape[:2], -1), book[rows])
            score.nan_to_num_(nan=math.inf)
            score += bits[book[rows].long()]
            own = (slope * now + 0.5 * bend * now.square()).sum(-1)
            own += bits[book[rows].long(), codes[rows].long()]
            best, index = score.min(-1)
            entry[rows], gains[rows] = index.int(), own - best
        gains[entry == codes] = 0
        top = gains.topk(min(math.ceil(share * codes.shape[1]), codes.shape[1]), 1)
        row, number = (top.values > 0).nonzero(as_tuple=True)
        column = top.indices[row, number]
        return Moves(term, row, column, entry[row, column])

    def drag(self, damping: float) -> None:
        """Straight-through estimation: from here the gradient leads to the sum of all dense updates."""
        bend = damping * self.down[:, None] * self.across
        if self._dense is None:
            self._dense = self.values().clone()
        self._dense -= self.gradient / bend
        self.gradient = (self.values() - self._dense) * bend

    def apply(self, moves: Moves) -> Moves:
        """Change codes; the moves that take it back."""
        at = moves.rows, moves.columns
        before = self.codes[moves.term][at]
        self.codes[moves.term][at] = moves.codes
        return dataclasses.replace(moves, codes=before)

    def forget(self) -> None:
        """Begin the mean gradient anew."""
        self._seen = 0

    def done(self) -> Tunable:
        """As it is now."""
        terms = tuple(
            dataclasses.replace(t, codes=c.numpy().copy(), table=self._array(f"table {i}"))
            for i, (t, c) in enumerate(zip(self.tunable.terms, self.codes, strict=True))
        )
        return dataclasses.replace(
            self.tunable, terms=terms, scales=self._array("scales"), columns=self._array("columns")
        )

    def _array(self, name: str) -> np.ndarray:
        return self.numbers[name].detach().numpy().copy()

    def _term(self, term: int) -> torch.Tensor:
        codes, table = self.codes[term], self.numbers[f"table {term}"]
        entries, height, width = table.shape[1:]
        (m, n), (rows, columns) = self.tunable.shape, codes.shape
        index = (codes + self._books[term] * entries).reshape(-1)
        blocks = table.reshape(-1, height * width).index_select(0, index)
        if height * width == 1:
            return blocks.view(rows, columns)
        blocks = blocks.view(rows, columns, height, width).permute(0, 2, 1, 3)
        return blocks.reshape(rows * height, columns * width)[:m, :n]

    def _bits(self, term: int) -> torch.Tensor:
        """What an entry takes in the file, about, beyond what all codes take: (books, entries)."""
        books, entries = self.numbers[f"table {term}"].shape[:2]
        if not self.tunable.coded:
            return torch.zeros(books, entries)
        index = (self.codes[term] + self._books[term] * entries).reshape(-1)
        count = torch.bincount(index, minlength=books * entries).view(books, entries) + 0.5
        return (count.sum(1, keepdim=True) / count).log2()

    def _scales(self) -> torch.Tensor:
        scales, group = self.numbers["scales"], self.tunable.group
        return scales.repeat_interleave(group, 1)[:, : self.tunable.shape[1]]

    def _blocks(self, term: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient and curvature by the entries of some rows of blocks, each (rows, N, size)."""
        height, width = self.numbers[f"table {term}"].shape[2:]
        m, n = self.tunable.shape
        columns = self.codes[term].shape[1]
        own = slice(rows.start * height, min(rows.stop * height, m))
        scales = self._scales()
        factor = self.numbers["columns"] * (scales if len(scales) == 1 else scales[own])
        slope = self.gradient[own] * factor
        if self._fixed is not None:
            slope[~self._fixed[own].isnan()] = 0
        bend = self.down[own, None] * self.across * factor.square()
        count = -(-slope.shape[0] // height)

        def blocks(x: torch.Tensor) -> torch.Tensor:
            padded = torch.nn.functional.pad(
                x, (0, columns * width - n, 0, count * height - len(x))
            )
            tiles = padded.view(count, height, columns, width).permute(0, 2, 1, 3)
            return tiles.reshape(count, columns, height * width)

        return blocks(slope), blocks(bend)


def _score(
    slope: torch.Tensor, bend: torch.Tensor, table: torch.Tensor, book: torch.Tensor
) -> torch.Tensor:
    """Of every entry in place of every block: ``slope . entry + entry . bend . entry / 2``."""
    if len(table) == 1:
        return slope @ table[0].T + bend @ (0.5 * table[0].square()).T
    mine = table[book.long()]
    return (mine @ slope[..., None] + 0.5 * mine.square() @ bend[..., None])[..., 0]


def _unit(name: str, number: torch.Tensor) -> torch.Tensor:
    """What a step is measured in: a scale itself, and the spread of a table's entries."""
    if name.startswith("table"):
        return number.square().nanmean((1, 2, 3), keepdim=True).sqrt().expand_as(number)
    return number.abs().clone()


def _curvature(shape: tuple[int, int], weighting: Weighting) -> tuple[torch.Tensor, torch.Tensor]:
    """Second derivative of the harm by element (i, j) is about ``down[i] * across[j]``."""
    moment = weighting.second_moment
    if moment is None:
        moment = np.ones(shape[1], np.float32)
    across = moment if moment.ndim == 1 else moment.diagonal()
    down = np.broadcast_to(np.asarray(weighting.row_weights, np.float32), shape[:1])
    return _floored(across), _floored(down)


def _floored(values: np.ndarray) -> torch.Tensor:
    least = FLOOR * float(values.mean()) if values.size else 0.0
    return torch.from_numpy(np.maximum(values, least or 1.0).astype(np.float32))
