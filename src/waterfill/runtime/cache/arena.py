"""Coded blocks in the order they came, each part in segments that never move as more are appended."""

from __future__ import annotations

import torch

from waterfill.runtime.cache.method import Coded

__all__ = ["Arena"]

SEGMENT = 16  # blocks; allocated at once


class Arena:
    """A queue of blocks: appended at the end, taken away at either end."""

    def __init__(self) -> None:
        self.segments: list[dict[str, torch.Tensor]] = []
        self.first = self.last = 0  # blocks, counted from the first segment's beginning

    @property
    def count(self) -> int:
        """Blocks held."""
        return self.last - self.first

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block, of all rows of the batch."""
        parts = self.segments[0].values() if self.segments else ()
        return sum(t[:, 0].numel() * t.element_size() for t in parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks held."""
        return self.count * self.block_nbytes

    def append(self, coded: Coded) -> None:
        """Add blocks at the end: part -> (batch, blocks, ...)."""
        more = next(iter(coded.values())).shape[1]
        done = 0
        while done < more:
            at = self.last % SEGMENT
            if at == 0 and self.last // SEGMENT == len(self.segments):
                self.segments.append(
                    {k: v.new_empty((v.shape[0], SEGMENT, *v.shape[2:])) for k, v in coded.items()}
                )
            n = min(SEGMENT - at, more - done)
            segment = self.segments[self.last // SEGMENT]
            for name, part in coded.items():
                segment[name][:, at : at + n] = part[:, done : done + n]
            self.last, done = self.last + n, done + n

    def runs(self, low: int, high: int) -> list[Coded]:
        """Blocks low to high, counted from the first that is held, as views of each segment that has some."""
        low, high = low + self.first, high + self.first
        found: list[Coded] = []
        while low < high:
            at = low % SEGMENT
            n = min(SEGMENT - at, high - low)
            found.append({k: v[:, at : at + n] for k, v in self.segments[low // SEGMENT].items()})
            low += n
        return found

    def blocks(self, low: int, high: int) -> Coded:
        """As `runs`, in one; a view where one segment has them."""
        runs = self.runs(low, high)
        if len(runs) == 1:
            return runs[0]
        return {name: torch.cat([run[name] for run in runs], 1) for name in runs[0]}

    def pop_front(self, n: int) -> None:
        """Take away the first n blocks."""
        self.first += n
        gone = self.first // SEGMENT
        # Pieces of views index from `first`: nothing is dropped while a forward pass runs.
        del self.segments[:gone]
        self.first, self.last = self.first - gone * SEGMENT, self.last - gone * SEGMENT

    def pop_back(self, n: int) -> None:
        """Take away the last n blocks."""
        self.last -= n
        del self.segments[-(-self.last // SEGMENT) :]

    def rows(self, index: torch.Tensor) -> Arena:
        """These rows of the batch, as another arena."""
        made = Arena()
        made.first, made.last = self.first, self.last
        made.segments = [
            {k: v.index_select(0, index.to(v.device)) for k, v in s.items()} for s in self.segments
        ]
        return made
