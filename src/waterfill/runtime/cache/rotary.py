"""Rotary positions of any model, found by asking the model, not its code.

A prompt of one token attends to nothing but itself, so its hidden states do not depend on its position,
and each layer's key is one vector rotated by that position. A batch of such prompts at several positions
shows which dimensions turn in pairs and how fast, whatever the model calls its parts.
Rotary embeddings: Su et al. 2021, arXiv 2104.09864.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from waterfill.coding.cached_blocks import Turn

__all__ = ["POSITIONS", "Rotary", "find_rotary"]

POSITIONS = (0, *(1 << k for k in range(20)))  # doubling, so that a turn is never miscounted
TOLERANCE = 0.03  # of a key's length; bfloat16 rounds by 0.004
SNAP = 0.02  # radians at the last position within which a table of the model's own is taken instead


@dataclass(frozen=True, eq=False)
class Rotary:
    """Pairs of dimensions that turn with the position.

    Attributes
    ----------
    first, second : int64 (pairs,)
        Dimensions of each pair.
    frequencies : float64 (pairs,)
        Radians per token.
    """

    first: torch.Tensor
    second: torch.Tensor
    frequencies: torch.Tensor

    @functools.cached_property
    def columns(self) -> Turn:
        """The same memory, for kernels."""
        return Turn(self.first.numpy(), self.second.numpy(), self.frequencies.numpy())

    def alike(self, other: Rotary) -> bool:
        """Whether both turn the same dimensions by the same."""
        mine, theirs = ((x.first, x.second, x.frequencies) for x in (self, other))
        return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def turn(
        self, x: torch.Tensor, positions: torch.Tensor, backwards: bool = False
    ) -> torch.Tensor:
        """Rotate vectors to their positions, or back to position 0.

        Parameters
        ----------
        x : float32 (batch, heads, tokens, width)
        positions : int64 (batch or 1, tokens)

        Returns
        -------
        a new tensor, as x
        """
        angles = positions.to("cpu", torch.float64)[..., None] * self.frequencies
        cos = angles.cos().to(x.device, x.dtype)[:, None]
        sin = angles.sin().to(x.device, x.dtype)[:, None]
        if backwards:
            sin = -sin
        out = x.clone()
        a, b = x[..., self.first], x[..., self.second]
        out[..., self.first] = a * cos - b * sin
        out[..., self.second] = a * sin + b * cos
        return out


def find_rotary(keys: torch.Tensor, positions: tuple[int, ...], model: Any) -> Rotary | None:
    """The rotation that takes a key from position 0 to others; None if it is none.

    Parameters
    ----------
    keys : (positions, heads, width), of one token alone at each position
    positions : beginning 0, 1, 2, 4, and so on
    model : its buffers may hold the frequencies to more digits than its keys show
    """
    keys = keys.double().cpu()
    length = keys[0].norm()
    if not torch.isfinite(keys).all() or length == 0:
        return None
    if (keys - keys[:1]).norm(dim=(1, 2)).max() < 1e-6 * length:
        return None  # nothing turns: no rotary positions, or positions are not given this way
    for first, second in _layouts(keys.shape[-1]):
        frequencies = _frequencies(keys, positions, first, second)
        found = _snapped(Rotary(first, second, frequencies), positions[-1], model)
        at = torch.tensor(positions)[:, None]
        turned = found.turn(keys[:1].expand_as(keys)[:, :, None], at)[:, :, 0]
        if (turned - keys).norm(dim=(1, 2)).max() < TOLERANCE * length:
            return found
    return None


def _layouts(width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Halves against each other, or neighbours; of all dimensions, of the first few or of the last."""
    parts = sorted({width * k // 8 // 2 * 2 for k in range(8, 0, -1)} | {64}, reverse=True)
    for part in parts:
        if not 2 <= part <= width:
            continue
        for start in dict.fromkeys((0, width - part)):
            i = torch.arange(part // 2)
            yield start + i, start + i + part // 2
            yield start + 2 * i, start + 2 * i + 1


def _frequencies(
    keys: torch.Tensor, positions: tuple[int, ...], first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """Radians per token of each pair, sharper with each doubling of the position."""
    planes = torch.complex(keys[..., first], keys[..., second])
    phases = (
        (planes * planes[:1].conj()).sum(1).angle()
    )  # heads agree: the longer, the more they say
    omega = torch.zeros(len(first), dtype=torch.float64)
    for position, phase in zip(positions[1:], phases[1:], strict=True):
        turns = torch.round((omega * position - phase) / (2 * math.pi))
        omega = (phase + 2 * math.pi * turns) / position
    return omega


def _snapped(rotary: Rotary, last: int, model: Any) -> Rotary:
    """With the model's own frequencies, where a buffer of it has just these."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.shape == rotary.frequencies.shape:
            own = buffer.detach().double().cpu()
            for sign in (1, -1):
                if ((sign * own - rotary.frequencies).abs() * last).max() < max(
                    SNAP, 8 * TOLERANCE
                ):
                    return Rotary(rotary.first, rotary.second, sign * own)
    return rotary
