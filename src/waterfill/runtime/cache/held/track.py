"""Positions of the tokens in a cache, shared by its layers: runs of consecutive ones."""

from __future__ import annotations

import torch

__all__ = ["Track"]


class Track:
    """Token index -> position. Rows of a padded batch differ by an offset of their own."""

    def __init__(self) -> None:
        self.runs: list[
            tuple[int, torch.Tensor]
        ] = []  # index where it starts, offset (batch or 1,)
        self.tokens = 0

    def copy(self) -> Track:
        """Another that starts as this."""
        made = Track()
        made.runs, made.tokens = list(self.runs), self.tokens
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return sum(8 + offset.numel() * offset.element_size() for _, offset in self.runs)

    def extend(self, start: int, count: int, positions: torch.Tensor | None) -> None:
        """Tokens start to start + count have these positions; layers after the first say the same again.

        Parameters
        ----------
        positions : int64 (batch or 1, count), consecutive but for padding before them; None: as the index
        """
        if start + count <= self.tokens:
            return
        if positions is None:
            offset = self.runs[-1][1] if self.runs else torch.zeros(1, dtype=torch.int64)
        else:
            # The last token is never padding, so it knows where its row is.
            offset = positions[..., -1].reshape(-1).to("cpu", torch.int64) - (start + count - 1)
        if not self.runs or not torch.equal(offset, self.runs[-1][1]):
            self.runs.append((start, offset))
        self.tokens = start + count

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """int64 (batch or 1, stop - start)."""
        index = torch.arange(start, stop)
        if len(self.runs) == 1:
            return index[None] + self.runs[0][1][:, None]
        rows = max([len(offset) for _, offset in self.runs], default=1)
        out = index.repeat(rows, 1)
        for at, offset in self.runs:
            if at < stop:
                some = slice(max(at - start, 0), None)
                out[:, some] = index[some] + offset[:, None]
        return out

    def offsets(self, start: int, stop: int) -> list[tuple[int, torch.Tensor]]:
        """Indices from start on where positions begin to be so much, int64 (batch or 1,), ahead of them."""
        runs = self.runs or [(0, torch.zeros(1, dtype=torch.int64))]
        ends = [at for at, _ in runs[1:]] + [stop]
        found = [
            (max(at, start), offset)
            for (at, offset), end in zip(runs, ends, strict=True)
            if at < stop and end > start
        ]
        return found

    def padding(self) -> torch.Tensor:
        """int64 (batch or 1,): tokens of padding that each row begins with."""
        return (-self.runs[0][1]).clamp_min(0) if self.runs else torch.zeros(1, dtype=torch.int64)

    def keep(self, tokens: int) -> None:
        """Forget all but the first so many tokens."""
        self.tokens = min(self.tokens, tokens)
        self.runs = [run for run in self.runs if run[0] < self.tokens]

    def splice(self, start: int, stop: int, count: int) -> None:
        """Put `count` tokens in the place of tokens start to stop; later ones move by the difference.

        Positions move as indices do, so that each run's offset stays; new tokens go on from those before.
        """
        if not self.runs:
            return
        before = [run for run in self.runs if run[0] < start] or [(0, self.runs[0][1])]
        after = [(at, offset) for at, offset in self.runs if start <= at]
        inside = [run for run in self.runs if run[0] <= stop]
        moved = count - (stop - start)
        runs = [*before, (stop + moved, inside[-1][1])]
        runs += [(at + moved, offset) for at, offset in after if at > stop]
        self.tokens += moved
        kept: list[tuple[int, torch.Tensor]] = []
        for at, offset in runs:
            if kept and kept[-1][0] == at:
                kept.pop()
            if at < self.tokens and not (kept and torch.equal(offset, kept[-1][1])):
                kept.append((at, offset))
        self.runs = kept

    def rows(self, index: torch.Tensor) -> None:
        """Take rows of the batch."""
        self.runs = [(at, o if len(o) == 1 else o[index.to("cpu")]) for at, o in self.runs]
