"""Text -> windows of tokens: what is read, with how much context, and which tokens count.

A token is scored exactly once, by the window that shows it the longest context. The windows carry
their own protocol (texts with SHA-256, window, stride, BOS), so that a figure can be had again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from waterfill.sources.text import decode_text
from waterfill.types import WaterfillError

__all__ = ["Windows", "plain_windows", "strided_windows", "text_windows"]

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]
DOCUMENT_BREAK = "\0"
LONGEST = 1024
LONGEST_MASKED = 512


@dataclass(frozen=True)
class Windows:
    """Rows of tokens for a model, and which of them count.

    Attributes
    ----------
    tokens : int64 (count, window)
    scored : bool (count, window)
        True where the token counts; True once for every token of the text that can be scored.
    protocol : mapping
        How the rows were made, JSON-able.
    """

    tokens: Ids
    scored: Mask
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.tokens)

    def __getitem__(self, rows: slice | Sequence[int]) -> Windows:
        """Some of the windows; the protocol says that they are fewer."""
        tokens, scored = self.tokens[rows], self.scored[rows]
        fewer = {"windows": len(tokens), "tokens_scored": int(scored.sum())}
        return Windows(tokens, scored, {**self.protocol, **fewer})


def strided_windows(
    token_ids: ArrayLike,
    window: int,
    stride: int | None = None,
    bos_id: int | None = None,
    *,
    counts: Mask | None = None,
) -> Windows:
    """Overlapping windows for a causal model.

    All tokens of the first window are scored, and the last `stride` of each later one. The last
    window is moved back to end with the text, so every window is full. The very first token is
    scored only where a BOS precedes it.

    Parameters
    ----------
    token_ids : int (tokens,)
    window : int
        Tokens a model sees at once, BOS included.
    stride : int, optional
        Tokens from one window to the next; half the window by default.
    bos_id : int, optional
        Put before every window; None for no BOS.
    counts : bool (tokens,), optional
        False for tokens that serve as context only, such as marks between documents.
    """
    ids = np.asarray(token_ids, np.int64).ravel()
    keep = np.ones(len(ids), np.bool_) if counts is None else counts
    bos = 0 if bos_id is None else 1
    stride = max(1, window // 2) if stride is None else stride
    if len(ids) < 2:
        raise WaterfillError(
            f"the text has {len(ids)} tokens; two are the least that can be scored"
        )
    if window < 2 or not 1 <= stride < window:
        raise WaterfillError(
            f"stride {stride} must be at least 1 and below the window, {window} tokens"
        )
    span = min(window - bos, len(ids))
    ends = [*range(span, len(ids), stride), len(ids)]
    tokens = np.full((len(ends), span + bos), -1 if bos_id is None else bos_id, np.int64)
    scored = np.zeros(tokens.shape, np.bool_)
    done = 1 - bos
    for row, end in enumerate(ends):
        tokens[row, bos:] = ids[end - span : end]
        fresh = end - done
        scored[row, tokens.shape[1] - fresh :] = keep[done:end]
        done = end
    protocol = {
        "kind": "strided windows, every token scored once with the longest context",
        "tokens": len(ids),
        "tokens_scored": int(scored.sum()),
        "windows": len(ends),
        "window": span + bos,
        "stride": stride,
        "bos": bos_id,
    }
    return Windows(tokens, scored, protocol)


def plain_windows(
    token_ids: ArrayLike,
    window: int,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
) -> Windows:
    """Windows side by side for a masked model: every position of the text counts, once.

    `prefix` and `suffix` are the special tokens ([CLS], [SEP]) around each window; they are part
    of its length and are not scored.
    """
    ids = np.asarray(token_ids, np.int64).ravel()
    span = min(window - len(prefix) - len(suffix), len(ids))
    if len(ids) < 2 or span < 1:
        raise WaterfillError(f"{len(ids)} tokens do not fill a window of {window}")
    ends = [*range(span, len(ids), span), len(ids)]
    rows = [[*prefix, *ids[end - span : end].tolist(), *suffix] for end in ends]
    tokens = np.array(rows, np.int64)
    scored = np.zeros(tokens.shape, np.bool_)
    last = len(prefix) + span
    done = 0
    for row, end in enumerate(ends):
        scored[row, last - (end - done) : last] = True
        done = end
    protocol = {
        "kind": "plain windows without masked tokens, every position scored once; no perplexity",
        "tokens": len(ids),
        "tokens_scored": int(scored.sum()),
        "windows": len(ends),
        "window": tokens.shape[1],
        "stride": span,
        "prefix": list(prefix),
        "suffix": list(suffix),
    }
    return Windows(tokens, scored, protocol)


def text_windows(
    paths: Iterable[str | Path],
    tokenizer: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_positions: int | None = None,
    max_tokens: int | None = None,
    masked: bool = False,
) -> Windows:
    """Text files -> windows. NUL in a file, and the end of a file, is a document break.

    A break becomes the token that the tokenizer's models know it by: BOS where the tokenizer puts
    one before a text, else EOS. It is context, never scored.

    Parameters
    ----------
    paths : text files, UTF-8
    tokenizer : transformers tokenizer
    window : int, optional
        Tokens at once; by default 1024 (512 for masked models), or the model's limit if less.
    stride : int, optional
        By default half the window.
    max_positions : int, optional
        The model's limit (`max_position_embeddings`).
    max_tokens : int, optional
        Read no more than this from the front of the text.
    masked : bool
        For masked models: plain windows instead of strided ones.
    """
    if tokenizer is None:
        raise WaterfillError(
            "evaluation needs the model's tokenizer (tokenizer.json); there is none"
        )
    prefix, suffix = _frame(tokenizer)
    bos = tokenizer.bos_token_id if prefix and prefix[0] == tokenizer.bos_token_id else None
    mark = bos if bos is not None else tokenizer.eos_token_id
    texts: list[dict[str, Any]] = []
    documents: list[list[int]] = []
    for path in map(Path, paths):
        data = path.read_bytes()
        texts.append(
            {"name": path.name, "nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        )
        pieces = decode_text(data, path).split(DOCUMENT_BREAK)
        documents += [
            tokenizer.encode(p, add_special_tokens=False, verbose=False)
            for p in pieces
            if p.strip()
        ]
    if not documents:
        raise WaterfillError(
            f"no text to evaluate on in {', '.join(str(t['name']) for t in texts) or 'no files'}"
        )
    ids, counts = _join(documents, None if masked else mark)
    limit = len(ids) if max_tokens is None else max_tokens
    longest = LONGEST_MASKED if masked else LONGEST
    size = window or min(longest, max_positions or longest)
    if max_positions is not None and size > max_positions:
        raise WaterfillError(
            f"a window of {size} tokens exceeds the {max_positions} positions of the model"
        )
    if masked:
        made = plain_windows(ids[:limit], size, prefix, suffix)
    else:
        made = strided_windows(ids[:limit], size, stride, bos, counts=counts[:limit])
    extra = {
        "texts": texts,
        "documents": len(documents),
        "document_break": None if masked else mark,
    }
    return Windows(made.tokens, made.scored, {**made.protocol, **extra})


def _join(documents: Sequence[Sequence[int]], mark: int | None) -> tuple[Ids, Mask]:
    """Documents with the mark between them, and False where a token is such a mark."""
    between = [] if mark is None else [mark]
    ids: list[int] = []
    counts: list[bool] = []
    for document in documents:
        if ids:
            ids += between
            counts += [False] * len(between)
        ids += document
        counts += [True] * len(document)
    return np.array(ids, np.int64), np.array(counts, np.bool_)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text by default."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []
