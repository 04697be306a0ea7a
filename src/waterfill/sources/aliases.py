"""Tensors that lie in each other's memory: whether all of them can be what they should be at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from waterfill.types import Array

__all__ = ["Span", "conflict"]


@dataclass(frozen=True)
class Span:
    """Where a tensor lies.

    Attributes
    ----------
    device : whose memory
    at : address of its first element
    strides : bytes from one element to the next, for each axis
    shape, itemsize : as of numpy
    """

    device: str
    at: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    itemsize: int

    @property
    def ends(self) -> tuple[int, int]:
        """The first byte, and the one behind the last."""
        reach = [step * (size - 1) for step, size in zip(self.strides, self.shape, strict=True)]
        below, above = (sum(sign * max(sign * r, 0) for r in reach) for sign in (-1, 1))
        return self.at + below, self.at + above + self.itemsize

    @property
    def in_one_piece(self) -> bool:
        """Whether its elements follow each other, rows first."""
        step = self.itemsize
        for stride, size in zip(reversed(self.strides), reversed(self.shape), strict=True):
            if size > 1 and stride != step:
                return False
            step *= size
        return True


def conflict(
    spans: Iterable[tuple[str, Span]],
    changed: Callable[[str], bool],
    wanted: Callable[[str], Array],
) -> tuple[str, str] | None:
    """Two names (or one twice) whose elements share a byte that cannot be as both want it; or None.

    Parameters
    ----------
    spans : name and place of each tensor that keeps its place
    changed : whether a tensor is to be another; where none is, nothing is looked at
    wanted : the bits a tensor is to have
    """
    for group in _groups(spans):
        if not any(changed(name) for name in group):
            continue
        low = min(span.ends[0] for span in group.values())
        room = np.empty(max(span.ends[1] for span in group.values()) - low, np.uint8)
        for name, span in group.items():
            _view(room, span, low)[...] = _octets(wanted(name), span)
        for name, span in group.items():
            if not np.array_equal(_view(room, span, low), _octets(wanted(name), span)):
                others = [o for o in group if o != name and _meet(group[o], span)]
                return name, (others or [name])[0]
    return None


def _groups(spans: Iterable[tuple[str, Span]]) -> Iterator[dict[str, Span]]:
    """Tensors whose reaches meet; one that lies in one piece by itself is no group."""
    group: dict[str, Span] = {}
    end, device = 0, ""
    some = [(name, span) for name, span in spans if 0 not in span.shape]
    for name, span in sorted(some, key=lambda item: (item[1].device, item[1].ends)):
        if span.device != device or span.ends[0] >= end:
            if _matters(group):
                yield group
            group, end, device = {}, 0, span.device
        group[name] = span
        end = max(end, span.ends[1])
    if _matters(group):
        yield group


def _matters(group: dict[str, Span]) -> bool:
    return len(group) > 1 or any(not span.in_one_piece for span in group.values())


def _meet(a: Span, b: Span) -> bool:
    return a.ends[0] < b.ends[1] and b.ends[0] < a.ends[1]


def _view(room: Array, span: Span, low: int) -> Array:
    shape, strides = (*span.shape, span.itemsize), (*span.strides, 1)
    return np.ndarray(shape, np.uint8, room.data, span.at - low, strides)


def _octets(bits: Array, span: Span) -> Array:
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8).reshape(*span.shape, span.itemsize)
