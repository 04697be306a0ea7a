"""What attention is given instead of keys and values: a promise of tensors, kept only if asked.

Attention of this package reads blocks as they are coded. Anything else may do with a `States` what it does
with a tensor: at the first operation it becomes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map

from waterfill.runtime.cache.held.pieces import Piece
from waterfill.runtime.cache.held.store import Store
from waterfill.types import WaterfillError

__all__ = ["States", "View", "dense"]


class View:
    """A layer's past, in pieces, and what a forward pass adds to it.

    Parameters
    ----------
    store : what the layer remembers; gets the new tokens once attention has seen them
    keys, values : (batch, heads, tokens, width) new ones, as the model made them
    first : index of the first token that attention is shown
    """

    def __init__(
        self, store: Store, keys: torch.Tensor, values: torch.Tensor, first: int = 0
    ) -> None:
        self.store, self.keys, self.values = store, keys.detach(), values.detach()
        self.first, self.tokens = first, store.tokens - first + keys.shape[2]
        self.runs: tuple[Piece, ...] = store.runs(first)
        self.committed = False
        self._dense: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def past(self) -> Iterator[Piece]:
        """The past in parts that are read at once."""
        return (part for run in self.runs for part in self.store.split(run))

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values as tensors.

        Raises
        ------
        WaterfillError
            If each head has tokens of its own, which one tensor of all cannot say.
        """
        if any(run.index is not None for run in self.runs):
            raise WaterfillError(
                "this cache keeps other tokens for each head, which only attention of waterfill can read: "
                'load the model with attn_implementation="sdpa" and without attention weights, dropout '
                "or capped scores, or choose a method that keeps every token"
            )
        if self._dense is None:
            parts = [*(piece.read() for piece in self.past), (self.keys, self.values)]
            if len(parts) == 1:
                # As transformers' own cache would give them: some models make views of these.
                self._dense = self.keys.contiguous(), self.values.contiguous()
            else:
                keys, values = zip(*parts, strict=True)
                self._dense = torch.cat(keys, 2), torch.cat(values, 2)
        return self._dense

    def commit(
        self, queries: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> None:
        """Let the store remember the new tokens; once, whoever calls first."""
        if not self.committed:
            self.committed = True
            self.store.append(self.keys, self.values, positions, queries)

    def states(self) -> tuple[States, States]:
        """Keys and values that attention may be given."""
        return States(self, 0), States(self, 1)


class States(torch.Tensor):
    """Keys (which 0) or values (which 1) of a `View`."""

    source: View
    which: int

    @staticmethod
    def __new__(cls, view: View, which: int) -> States:
        like = (view.keys, view.values)[which]
        shape = (*like.shape[:2], view.tokens, like.shape[3])
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.source, made.which = view, which
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"States({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


def dense(value: Any) -> Any:
    """The tensor that a `States` stands for; anything else as it is."""
    return value.source.dense()[value.which] if isinstance(value, States) else value
