"""Artifacts of tiny models made without a planner: every kind of codec in each, in milliseconds."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests import tiny
from tests.pipeline import small
from waterfill.codecs.integer import Integer
from waterfill.codecs.lossless import Lossless
from waterfill.codecs.trellis import Trellis
from waterfill.container import FILE_NAME, describe, write
from waterfill.registry import Codec
from waterfill.runtime.artifact import write_config
from waterfill.runtime.torch_model import model_class, quiet_transformers
from waterfill.sources import open_source
from waterfill.types import Encoded, TensorInfo, Weighting

_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_LONE = re.compile(r"(?<!experts)\.(\w+)\.weight$")
Pick = Callable[[TensorInfo, int], Codec]


def mixed(info: TensorInfo, number: int) -> Codec:
    """Matrices by turns as integers, along a trellis and lossless; all else lossless."""
    if len(info.shape) != 2 or min(info.shape) < 8:
        return Lossless()
    turns = (Integer(bits=4, group=32, solver="nearest"), Trellis(step=0.1, states=8), Lossless())
    return turns[number % 3]


def integers(info: TensorInfo, number: int) -> Codec:
    """Matrices as integers."""
    matrix = len(info.shape) == 2 and min(info.shape) >= 8
    return Integer(bits=4, group=32, solver="nearest") if matrix else Lossless()


def lossless(info: TensorInfo, number: int) -> Codec:
    """Nothing changed."""
    return Lossless()


def make(model: Path, out: Path, pick: Pick = mixed) -> Path:
    """An artifact of a model folder."""
    source = open_source(str(model))
    out.mkdir(parents=True)
    described: list[dict[str, Any]] = []
    payloads: list[list[bytes]] = []
    repeated = source.duplicates()
    for number, (name, (dtype, shape)) in enumerate(source.tensors.items()):
        kind = "embedding" if "emb" in name or "wte" in name else "linear"
        kind = "expert" if ".experts." in name else kind
        info = TensorInfo(
            name, shape, dtype, kind if len(shape) == 2 else "other",
            group=repeated.get(name, ""), transposed=bool(_CONV1D.search(name)) and "gpt2" in str(model),
        )  # fmt: skip
        codec = pick(info, number)
        parts, extra = (
            ({}, {}) if info.group else codec.encode(source.read(name), info, Weighting())
        )
        described.append(describe(Encoded(codec.spec, info, parts, extra), {}))
        payloads.append(list(parts.values()))
    write(out / FILE_NAME, described, payloads, {})
    for file in source.files_beside:
        if file.name not in ("README.md", "config.json"):
            shutil.copyfile(file, out / file.name)
    write_config(out, source.config)
    return out


def artifact(name: str, dtype: str = "float32", pick: Pick = mixed) -> Path:
    """The artifact of a tiny model of an architecture."""
    return _artifact(name, dtype, pick)


@functools.cache
def _artifact(name: str, dtype: str, pick: Pick) -> Path:
    folder = small.home() / f"door-{name}-{dtype}"
    if not folder.exists():
        with small.quiet():
            tiny.tiny_model(name, folder, dtype=dtype)
    return make(folder, small.home() / f"door-{name}-{dtype}-{pick.__name__}", pick)


def plain(name: str, dtype: str = "float32", pick: Pick = mixed) -> Path:
    """The same as `waterfill.decompress` gives it."""
    return _plain(name, dtype, pick)


@functools.cache
def _plain(name: str, dtype: str, pick: Pick) -> Path:
    import waterfill

    out = small.home() / f"door-{name}-{dtype}-{pick.__name__}-plain"
    waterfill.decompress(artifact(name, dtype, pick), out)
    return out


def load_plain(folder: Path) -> Any:
    """A plain folder, as transformers loads it."""
    with quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(folder)
        return model_class(config).from_pretrained(folder).eval()


def logits(model: Any, tokens: int = 12) -> torch.Tensor:
    """What a model makes of a few tokens."""
    ids = torch.arange(tokens)[None] * 7 % 250
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        out: torch.Tensor = model(**inputs)[0]
    return out


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())
