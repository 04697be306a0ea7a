"""Measures what a coded past costs: KL of the next tokens read over it against an exact past.

Some tokens of a text are read twice, over what was coded of the tokens before them, and over these as
the model makes them: the last ones, or as many in all at several depths of the second half. Costs one exact
reading of the text, held until the probe ends, and one reading of those tokens for each past that is tried.

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
from waterfill.runtime.cache.held.store import Store
from waterfill.runtime.cache.naming import as_argument

__all__ = ["READ", "Nats", "Reference", "draw_text", "last_span", "read_exactly", "spread_spans"]

READ = 64  # tokens read over the past
DEPTHS = 4  # pasts of a text that is read at several depths
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
    spans : (start, stop) of tokens read over all before them, in order
    log_chances : a span each, float32 (batch, tokens of it, vocabulary), of the next token
    exact : layer -> its keys and values, of all tokens
    others : a span each, layers of other kinds as they were before it
    """

    model: Any
    ids: torch.Tensor
    positions: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    log_chances: tuple[torch.Tensor, ...]
    exact: Mapping[int, Past]
    others: tuple[Sequence[Any], ...]

    def nats(self, coded: Mapping[int, Store]) -> Nats:
        """KL of the next token where these layers are shown what stores hold, and the others what is exact."""
        shown = {**self.exact, **coded}
        found = []
        for (start, stop), exact, others in zip(
            self.spans, self.log_chances, self.others, strict=True
        ):
            # Each reading adds to its own copies.
            logits = read_tokens(
                self.model, {i: Past.of(store, start) for i, store in shown.items()},
                copy.deepcopy(list(others)), self.ids[:, start:stop], self.positions[:, :stop],
                stop - start,
            )  # fmt: skip
            other = _log_chances(logits, stop - start)
            found.append((exact.exp() * (exact - other)).sum(-1).clamp_min(0.0).flatten())
        kl = torch.cat(found)
        error = float(kl.std()) * len(kl) ** -0.5 if len(kl) > 1 else 0.0
        return Nats(float(kl.mean()) + 2 * error, float(kl.mean()))


def last_span(tokens: int) -> tuple[tuple[int, int]]:
    """The last `READ` tokens of a text, or a quarter of it."""
    return ((tokens - min(READ, max(1, tokens // 4)), tokens),)


def spread_spans(tokens: int) -> tuple[tuple[int, int], ...]:
    """Spans in the second half of a text, `READ` tokens in all or somewhat fewer."""
    apart = tokens // (2 * DEPTHS)
    n = min(READ // DEPTHS, max(1, apart))
    return tuple((tokens - i * apart - n, tokens - i * apart) for i in reversed(range(DEPTHS)))


def read_exactly(
    model: Any,
    facts: Sequence[LayerFacts],
    ids: torch.Tensor,
    positions: torch.Tensor,
    spans: tuple[tuple[int, int], ...],
) -> Reference:
    """Read a text as the model does, and remember what it says of some spans.

    Parameters
    ----------
    facts : of the layers whose keys and values are asked for
    ids : int64 (batch, tokens)
    positions : int64 (batch or 1, tokens), below zero for padding
    spans : (start, stop), in order, the last up to the last token
    """
    exact = {one.index: Past(one) for one in facts}
    layers = list(DynamicCache(config=model.config).layers)
    chances, others, done = [], [], 0
    for start, stop in spans:
        for low in range(done, start, CHUNK_TOKENS):
            high = min(low + CHUNK_TOKENS, start)
            read_tokens(model, exact, layers, ids[:, low:high], positions[:, :high])
        others.append(copy.deepcopy([None if i in exact else x for i, x in enumerate(layers)]))
        n = stop - start
        logits = read_tokens(model, exact, layers, ids[:, start:stop], positions[:, :stop], n)
        chances.append(_log_chances(logits, n))
        done = stop
    return Reference(model, ids, positions, spans, tuple(chances), exact, tuple(others))


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
