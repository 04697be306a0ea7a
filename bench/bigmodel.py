"""Random Llamas too large for any cache, and artifacts of them, kept under out/bench."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.models import WORK, source_of
from waterfill.codecs.integer import Integer
from waterfill.codecs.raw import Raw
from waterfill.codecs.trellis import Trellis
from waterfill.container import FILE_NAME, describe, write
from waterfill.registry import Codec
from waterfill.runtime.artifact import new_folder, write_config
from waterfill.sources import open_source
from waterfill.types import Encoded, TensorInfo, Weighting, from_float32

# What the benches of running a model use: fast ones, for nothing here depends on the values.
CODECS: Mapping[str, Codec] = {
    "integer": Integer(bits=4, group=128, solver="nearest"),
    "trellis": Trellis(step=0.45),
}


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    tied: bool

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, in the order of the file."""
        hidden, inner = self.hidden, self.inner
        narrow = hidden // self.heads * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, hidden)
        }
        for i in range(self.blocks):
            at = f"model.layers.{i}"
            shapes |= {f"{at}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qo"}
            shapes |= {f"{at}.self_attn.{p}_proj.weight": (narrow, hidden) for p in "kv"}
            shapes |= {f"{at}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
            shapes |= {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, hidden)
        return shapes


# 1.12 thousand million parameters: 2.2 GB in bf16.
BIG = Llama(2048, 5632, 22, 32, 8, 32000, 2048, tied=False)


def random_llama(folder: Path, sizes: Llama) -> None:
    """Write a checkpoint tensor by tensor: this process, too, stays small.

    Entries of a matrix are N(0, 1 / inputs) rounded to bfloat16; norms are ones.
    """
    header, offset = {}, 0
    for name, shape in sizes.shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    with new_folder(folder, force=False) as made:
        (made / "config.json").write_text(json.dumps(sizes.config))
        for file in source_of("demo").files_beside:  # any tokenizer will do; the demo's ids fit
            if file.name.startswith("tokenizer"):
                shutil.copyfile(file, made / file.name)
        with (made / FILE_NAME).open("wb") as weights:
            weights.write(len(text).to_bytes(8, "little") + text)
            for shape in sizes.shapes.values():
                values = np.ones(shape, np.float32)
                if len(shape) == 2:
                    values = random.standard_normal(shape, np.float32)
                    values *= np.float32(shape[1] ** -0.5)
                weights.write(from_float32(values, "BF16").tobytes())


def big_model() -> Path:
    """The checkpoint of `BIG`, written at first need."""
    folder = WORK / "random-llama-1b"
    if not folder.is_dir():
        say = _started("writing a random Llama of 1.1 G parameters")
        random_llama(folder, BIG)
        say()
    return folder


def big_artifact(codec: str) -> Path:
    """`big_model` with every matrix in one codec of `CODECS`, encoded at first need."""
    return artifact(big_model(), codec)


def artifact(model: str | Path, codec: str) -> Path:
    """A model with every matrix in one codec of `CODECS`, without calibration; kept."""
    name = "demo" if model == "demo" else Path(model).name
    folder = WORK / f"{name}-{codec}"
    if not folder.is_dir():
        say = _started(f"encoding {name} with {CODECS[codec]}")
        _encode(str(model), folder, CODECS[codec])
        say()
    return folder


def _encode(model: str, folder: Path, codec: Codec) -> None:
    source = open_source(model)
    described, payloads = [], []
    for info in _infos(source.tensors, source.duplicates()):
        chosen = codec if len(info.shape) == 2 else Raw()
        parts, extra = {}, {}
        if not info.group:
            parts, extra = chosen.encode(source.read(info.name), info, Weighting(None))
        described.append(describe(Encoded(chosen.spec, info, parts, extra), {}))
        payloads.append(tuple(parts.values()))
    with new_folder(folder, force=False) as made:
        for file in source.files_beside:
            if file.name not in ("README.md", "config.json"):
                shutil.copyfile(file, made / file.name)
        write_config(made, source.config)
        write(made / FILE_NAME, described, payloads, {"model": source.name})


def _infos(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], repeats: Mapping[str, str]
) -> Iterator[TensorInfo]:
    for name, (dtype, shape) in tensors.items():
        kind = "embedding" if "embed" in name else "linear" if len(shape) == 2 else "norm"
        yield TensorInfo(name, shape, dtype, kind, repeats.get(name, ""))


def _started(what: str) -> Any:
    """Say on stderr what takes a while; the result says how long it took."""
    sys.stderr.write(f"{what} ...")
    sys.stderr.flush()
    start = time.perf_counter()
    return lambda: sys.stderr.write(f" {time.perf_counter() - start:.0f} s\n")


if __name__ == "__main__":
    for each in CODECS:
        path = big_artifact(each)
        print(f"{path}: {(path / FILE_NAME).stat().st_size:,} bytes")
