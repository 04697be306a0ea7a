"""How much to keep of tensors that are coded in layers: the water level over what is already there.

Every tensor offers prefixes, each of so many bytes and nats. Steps along their convex hulls are taken
in order of nats saved for a byte, the same order for every size: a larger file holds all of a smaller
one. The step that no longer fits is cut where the bytes end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Prefixes = Sequence[tuple[int, float]]
ATTEMPTS = 32


def keep(prefixes: Mapping[str, Prefixes], room: int) -> dict[str, int]:
    """Bytes to keep of each tensor within so many for all of them.

    Parameters
    ----------
    prefixes : name -> (bytes, nats) of what can be kept, shortest first
    room : bytes; less than the shortest prefixes take counts as just as much
    """
    kept = {name: found[0][0] for name, found in prefixes.items()}
    left = room - sum(kept.values())
    steps = [
        (before - after, to - start, name)
        for name, found in prefixes.items()
        for (start, before), (to, after) in _hull(found)
    ]
    # Stable: steps of one tensor fall in gain, and stay in order where they do not.
    for _, nbytes, name in sorted(steps, key=lambda step: -step[0] / step[1]):
        taken = max(0, min(nbytes, left))
        kept[name] += taken
        left -= taken
        if taken < nbytes:
            break
    return kept


def _hull(found: Prefixes) -> list[tuple[tuple[int, float], tuple[int, float]]]:
    """Edges of the lower convex hull from the first prefix to the last."""
    corners: list[tuple[int, float]] = []
    for nbytes, nats in found:
        if corners and nbytes <= corners[-1][0]:
            continue
        while len(corners) > 1:
            (a, x), (b, y) = corners[-2:]
            if (y - x) * (nbytes - a) < (nats - x) * (b - a):
                break
            corners.pop()
        corners.append((nbytes, nats))
    return list(itertools.pairwise(corners))


def nats_at(found: Prefixes, nbytes: int) -> float:
    """Predicted nats of a prefix of so many bytes; between two, rows are alike."""
    sizes, nats = zip(*found, strict=True)
    return float(np.interp(nbytes, sizes, nats))


def fit(
    prefixes: Mapping[str, Prefixes], budget: int, file_nbytes: Callable[[Mapping[str, int]], int]
) -> dict[str, int] | None:
    """Bytes to keep of each tensor so that the file reaches a size and does not exceed it.

    Parameters
    ----------
    prefixes : as of `keep`
    budget : bytes of the file
    file_nbytes : exact size of the file for bytes kept; those of header and index depend on them

    Returns
    -------
    name -> bytes; None if even the shortest prefixes are too much
    """
    best, best_slack = None, budget + 1
    low, high = sum(found[0][0] for found in prefixes.values()) - 1, None
    room = sum(found[-1][0] for found in prefixes.values())
    for _ in range(ATTEMPTS):
        kept = keep(prefixes, room)
        slack = budget - file_nbytes(kept)
        if 0 <= slack < best_slack:
            best, best_slack = kept, slack
        low, high = (room, high) if slack >= 0 else (low, room)
        # Header and index grow too, so that what is left is a little too much to add.
        room += slack
        if high is not None and not low < room < high:
            room = (low + high) // 2
        if room == low:
            break
    return best
