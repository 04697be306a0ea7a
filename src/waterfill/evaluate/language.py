"""Perplexity, KL and agreement of a compressed language model against its original.

Both models read the same windows; at each scored token the two distributions over the vocabulary
are compared in float64. Logits of at most one window of each model are held at a time.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.evaluate.activations import Activations
from waterfill.evaluate.windows import Windows
from waterfill.types import WaterfillError

__all__ = ["compare", "evaluating", "is_masked", "max_positions", "perplexity"]

Floats = NDArray[np.float64]
Progress = Callable[[Iterable[int], str], Iterable[int]]

# Float64 values worked on at once (8 MiB, in several copies), whatever the vocabulary.
CHUNK_VALUES = 1 << 20


def compare(
    original: Any,
    compressed: Any,
    windows: Windows | NDArray[np.int64],
    *,
    activations: Activations | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measured harm of a compressed model.

    Parameters
    ----------
    original, compressed : transformers models with logits, over the same vocabulary
    windows : Windows, or int64 (count, window) of which all but the first column is scored
    activations : int8, e4m3, e5m2 (``int8:tensor``, ...) or `Activations`, optional
        What the inputs of the compressed model's linear layers are rounded to while it is measured.
    progress : callable (iterable, label) -> iterable, optional

    Returns
    -------
    dict
        `kl_nats`: mean KL(original || compressed) per scored token, nats; `kl_nats_stderr`: its
        standard error, windows taken as the independent draws; `kl_nats_p99`: 99th percentile over
        tokens; `top1_agreement`: fraction of tokens where both models would say the same; `tokens`
        scored; `protocol`. For causal models also `perplexity` (compressed) and
        `perplexity_original`.
    """
    masked = is_masked(original)
    rows = as_windows(windows, masked)
    check_vocabularies(original, compressed)
    rounding = Activations.parse(activations) if isinstance(activations, str) else activations
    losses: list[Floats] = []
    divergences: list[Floats] = []
    agreements: list[Floats] = []
    with evaluating(original, compressed):
        for i in _watched(len(rows), "comparing", progress):
            p = scored_logits(original, rows, i, masked)
            # Around this call alone: the two models may be one.
            with rounding.simulated(compressed) if rounding else contextlib.nullcontext():
                q = scored_logits(compressed, rows, i, masked)
            if p.shape != q.shape:
                raise WaterfillError(
                    f"logits differ in shape: {tuple(p.shape)} and {tuple(q.shape)}"
                )
            targets = rows.tokens[i][rows.scored[i]]
            loss, kl, same = _compare_logits(p, q, targets)
            if np.isnan(kl).any():
                raise WaterfillError(f"not-a-number logits in window {i}; are both models intact?")
            losses.append(loss)
            divergences.append(kl)
            agreements.append(same)
    kl = np.concatenate(divergences)
    result: dict[str, Any] = {
        "kl_nats": float(kl.mean()),
        "kl_nats_stderr": _stderr(divergences),
        "kl_nats_p99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(np.concatenate(agreements).mean()),
        "tokens": len(kl),
        "protocol": protocol(rows, original, compressed),
    }
    if rounding:
        result["protocol"]["activations"] = rounding.protocol(compressed)
    if masked:
        return result
    before, after = np.concatenate(losses, axis=1).mean(axis=1)
    return {"perplexity": _exp(after), "perplexity_original": _exp(before), **result}


def perplexity(
    model: Any, windows: Windows | NDArray[np.int64], *, progress: Progress | None = None
) -> float:
    """Exp of the mean negative log-likelihood of the scored tokens (causal models)."""
    if is_masked(model):
        raise WaterfillError(
            "a masked model has no perplexity; compare() gives its KL and agreement"
        )
    rows = as_windows(windows, masked=False)
    losses = []
    with evaluating(model):
        for i in _watched(len(rows), "perplexity", progress):
            logits = scored_logits(model, rows, i, masked=False)
            losses.append(_losses(logits, rows.tokens[i][rows.scored[i]]))
    return _exp(float(np.concatenate(losses).mean()))


def max_positions(model: Any) -> int | None:
    """Longest window the model can see, tokens; None where its configuration does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def is_masked(model: Any) -> bool:
    """True for a masked model (BERT and kin), False for a causal one; an error for others."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise WaterfillError(f"{name}: encoder-decoder models cannot be evaluated yet")
    if model.get_output_embeddings() is None and "MaskedLM" not in name:
        raise WaterfillError(f"{name} has no language-model head; evaluation needs logits")
    return "MaskedLM" in name


def as_windows(windows: Windows | NDArray[np.int64], masked: bool) -> Windows:
    """Windows as they are; of a plain array, all positions that can be scored."""
    if not isinstance(windows, Windows):
        tokens = np.atleast_2d(np.asarray(windows, np.int64))
        scored = np.ones(tokens.shape, np.bool_)
        scored[:, : 0 if masked else 1] = False
        shape = {"windows": tokens.shape[0], "window": tokens.shape[1]}
        windows = Windows(tokens, scored, {"kind": "windows as given", **shape})
    if not windows.scored.any():
        raise WaterfillError("the windows hold no token that can be scored")
    if not masked and windows.scored[:, 0].any():
        raise WaterfillError("a causal model cannot be scored on the first token of a window")
    return windows


