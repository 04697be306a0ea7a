"""Coded blocks in the order they came, each part in segments that never move as more are appended."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch

from waterfill.runtime.cache.method import Coded

__all__ = ["Arena"]

SEGMENT = 16  # blocks; allocated at once
PAGES = 1 << 15  # bytes, from which pages of its own are worth it
POPULATE_WRITE = 23  # Linux's number of the advice, which `mmap` does not name


def _room(part: torch.Tensor, segments: int, soon: int = 0) -> torch.Tensor:
    """Room for segments of such blocks: (segments, batch, SEGMENT, ...).

    Large ones get pages of their own: between what forward passes allocate and free, a heap of blocks grows
    to half as much again as they take. Private ones: those that processes can share are slow to come.

    Parameters
    ----------
    soon : blocks at the beginning that are about to be written
    """
    shape = (segments, part.shape[0], SEGMENT, *part.shape[2:])
    nbytes = math.prod(shape) * part.element_size()
    if part.device.type != "cpu" or nbytes < PAGES:
        return part.new_empty(shape)
    pages = _pages(nbytes, soon * nbytes // (segments * SEGMENT))
    return torch.frombuffer(pages, dtype=part.dtype).reshape(shape)


def _pages(nbytes: int, soon: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if soon and sys.platform == "linux":
        with suppress(OSError):  # a kernel before 5.14: pages come one by one, as they are touched
            pages.madvise(POPULATE_WRITE, 0, soon)
    return pages


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
                self.segments.append({name: _room(part, 1)[0] for name, part in coded.items()})
            n = min(SEGMENT - at, more - done)
            segment = self.segments[self.last // SEGMENT]
            for name, part in coded.items():
                segment[name][:, at : at + n] = part[:, done : done + n]
            self.last, done = self.last + n, done + n

    def reserve(self, like: Coded, blocks: int) -> list[Coded]:
        """Room for blocks of such parts at the end, in views that hold them, for `grow` to count as held."""
        missing = -(-(self.last + blocks) // SEGMENT) - len(self.segments)
        if missing <= 0:
            return list(self.runs(self.count, self.count + blocks))
        old = len(self.segments) * SEGMENT - self.last
        wide = {name: _room(part, missing, blocks - old) for name, part in like.items()}
        self.segments += [{k: v[i] for k, v in wide.items()} for i in range(missing)]
        first = list(self.runs(self.count, self.count + old))
        if any(part.shape[1] != 1 for part in wide.values()):
            return first + list(self.runs(self.count + old, self.count + blocks))
        # Segments of one row follow each other: as one they cost one view, not many.
        return [*first, {k: v.flatten(0, 2)[None, : blocks - old] for k, v in wide.items()}]

    def grow(self, blocks: int) -> None:
        """Hold blocks that were written to where `reserve` said."""
        self.last += blocks

    def runs(self, low: int, high: int) -> Iterator[Coded]:
        """Views of blocks low to high, counted from the first that is held, a segment at a time."""
        low, high = low + self.first, high + self.first
        while low < high:
            at = low % SEGMENT
            n = min(SEGMENT - at, high - low)
            segment = self.segments[low // SEGMENT]
            yield segment if n == SEGMENT else {k: v[:, at : at + n] for k, v in segment.items()}
            low += n

    def addresses(
        self, low: int, high: int, parts: Sequence[tuple[str, int]]
    ) -> list[tuple[int, list[tuple[int, int]]]]:
        """Where blocks low to high lie: blocks in one piece; of each part, address and bytes between rows.

        Parameters
        ----------
        parts : names, and bytes of a block
        """
        found, low, high = [], low + self.first, high + self.first
        while low < high:
            at = low % SEGMENT
            n = min(SEGMENT - at, high - low)
            places = []
            for name, nbytes in parts:
                part = self.segments[low // SEGMENT][name]
                step, unit = part.stride(), part.element_size()
                if part.numel() and step[1] * unit != nbytes:
                    raise ValueError(f"blocks of {step[1] * unit} bytes, not {nbytes}")
                places.append((part.data_ptr() + at * nbytes, step[0] * unit))
            found.append((n, places))
            low += n
        return found

    def blocks(self, low: int, high: int) -> Coded:
        """Blocks low to high, counted from the first that is held; a view where one segment has them."""
        runs = list(self.runs(low, high))
        if len(runs) == 1:
            return runs[0]
        return {name: torch.cat([run[name] for run in runs], 1) for name in runs[0]}

    def replace(self, low: int, high: int, coded: Coded | None) -> None:
        """Put other blocks in the place of blocks low to high; what follows moves as it is coded."""
        later = []
        while self.count > high:
            n = min(SEGMENT, self.count - high)
            later.append({k: v.clone() for k, v in self.blocks(self.count - n, self.count).items()})
            self.pop_back(n)
        self.pop_back(high - low)
        if coded is not None:
            self.append(coded)
        while later:
            self.append(later.pop())

    def overwrite(self, low: int, coded: Coded) -> None:
        """Put other blocks in the place of as many from block `low` on."""
        high, done = low + next(iter(coded.values())).shape[1], 0
        for run in self.runs(low, high):
            n = next(iter(run.values())).shape[1]
            for name, part in coded.items():
                run[name].copy_(part[:, done : done + n])
            done += n

    def add_part(self, name: str, dtype: torch.dtype) -> None:
        """Give each block one more part, a zero."""
        for segment in self.segments:
            like = next(iter(segment.values()))
            segment[name] = torch.zeros(like.shape[:2], dtype=dtype, device=like.device)

    def drop_part(self, name: str) -> None:
        """Take a part from each block."""
        for segment in self.segments:
            del segment[name]

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
