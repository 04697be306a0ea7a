"""Calibration text, as windows of token numbers."""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.sources.base import Source
from waterfill.sources.text import decode_text, load_tokenizer
from waterfill.types import WaterfillError

__all__ = ["Windows", "default_text", "default_window", "read_windows", "write_itself"]

SHORTEST = 64  # tokens; a window below this says little about a model
LONGEST_DEFAULT = 512
SELF_ROWS = 16  # windows written at once
MOST_BYTES = 32 << 20  # of one text; more than any sensible budget of tokens


@dataclass(frozen=True)
class Windows:
    """Token numbers to run, and how they were made.

    Attributes
    ----------
    ids : int64 (windows, window)
    bos : bool
        Whether the tokenizer's own start (and end) tokens surround each window.
    texts : list of {"name", "sha256"}
    notes : list of str
    """

    ids: NDArray[np.int64]
    bos: bool
    texts: list[dict[str, str]]
    notes: list[str]


def default_text() -> Path:
    """The text that comes with the package."""
    path = importlib.resources.files("waterfill") / "data" / "text" / "calibration.txt"
    if not isinstance(path, Path) or not path.is_file():
        raise WaterfillError("this installation has no calibration text; name one")
    return path


def default_window(longest: int | None) -> int:
    """Tokens per window for a model of at most `longest` positions (None: no limit known)."""
    return min(LONGEST_DEFAULT, longest or LONGEST_DEFAULT)


def write_itself(model: Any, tokens: int, window: int, seed: int) -> Windows:
    """Windows that a model in memory draws from its own distribution; no tokenizer is needed.

    Parameters
    ----------
    model : with real parameters
    tokens, window : as in `read_windows`
    seed : of the draws
    """
    import torch

    if not model.can_generate():
        raise WaterfillError(f"{type(model).__name__} cannot write text itself; name a text")
    config = model.config.get_text_config()
    first = config.bos_token_id
    first = first[0] if isinstance(first, list) else first
    rows = max(1, tokens // window)
    done = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, rows, SELF_ROWS):
            count = min(SELF_ROWS, rows - start)
            begin = torch.randint(config.vocab_size, (count, 1))
            if first is not None:
                begin.fill_(first)
            options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
            length = {"max_new_tokens": window - 1, "min_new_tokens": window - 1}
            mask = torch.ones_like(begin)
            ids = model.generate(
                input_ids=begin, attention_mask=mask, use_cache=True, **options, **length
            )
            done.append(ids.numpy().astype(np.int64))
    ids = np.concatenate(done)
    about = [{"name": "self", "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}]
    return Windows(ids, first is not None, about, [])


def tokenizer_of(source: Source) -> Any:
    """The source's own tokenizer; WaterfillError if it has none."""
    if source.tokenizer is not None:
        return source.tokenizer
    hint = "; add its tokenizer files, or calibrate on text the model writes itself (self)"
    if source.path is None:
        raise WaterfillError(f"{source.name} came without a tokenizer{hint}")
    try:
        return load_tokenizer(source.path, source.trust_remote_code)
    except WaterfillError as error:
        raise WaterfillError(f"{error}{hint}") from error


def read_windows(
    source: Source, texts: Sequence[Path], tokens: int, window: int, vocabulary: int | None
) -> Windows:
    """Windows spread evenly over the texts.

    Parameters
    ----------
    source : whose tokenizer is used
    texts : files, UTF-8
    tokens : how many to take in all, at most
    window : tokens per window, with start and end tokens
    vocabulary : rows of the model's embedding
    """
    tokenizer = tokenizer_of(source)
    notes: list[str] = []
    about: list[dict[str, str]] = []
    streams: list[NDArray[np.int64]] = []
    for path in texts:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise WaterfillError(f"cannot read {path}: {error.strerror or error}") from error
        about.append({"name": path.name, "sha256": hashlib.sha256(data).hexdigest()})
        text = decode_text(data, path, MOST_BYTES)
        if not text.strip():
            raise WaterfillError(f"{path} is empty: calibration needs text")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        streams.append(np.asarray(ids, np.int64))
    before, after = _surroundings(tokenizer)
    total = sum(map(len, streams))
    inside = window - len(before) - len(after)
    if max(map(len, streams)) < inside:
        window = max(map(len, streams)) + len(before) + len(after)
        inside = window - len(before) - len(after)
        if window < SHORTEST:
            raise WaterfillError(
                f"the text has {total} tokens; calibration needs at least {SHORTEST} in one piece "
                "(and 32768 to be any good)"
            )
        notes.append(f"the text has {total} tokens: windows were cut to {window}")
    rows = max(1, tokens // window)
    chunks: list[NDArray[np.int64]] = []
    for i, stream in enumerate(streams):
        share = rows // len(streams) + (i < rows % len(streams))
        chunks += _spread(stream, inside, share)
    if len(chunks) < rows:
        have = len(chunks) * window
        notes.append(f"the text has only {have} of the {rows * window} tokens asked for")
    ids = np.stack([np.concatenate([before, c, after]) for c in chunks])
    if vocabulary is not None and ids.max() >= vocabulary:
        raise WaterfillError(
            f"the tokenizer made token {ids.max()} but the model has only {vocabulary}: "
            "they do not belong together"
        )
    return Windows(ids, bool(len(before)), about, notes)


def _spread(stream: NDArray[np.int64], size: int, count: int) -> list[NDArray[np.int64]]:
    """At most `count` pieces of `size` that do not overlap, from all over a stream."""
    have = min(count, len(stream) // size)
    gap = (len(stream) - have * size) // max(have, 1)
    return [stream[i * (size + gap) :][:size] for i in range(have)]


def _surroundings(tokenizer: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Special tokens that the tokenizer puts before and after a text by default."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            tail = full[start + len(plain) :]
            return np.asarray(full[:start], np.int64), np.asarray(tail, np.int64)
    return np.zeros(0, np.int64), np.zeros(0, np.int64)
