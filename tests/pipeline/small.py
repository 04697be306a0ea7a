"""The smallest model worth compressing, its statistics, and helpers; all made once a session."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers

import waterfill
from tests import tiny
from waterfill.sources import open_source
from waterfill.types import DTYPES

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
WORDS = {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 128}
TOKENS = 256
BIG = "model.embed_tokens.weight"


@functools.cache
def _session() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="waterfill-tests-")


@functools.cache
def home() -> Path:
    """A folder for what is made once; it goes when the interpreter does."""
    return Path(_session().name)


@functools.cache
def model() -> Path:
    """A Llama of one block and 10,848 parameters."""
    return make_model(home() / "small")


def make_model(folder: Path, seed: int = 0) -> Path:
    """A small model in a folder of one's own, to be broken."""
    config = transformers.LlamaConfig(
        **SIZES, **HEADS, **WORDS, bos_token_id=257, eos_token_id=258, pad_token_id=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    with quiet():
        made.save_pretrained(folder)
    tiny.tiny_tokenizer(folder)
    return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers' bars are not what these tests look at."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@functools.cache
def text() -> Path:
    """A text file long enough."""
    return tiny.write_text(home())


@functools.cache
def statistics() -> Path:
    """Statistics of `model`; prices gather in it, so that later plans are quick."""
    from waterfill.pipeline import calibrate_to

    calibrate_to(model(), home() / "statistics", [text()], tokens=TOKENS)
    return home() / "statistics"


@functools.cache
def artifact() -> Path:
    """`model` at 4.5 bits."""
    waterfill.compress(model(), home() / "artifact", bits=4.5, calibration=statistics())
    return home() / "artifact"


def check_ledger(folder: Path, record: Any, source: Path) -> None:
    """Every tensor, parameter and byte of the source and the file is accounted for."""
    tensors = open_source(source).tensors
    rows = [r for r in record.ledger if r["name"] != "(container)"]
    counted = dict.fromkeys(tensors, 0)
    for row in rows:
        name = row["name"] if row["name"] in tensors else row["name"].rsplit("[", 1)[0]
        counted[name] += math.prod(row["shape"])
        assert row["codec"] and row["why"], row
        assert row["nbytes"] > 0 or row["codec"].startswith("same as"), row
    assert counted == {name: math.prod(shape) for name, (_, shape) in tensors.items()}
    repeated = sum(math.prod(r["shape"]) for r in rows if r["codec"].startswith("same as"))
    assert sum(r["params"] for r in rows) == sum(counted.values()) - repeated
    nbytes = (folder / "model.safetensors").stat().st_size
    assert sum(r["nbytes"] for r in record.ledger) == nbytes == record.nbytes
    original = sum(math.prod(s) * DTYPES[d].itemsize for d, s in tensors.values())
    assert sum(r["original_nbytes"] for r in rows) == original


def same_files(a: Path, b: Path) -> None:
    """Two artifacts have the same files; all but the record and card are the same bytes."""
    assert {f.name for f in a.iterdir()} == {f.name for f in b.iterdir()}
    for file in sorted(a.iterdir()):
        if file.name not in ("waterfill.json", "README.md"):
            assert file.read_bytes() == (b / file.name).read_bytes(), file.name


def bits_of(array: np.ndarray[Any, Any]) -> bytes:
    """An array's bytes, to be compared exactly (NaN included)."""
    return np.ascontiguousarray(array).tobytes()


def arrays_of(folder: Path) -> Mapping[str, np.ndarray[Any, Any]]:
    """All tensors of a plain folder, read by the safetensors library."""
    return dict(safetensors.numpy.load_file(folder / "model.safetensors"))


def change_config(folder: Path, **entries: Any) -> None:
    """Overwrite entries of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
