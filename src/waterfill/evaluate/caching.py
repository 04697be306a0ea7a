"""What a cache costs in quality: the same text read with exact keys and values, and with a cache in the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from waterfill.runtime.cache.naming import as_argument

__all__ = ["CacheFidelity", "cache_fidelity"]


@dataclass(frozen=True)
class CacheFidelity:
    """A cache against an exact one, on the same tokens.

    Attributes
    ----------
    kl_nats, kl_error_nats : mean of the next token's KL divergence, and the standard error over windows
    agreement : share of tokens where the likeliest next token is the same
    perplexity, exact_perplexity : of the text, with the cache and with an exact one
    nbytes : of the cache at the end of a window, the largest there was
    bytes_per_token : that by the tokens of a window, all rows together
    tokens : that were scored
    """

    kl_nats: float
    kl_error_nats: float
    agreement: float
    perplexity: float
    exact_perplexity: float
    nbytes: int
    bytes_per_token: float
    tokens: int


@torch.no_grad()
def cache_fidelity(
    model: Any,
    windows: torch.Tensor,
    make: Callable[[], Any],
    nbytes_of: Callable[[Any], int],
    *,
    prefill: int = 64,
    chunk: int = 16,
    make_exact: Callable[[], Any] | None = None,
) -> CacheFidelity:
    """Read each window twice, side by side: a prompt at once, then a few tokens at a time.

    Tokens after the prompt are scored. Within a chunk attention is exact, as it is in a prompt; what is
    older comes from the cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    windows : int64 (count, tokens)
    make : a new cache, of one row
    nbytes_of : bytes that such a cache holds
    prefill, chunk : tokens of the prompt, and of each step after it
    make_exact : what to compare with; default: transformers' `DynamicCache`
    """
    from transformers import DynamicCache

    kls, hits, losses, exact_losses, held = [], [], [], [], 0
    for window in windows:
        row = window[None].to(model.device)
        cache = make()
        exact = DynamicCache(config=model.config) if make_exact is None else make_exact()
        steps = [prefill, *[chunk] * (-(-(row.shape[1] - prefill) // chunk))]
        at, own = 0, []
        for step in steps:
            some = row[:, at : at + step]
            coded, true = (
                model(input_ids=some, use_cache=True, **as_argument(model, c))
                .logits[0]
                .float()
                .log_softmax(-1)
                for c in (cache, exact)
            )
            if at:
                # The last token of a window is followed by nothing that could be scored.
                target = row[0, at + 1 : at + 1 + some.shape[1], None]
                own.append((true.exp() * (true - coded)).sum(-1))
                hits.append((true.argmax(-1) == coded.argmax(-1)).double())
                losses.append(-coded[: len(target)].gather(1, target)[:, 0].double())
                exact_losses.append(-true[: len(target)].gather(1, target)[:, 0].double())
            at += some.shape[1]
        kls.append(torch.cat(own).double().mean())
        held = max(held, nbytes_of(cache))
    mean = torch.stack(kls)
    return CacheFidelity(
        float(mean.mean()),
        float(mean.std() / len(mean) ** 0.5) if len(mean) > 1 else float("nan"),
        float(torch.cat(hits).mean()),
        float(torch.cat(losses).mean().exp()),
        float(torch.cat(exact_losses).mean().exp()),
        held,
        held / windows.shape[1],
        sum(len(h) for h in hits),
    )
