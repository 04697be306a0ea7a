"""What a model's cache is made of, learned by running one token through it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from waterfill.coding.cached_blocks import Turn
from waterfill.runtime.cache.naming import as_argument
from waterfill.runtime.cache.rotary import POSITIONS, Rotary, find_rotary
from waterfill.types import WaterfillError

__all__ = ["LayerFacts", "context_of", "facts_of", "quiet", "tensor_state"]


Facts = tuple["LayerFacts | None", ...]
_KNOWN: weakref.WeakKeyDictionary[Any, tuple[Any, Facts]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """One layer's cache.

    Attributes
    ----------
    index : of the layer in the model
    heads : heads of keys and values
    key_width, value_width : numbers in a head's key and value
    dtype : of the model's own states
    window : tokens that the layer attends to, its own included; None: all
    rotary : how keys turn with their position; None: they do not, or not in a way that is known
    """

    index: int
    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    window: int | None
    rotary: Rotary | None

    def unturned(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys as attention gets them, (batch, heads, tokens, width), as before their rotation, float32."""
        keys = keys.float()
        return keys if self.rotary is None else self.rotary.turn(keys, positions, backwards=True)

    def turned(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inverse of `unturned`, in the layer's dtype."""
        keys = keys if self.rotary is None else self.rotary.turn(keys, positions)
        return keys.to(self.dtype)

    @property
    def turn(self) -> Turn | None:
        """How keys turn, for kernels."""
        return None if self.rotary is None else self.rotary.columns

    @property
    def numbers(self) -> int:
        """Numbers of a token's key and value."""
        return self.heads * (self.key_width + self.value_width)

    @property
    def token_nbytes(self) -> int:
        """Bytes of a token's exact key and value."""
        return self.numbers * self.dtype.itemsize

    def first_visible(self, index: int) -> int:
        """Index of the first token that the token at `index` attends to."""
        return 0 if self.window is None else max(0, index - self.window + 1)


def facts_of(model: Any) -> Facts:
    """Facts of each layer, None for those whose state is no keys and values of this kind.

    Kept for each model for as long as its configuration and `tensor_state` stay.

    Raises
    ------
    WaterfillError
        If the model is no decoder with a cache.
    """
    _check_decoder(model)
    state = str(model.config.to_dict()), tensor_state(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != state:
        known = _KNOWN[model] = state, _learned(model)
    return known[1]


def tensor_state(model: Any) -> tuple[tuple[str, str, int, int], ...]:
    """What changes where a tensor of a model is another or was written to: names, devices and dtypes, places, writes.

    Those without memory are not named, and a tensor made under inference mode counts no writes.
    """
    return tuple(
        (name, f"{t.device} {t.dtype}", t.data_ptr(), -1 if t.is_inference() else t._version)
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if t.device.type != "meta"
    )


def _learned(model: Any) -> Facts:
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or 1 << 15
    positions = tuple(p for p in POSITIONS if p < min(longest, 1 << 19))
    token = 1 if getattr(config, "pad_token_id", None) == 0 else 0  # padding may embed as zeros
    ids = torch.full((len(positions), 1), token, dtype=torch.long, device=model.device)
    try:
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), quiet(model):
            model(
                input_ids=ids,
                position_ids=torch.tensor(positions, device=model.device)[:, None],
                use_cache=True,
                **as_argument(model, cache),
            )
    except (
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # whatever such a model says to a cache
        raise WaterfillError(
            f"{type(model).__name__} takes no cache of keys and values: {error}"
        ) from error
    known: list[Rotary] = []
    return tuple(_layer(i, layer, positions, model, known) for i, layer in enumerate(cache.layers))


def _check_decoder(model: Any) -> None:
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise WaterfillError(
            f"a cache is of a transformers model, and this is {type(model).__name__}: "
            "make one with waterfill.load_model, or transformers' own from_pretrained"
        )
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise WaterfillError(f"{name} has an encoder: only caches of decoders alone can be coded")
    causal = [m.is_causal for m in model.modules() if hasattr(m, "is_causal")]
    if causal and not any(causal):
        raise WaterfillError(f"{name} reads in both directions: only decoders have a cache")


def context_of(model: Any) -> int | None:
    """Tokens the model takes at most; None: no limit known."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _layer(
    index: int, layer: Any, positions: tuple[int, ...], model: Any, known: list[Rotary]
) -> LayerFacts | None:
    # Others (linear attention, indexers, layers that share another's cache) stay transformers' own.
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
        return None
    keys, values = layer.keys, layer.values
    if keys.dim() != 4 or values.dim() != 4 or not keys.numel():
        return None
    rotary = find_rotary(keys[:, :, 0], positions, model)
    if rotary is not None:
        # Layers that turn alike share what says so, and all that is derived from it.
        rotary = next((other for other in known if other.alike(rotary)), rotary)
        known.append(rotary)
    return LayerFacts(
        index, keys.shape[1], keys.shape[3], values.shape[3], keys.dtype,
        getattr(layer, "sliding_window", None), rotary,
    )  # fmt: skip


@contextlib.contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Without dropout while it runs."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
