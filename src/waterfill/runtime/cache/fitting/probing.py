"""Measures what a coded past costs: KL of the next tokens read over it against an exact past.

The last tokens of a text are read twice, over what was coded of the tokens before them, and over these as
the model makes them. Costs one exact reading of the text, held until the probe ends, and one reading of
the last few tokens for each past that is tried.

Few tokens tell the mean KL of a text only roughly, so what is held against a limit is their mean and twice
its standard error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from waterfill.runtime.cache.editing.replaying import Past, read_tokens
from waterfill.runtime.cache.facts import LayerFacts, quiet
from waterfill.runtime.cache.naming import as_argument

__all__ = ["READ", "Nats", "Reference", "draw_text", "read_exactly"]

READ = 64  # tokens read over the past
CHUNK_TOKENS = 512  # read at once


class Nats(NamedTuple):
    """KL of the next token.

    Attributes
    ----------
    bound : mean and twice its standard error
    mean : over the tokens that were read
    """

    bound: float
    mean: float


@dataclass(frozen=True, eq=False)
class Reference:
    """A text read exactly.

    Attributes
    ----------
    ids : int64 (batch, tokens)
    positions : int64 (batch or 1, tokens), below zero for padding
    past_tokens : that come before the last few
    log_chances : float32 (batch, last, vocabulary), of the next token after each of the last
    exact : layer -> its keys and values, of all tokens
    others : layers of other kinds, as they were after the past
    """

    model: Any
    ids: torch.Tensor
    positions: torch.Tensor
    past_tokens: int
    log_chances: torch.Tensor
    exact: Mapping[int, Past]
    others: Sequence[Any]

    def nats(self, coded: Mapping[int, Past]) -> Nats:
        """KL of the next token where these layers' pasts are shown, the other layers' being exact."""
        n = self.past_tokens
        # Each reading adds to its own copies.
        pasts = {i: Past.of(coded.get(i, past), n) for i, past in self.exact.items()}
        logits = read_tokens(
            self.model, pasts, copy.deepcopy(list(self.others)), self.ids[:, n:], self.positions,
            self.log_chances.shape[1],
        )  # fmt: skip
        other = _log_chances(logits, self.log_chances.shape[1])
        kl = (self.log_chances.exp() * (self.log_chances - other)).sum(-1).clamp_min(0.0).flatten()
        error = float(kl.std()) * len(kl) ** -0.5 if len(kl) > 1 else 0.0
        return Nats(float(kl.mean()) + 2 * error, float(kl.mean()))


def read_exactly(
    model: Any, facts: Sequence[LayerFacts], ids: torch.Tensor, positions: torch.Tensor
) -> Reference:
    """Read a text, the last `READ` tokens or a quarter of it apart.

    Parameters
    ----------
    facts : of the layers whose keys and values are asked for
    ids : int64 (batch, tokens)
    positions : int64 (batch or 1, tokens), below zero for padding
    """
    tokens = ids.shape[1]
    last = min(READ, max(1, tokens // 4))
    exact = {one.index: Past(one) for one in facts}
    layers = list(DynamicCache(config=model.config).layers)
    for low in range(0, tokens - last, CHUNK_TOKENS):
        high = min(low + CHUNK_TOKENS, tokens - last)
        read_tokens(model, exact, layers, ids[:, low:high], positions[:, :high])
    others = copy.deepcopy([None if i in exact else layer for i, layer in enumerate(layers)])
    logits = read_tokens(model, exact, layers, ids[:, tokens - last :], positions, last)
    return Reference(
        model, ids, positions, tokens - last, _log_chances(logits, last), exact, others
    )


def draw_text(model: Any, tokens: int, seed: int = 0) -> torch.Tensor:
    """int64 (1, tokens) that the model itself writes, each token drawn by its chance."""
    config = model.config.get_text_config(decoder=True)
    first = getattr(config, "bos_token_id", None)
    ids = torch.tensor([[first if isinstance(first, int) else 1]], device=model.device)
    cache = DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(seed)
    drawn = [ids]
    with torch.no_grad(), quiet(model):
        for _ in range(tokens - 1):
            logits = model(input_ids=ids, use_cache=True, **as_argument(model, cache)).logits[:, -1]
            chances = logits.float().softmax(-1).cpu()
            ids = torch.multinomial(chances, 1, generator=generator).to(model.device)
            drawn.append(ids)
    return torch.cat(drawn, 1).cpu()


def _log_chances(logits: torch.Tensor, last: int) -> torch.Tensor:
    return logits[:, -last:].float().log_softmax(-1)
