"""Load times and peaks of memory in every residency. ``python -m bench.load [--json FILE] [--quick]``"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from bench.bigmodel import big_model
from bench.footprint import NEW, PROMPT, Way, phases
from bench.harness import Row, main
from waterfill.runtime.residency import estimate
from waterfill.sources import open_source

PROTOCOL = (
    "a random Llama (1.1 G parameters, bf16; every matrix in one codec: integer 4 bits, trellis about 2.2 bits); "
    "each load in a fresh process, files in the page cache. Time: from the call to the last page of the last "
    "weight touched, without imports; medians of interleaved rounds. Memory: RssAnon + RssShmem (what is "
    "allocated; no pages of mapped files), growth over the same process after it has generated with the demo "
    f"model in the same residency and built the large one on meta; peak while {PROMPT} tokens are read and {NEW} "
    "written, against waterfill.runtime.residency.estimate (weights and the buffer they share) and the KV cache"
)
PLAIN = Way()
WAYS = {
    "transformers bf16": PLAIN,
    "integer, dense": Way("integer", "dense"),
    "trellis, dense": Way("trellis", "dense"),
    "integer, packed": Way("integer", "packed"),
    "trellis, packed": Way("trellis", "packed"),
    "trellis, coded": Way("trellis", "coded"),
}


def times(model: Path, repeat: int) -> Iterator[Row]:
    """Load times; the bars are those of dense."""
    for way in WAYS.values():  # files into the page cache
        for file in way.path(model).iterdir():
            file.read_bytes()
    took: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeat):
        for name, way in WAYS.items():
            took[name].append(phases(way, model, watched=False)["load"].seconds)
    nbytes = _dense_nbytes(model)
    plain = median(took["transformers bf16"])
    for name in WAYS:
        rate = nbytes / median(took[name])
        note = f"{rate / 1e9:.2f} GB of bf16 a second"
        yield Row(f"{name}: load time", median(took[name]), "s", note=note)
    for name, way in WAYS.items():
        if way is not PLAIN:
            bar = 0.5 if way.residency == "dense" else None
            ratio = plain / median(took[name])
            yield Row(f"{name}: load speed against transformers bf16", ratio, "times", bar, ">=")


def peaks(model: Path) -> Iterator[Row]:
    """Memory against the estimate, and what loading takes on top."""
    largest = max(2 * int(np.prod(s)) for _, s in open_source(str(model)).tensors.values())
    for name, way in WAYS.items():
        found = phases(way, model)
        base = found["base"].end
        peak = max(found["load"].peak, found["generate"].peak) - base
        running = found["generate"].peak - base
        note = f"mapped files {(found['generate'].file - found['base'].file) / 1e6:+.0f} MB"
        yield Row(f"{name}: peak while generating", running / 1e6, "MB", note=note)
        if way is PLAIN:
            continue
        expected = estimate(way.path(model)).nbytes(way.residency) + _cache_nbytes(model)
        note = f"{expected / 1e6:.0f} MB expected"
        yield Row(
            f"{name}: off the estimate", abs(running / expected - 1), "of it", 0.05, note=note
        )
        over = (peak - max(found["load"].end, found["generate"].end) + base) / largest
        note = f"{peak / 1e6:.0f} MB at most; one layer is {largest / 1e6:.0f} MB"
        yield Row(f"{name}: peak of all over final, in layers", over, "layers", 1.0, note=note)


def _dense_nbytes(model: Path) -> int:
    return sum(2 * int(np.prod(shape)) for _, shape in open_source(str(model)).tensors.values())


def _cache_nbytes(model: Path) -> int:
    """Keys and values of all tokens, in bf16."""
    config = json.loads((model / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    each = 2 * 2 * head * config["num_key_value_heads"] * config["num_hidden_layers"]
    return each * (PROMPT + NEW)


def run(quick: bool) -> Iterator[Row]:
    """Memory first: it is the same on a busy machine."""
    model = big_model()
    yield from peaks(model)
    yield from times(model, 1 if quick else 5)


if __name__ == "__main__":
    main("load", PROTOCOL, run)
