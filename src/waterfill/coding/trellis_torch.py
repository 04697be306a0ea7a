"""Trellis quantisation through torch, on any device it has; the twin of the native core.

All sums over columns are matrix products. The Viterbi algorithm is a loop over the rows of a
segment, vectorised over states and segments; on a GPU one Triton kernel where triton is installed.
Prices, ties and the order of sums are those of cpp/trellis_kernel.cpp, so the paths are too, but
for a rounding error of a matrix product now and then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from waterfill.coding.rounding import Indices
from waterfill.coding.trellis import CODES, SEGMENT
from waterfill.types import Floats, WaterfillError

if TYPE_CHECKING:
    import torch

BLOCK = 128  # columns between two large matrix products
TOGETHER = 1 << 20  # weights of independent columns to a call: one byte a state and weight
LIMIT = 4.0e6  # beyond 2^23 steps float32 no longer knows parity


def find_device(name: str) -> torch.device:
    """The device of this name; WaterfillError if torch or the device is not here."""
    try:
        import torch

        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (ImportError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WaterfillError(
            f"device {name!r} is not to be had: {reason}; name another in WATERFILL_DEVICE, or none for the CPU"
        ) from error
    return device


def quantise(weight: Floats, lower: Floats, step: Floats, states: int, device: str) -> Indices:
    """Indices of the cheapest path; see `trellis.quantise`.

    Parameters
    ----------
    weight : float32 (m, n)
    lower : float32 (n, n) or (n,) from `rounding.factor`
    step : float32 (n,)
    states : 1 or a key of `CODES`
    device : what torch calls it: ``cuda``, ``cuda:1``, ``cpu``

    Returns
    -------
    int32 (m, n)
    """
    where = find_device(device)
    import torch

    columns = torch.from_numpy(np.ascontiguousarray(weight.T)).to(where)
    steps = torch.from_numpy(np.ascontiguousarray(step)).to(where)[:, None]
    n, m = columns.shape
    index = torch.empty((n, m), dtype=torch.int32, device=where)
    if lower.ndim == 1:
        many = max(1, TOGETHER // max(m, 1))
        for first in range(0, n, many):
            some = slice(first, first + many)
            index[some] = _round(columns[some], steps[some], states)[0]
    else:
        _successive(columns, torch.from_numpy(lower).to(where), steps, states, index)
    return np.ascontiguousarray(index.cpu().numpy().T)


def _successive(
    columns: torch.Tensor,
    lower: torch.Tensor,
    steps: torch.Tensor,
    states: int,
    index: torch.Tensor,
) -> None:
    """Columns last to first, errors carried on, as `rounding.successive` does with numpy."""
    error = columns.new_zeros(columns.shape)
    inverse = 1.0 / lower.diagonal()
    for first in reversed(range(0, len(columns), BLOCK)):
        last = min(first + BLOCK, len(columns))
        carry = lower[first:, first:last] * inverse[first:last]
        target = columns[first:last] + carry[last - first :].T @ error[last:]
        for j in reversed(range(last - first)):
            row = slice(first + j, first + j + 1)
            index[row], value = _round(target[j : j + 1], steps[row], states)
            error[row] = columns[row] - value
            target[:j].addr_(carry[j, :j], error[first + j])


def _round(
    target: torch.Tensor, step: torch.Tensor, states: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values of independent columns: (columns, rows) each; step is (columns, 1)."""
    x = (target * (1.0 / step)).clamp(-LIMIT, LIMIT)
    if states == 1:
        level = x.round()
        return level.int(), level * step
    # [grid << 1 | parity]: grid 0 has 4i and 4i + 2, grid 1 has +-(4i + 3) and +-(4i + 1).
    away = x.abs()
    base = x.new_empty((4, *x.shape))
    base[:2], base[2:] = x, away
    offset = x.new_tensor([0.0, 2.0, 3.0, 1.0])[:, None, None]
    floor = x.new_tensor([-np.inf, -np.inf, 0.0, 0.0])[:, None, None]
    levels = ((base - offset) * 0.25).round().mul(4).maximum(floor) + offset
    price = (base - levels).square()
    if price.is_cuda and _has_triton():
        from waterfill.coding.trellis_triton import viterbi as viterbi_on_gpu

        path = viterbi_on_gpu(price, states).long()
    else:
        path = viterbi(price, states).long()
    sign = (x >= 0).to(x.dtype) * 2 - 1
    level = levels.gather(0, path[None])[0]
    on_grid1 = path > 1
    level = level.where(~on_grid1, sign * level)
    # 2k - sign k stands for k
    index = (level + sign * on_grid1) * 0.5
    return index.int(), level * step


def _has_triton() -> bool:
    try:
        import triton.language as tl
    except ImportError:
        return False
    return hasattr(tl, "gather")  # since 3.2


def viterbi(price: torch.Tensor, states: int) -> torch.Tensor:
    """Cheapest path down every segment of every column.

    Parameters
    ----------
    price : float32 (4, columns, rows), of [grid << 1 | parity]
    states : a key of `CODES`

    Returns
    -------
    uint8 (columns, rows): grid << 1 | parity
    """
    import torch

    _, columns, rows = price.shape
    full, tail = divmod(rows, SEGMENT)
    parts = [(price[..., : full * SEGMENT], full, SEGMENT), (price[..., full * SEGMENT :], 1, tail)]
    out = [_run(p, columns * many, length, states) for p, many, length in parts if many * length]
    return torch.cat([o.view(columns, -1) for o in out], 1) if out else price[0].byte()


def _run(price: torch.Tensor, many: int, length: int, states: int) -> torch.Tensor:
    """Paths of `many` segments of the same length, each from state 0."""
    import torch

    before = torch.from_numpy(_before(states)).to(price.device)
    # (rows, segments, parity, grid, 1), so that a row broadcasts over the states of a grid
    by_row = price.reshape(2, 2, many, length).permute(3, 2, 1, 0)[..., None].contiguous()
    decisions = torch.empty((length, many, states), dtype=torch.bool, device=price.device)
    cost = price.new_full((many, states), 1e30)
    cost[:, 0] = 0
    for r in range(length):
        reached = cost[:, before].view(many, 2, 2, states // 2) + by_row[r]
        even, odd = reached.view(many, 2, states).unbind(1)
        torch.lt(odd, even, out=decisions[r])
        cost = torch.minimum(even, odd)
        if r % 64 == 63:  # float32 goes on telling neighbours apart
            cost -= cost.amin(1, keepdim=True)
    state = cost.argmin(1)
    path = torch.empty((length, many), dtype=torch.uint8, device=price.device)
    segment = torch.arange(many, device=price.device)
    for r in reversed(range(length)):
        parity = decisions[r, segment, state].long()
        path[r] = state // (states // 2) * 2 + parity
        state = before[parity * states + state]
    return path.T.contiguous()


def _before(states: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The state before each, reached by an even index, then by an odd one: (2 states,)."""
    feedback, source = CODES[states]
    state = np.arange(states)
    grid = state // (states // 2)
    even = (state ^ (feedback * grid)) << 1 | grid
    both: np.ndarray[tuple[int], np.dtype[np.int64]] = np.concatenate([even, even ^ (source << 1)])
    return both & (states - 1)
