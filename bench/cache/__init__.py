"""Claims about the KV cache, a file each.

Each module defines ``rows(quick: bool) -> Iterator[Row]``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from bench.harness import shared_data
from waterfill.runtime.cache.fitting.calibrating import calibrate_cache
from waterfill.runtime.cache.fitting.statistics import (
    CacheStatistics,
    load_statistics,
    save_statistics,
)

KEPT = Path("out/bench/cache")
# A model's calibration and evaluation texts, apart from each other: file, characters to skip.
TEXTS = {
    "english-7m": (("c4.txt", 0), ("wiki.txt", 0), ("technical.txt", 0)),
    "stories260K": (("tinystories.txt", 0),),
    "demo": (("calibration.txt", 0),),
}
HELD_OUT = {
    "english-7m": ("english_heldout.txt", 0),
    "stories260K": ("tinystories.txt", 100_000),
    "demo": ("evaluation.txt", 0),
}
CALIBRATION_TOKENS = 12_288


def folder_of(name: str) -> Path:
    """Where a model is; the demo is the package's own."""
    if name == "demo":
        return Path("src/waterfill/data/demo")
    return shared_data() / "models" / name


def text_of(name: str, file: str, skip: int) -> str:
    """Text for a model."""
    folder = Path("src/waterfill/data/text") if name == "demo" else shared_data() / "text"
    return (folder / file).read_text().replace("\0", "\n")[skip:]


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model, for CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=dtype).eval()


def context_of(name: str) -> int:
    """Tokens of a window: what the model was trained for."""
    return int(model_of(name).config.max_position_embeddings)


def windows_of(name: str, file: str, skip: int, count: int, length: int) -> torch.Tensor:
    """int64 (count, length): windows of a text, one after another."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    ids = tokenizer(text_of(name, file, skip)[: count * length * 8], verbose=False)["input_ids"]
    return torch.tensor(ids[: count * length]).view(-1, length)[:count]


def held_out(name: str, count: int, length: int | None = None) -> torch.Tensor:
    """Windows that calibration has not seen."""
    return windows_of(name, *HELD_OUT[name], count, length or context_of(name))


@functools.cache
def statistics_of(name: str) -> CacheStatistics:
    """Statistics of a model's cache, kept under out/bench/cache."""
    return learned(name, name, model_of(name), context_of(name))


def learned(label: str, name: str, model: Any, length: int) -> CacheStatistics:
    """Statistics of the cache of a model, from windows of a named model's texts, kept under a label."""
    path = KEPT / f"{label}.safetensors"
    if path.is_file():
        return load_statistics(path)
    files = TEXTS[name]
    count = max(1, CALIBRATION_TOKENS // length // len(files))
    windows = torch.cat([windows_of(name, *file, count, length) for file in files])
    statistics = calibrate_cache(model, windows, protocol={"texts": [file for file, _ in files]})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_statistics(statistics, path)
    return statistics