def check_vocabularies(original: Any, compressed: Any) -> None:
    """WaterfillError unless both models speak of equally many tokens."""
    sizes = [int(m.config.get_text_config().vocab_size) for m in (original, compressed)]
    if sizes[0] != sizes[1]:
        raise WaterfillError(
            f"the vocabularies differ: {sizes[0]} tokens in the original, {sizes[1]} compressed"
        )


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the models' own mode comes back afterwards."""
    import torch

    modes = [m.training for m in models]
    try:
        with torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def scored_logits(model: Any, rows: Windows, i: int, masked: bool) -> Any:
    """Logits (scored tokens, vocabulary) that speak about the scored tokens of window i."""
    import torch

    tokens = torch.from_numpy(np.ascontiguousarray(rows.tokens[i : i + 1])).to(model.device)
    positions = np.flatnonzero(rows.scored[i]) - (0 if masked else 1)
    start = 0
    options: dict[str, Any] = {}
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        options["use_cache"] = False
    if "logits_to_keep" in parameters and len(positions):
        # The unscored context needs no logits: with large vocabularies they are most of the work.
        start = int(positions[0])
        options["logits_to_keep"] = tokens.shape[1] - start
    logits = model(input_ids=tokens, **options).logits[0].detach()
    return logits[torch.from_numpy(positions - start).to(logits.device)]


def mean_divergence(p: Any, q: Any) -> tuple[float, Floats]:
    """Mean, and each token's, KL(p || q) in nats, of two logit matrices (tokens, vocabulary)."""
    _, kl, _ = _compare_logits(p, q, np.zeros(len(p), np.int64))
    return float(kl.mean()), kl


def protocol(rows: Windows, *models: Any) -> dict[str, Any]:
    """All that is needed to get the same numbers again."""
    import torch
    import transformers

    return {
        **rows.protocol,
        "windows": len(rows),
        "tokens_scored": int(rows.scored.sum()),
        "dtype": str(models[0].dtype).removeprefix("torch."),
        "dtype_compressed": str(models[-1].dtype).removeprefix("torch."),
        "device": str(models[0].device.type),
        "divergence": "KL(original || compressed), float64 log-softmax over the whole vocabulary",
        "stderr": "over windows",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _compare_logits(p: Any, q: Any, targets: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """Losses (2, tokens) of both models, KL (tokens,) and agreement (tokens,) of their best."""
    import torch

    count = len(p)
    loss, kl, same = np.empty((2, count)), np.empty(count), np.empty(count)
    step = max(1, CHUNK_VALUES // max(1, p.shape[-1]))
    for a in range(0, count, step):
        b = min(a + step, count)
        index = torch.from_numpy(targets[a:b]).to(p.device)[:, None]
        log_p = torch.log_softmax(p[a:b].double(), -1)
        log_q = torch.log_softmax(q[a:b].to(p.device).double(), -1)
        loss[0, a:b] = -log_p.gather(1, index)[:, 0].cpu().numpy()
        loss[1, a:b] = -log_q.gather(1, index)[:, 0].cpu().numpy()
        same[a:b] = (log_p.argmax(-1) == log_q.argmax(-1)).cpu().numpy()
        weight = log_p.exp()
        # A token that the original rules out (-inf) weighs nothing, whatever the other says.
        term = torch.where(
            weight > 0, weight * (log_p - log_q), torch.where(log_p.isnan(), log_p, 0.0)
        )
        kl[a:b] = term.sum(-1).cpu().numpy()
    # Rounding can leave -1e-17 where the distributions are equal.
    return loss, np.maximum(kl, 0.0), same


def _losses(logits: Any, targets: NDArray[np.int64]) -> Floats:
    """Negative log-likelihood of each target, nats."""
    import torch

    step = max(1, CHUNK_VALUES // max(1, logits.shape[-1]))
    parts = [np.empty(0)]
    for a in range(0, len(logits), step):
        index = torch.from_numpy(targets[a : a + step]).to(logits.device)[:, None]
        log_p = torch.log_softmax(logits[a : a + step].double(), -1)
        parts.append(-log_p.gather(1, index)[:, 0].cpu().numpy())
    return np.concatenate(parts)


def _stderr(groups: list[Floats]) -> float:
    """Standard error of the mean over all tokens; tokens of one group lean on each other.

    With one group only, tokens are taken as independent (too small, and all there is).
    """
    values = np.concatenate(groups)
    total, mean = len(values), float(values.mean())
    sums = (
        values - mean if len(groups) == 1 else np.array([g.sum() - len(g) * mean for g in groups])
    )
    if len(sums) < 2:
        return 0.0
    return float(np.sqrt(np.sum(sums**2) * len(sums) / (len(sums) - 1)) / total)


def _exp(nats: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(nats)))


def _watched(count: int, label: str, progress: Progress | None) -> Iterable[int]:
    return range(count) if progress is None else progress(range(count), label)
