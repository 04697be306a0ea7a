"""A record such as the pipeline makes: an 8-block Llama in 3.2 MB, with every field filled."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from waterfill.types import Record

OVERHEAD = 9_216


def tensors(
    blocks: int = 8, width: int = 256, inner: int = 704
) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, kind) in the order of the model."""
    found: list[tuple[str, tuple[int, ...], str]] = [
        ("model.embed_tokens.weight", (4096, width), "embedding")
    ]
    for b in range(blocks):
        shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width // 2, width),
            "self_attn.v_proj": (width // 2, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        found += [(f"model.layers.{b}.{n}.weight", s, "linear") for n, s in shapes.items()]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found.append((f"model.layers.{b}.{norm}.weight", (width,), "norm"))
    return [*found, ("model.norm.weight", (width,), "norm")]


def record(blocks: int = 8, octave: float = 0.0, **changes: Any) -> Record:
    """A record `octave` doublings larger than 3.7 bits per weight."""
    rng = random.Random(blocks)
    rows: list[dict[str, Any]] = []
    for name, shape, kind in tensors(blocks):
        params = math.prod(shape)
        row = {"name": name, "kind": kind, "shape": list(shape), "params": params}
        if kind == "norm":
            row |= {
                "codec": "raw",
                "nbytes": 2 * params,
                "predicted_nats": 0.0,
                "why": "small: kept as it is",
            }
        else:
            bits = (
                3.55 * 2**octave
                + rng.gauss(0, 0.35)
                + 0.9 * ("v_proj" in name)
                - 0.5 * ("q_proj" in name)
            )
            codec = "trellis:states=8,water=0.00213" if kind == "linear" else "rows:water=0.00213"
            harm = (
                3e-4
                * 4 ** (-3.55 * (2**octave - 1))
                * rng.lognormvariate(0, 0.8)
                * (params / 180_224)
            )
            why = (
                "slope reached the water level"
                if rng.random() < 0.9
                else "last bytes of slack spent here"
            )
            row |= {
                "codec": codec,
                "nbytes": int(bits * params / 8),
                "predicted_nats": harm,
                "why": why,
            }
        row |= {"original_nbytes": 2 * params, "bits_per_weight": 8 * row["nbytes"] / params}
        rows.append(row)
    tied = {
        "name": "lm_head.weight",
        "kind": "embedding",
        "codec": "same as model.embed_tokens.weight",
    }
    tied |= {"shape": [4096, 256], "params": 0, "nbytes": 0, "original_nbytes": 2_097_152}
    rows.append(tied | {"bits_per_weight": 0.0, "predicted_nats": 0.0, "why": "equal bit for bit"})
    container = {"name": "(container)", "kind": "", "codec": "", "shape": [], "params": 0}
    container |= {"nbytes": OVERHEAD, "original_nbytes": 0, "bits_per_weight": 0.0}
    rows.append(container | {"predicted_nats": 0.0, "why": "header and index"})
    params = sum(r["params"] for r in rows)
    nbytes = sum(r["nbytes"] for r in rows)
    predicted = sum(r["predicted_nats"] for r in rows)
    bits = 8 * nbytes / params
    layers = [
        {
            "name": r["name"],
            "predicted_nats": r["predicted_nats"],
            "measured_nats": r["predicted_nats"] * rng.lognormvariate(0.05, 0.3),
        }
        for r in rows
        if r["predicted_nats"] > 0
    ]
    curve = tuple(
        {
            "nbytes": nbytes * 2**o,
            "bits_per_weight": bits * 2**o,
            "predicted_nats": predicted * 4 ** (-bits * (2**o - 1)) + 1e-6,
        }
        for o in [x / 8 for x in range(-10, 9)]
    )
    digest = "b5afc4c8ce7d13047cff2a04e14408fa71116ff81fe534d3614ae5963c710418"
    text = {"name": "english_heldout.txt", "nbytes": 144_787, "sha256": digest}
    made = Record(
        name=f"english-7m-{bits:.1f}bpw",
        nbytes=nbytes,
        bits_per_weight=bits,
        metrics={
            "perplexity": 49.6 * math.exp(predicted),
            "perplexity_original": 49.6,
            "kl_nats": predicted * 1.06,
            "kl_nats_stderr": predicted * 0.03,
            "kl_nats_p99": predicted * 8,
            "top1_agreement": 0.9412,
            "tokens": 41_583,
            "protocol": {
                "kind": "strided windows, every token scored once with the longest context",
                "tokens": 41_633,
                "window": 256,
                "stride": 128,
                "bos": None,
                "texts": [text],
                "dtype": "float32",
                "torch": "2.13.0",
                "transformers": "5.23.0",
            },
            "layers": layers,
        },
        predicted={"kl_nats": predicted},
        ledger=tuple(rows),
        curve=curve,
        about={
            "command": f"waterfill compress english-7m --budget {nbytes + 1800} -o small",
            "waterfill": "0.1.0",
            "numpy": "2.4.6",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "model": "english-7m",
            "budget_nbytes": nbytes + 1800,
            "original_nbytes": 13_910_360,
            "params": params,
            "created": "2026-11-21T03:10:37Z",
            "plan_digest": digest[::-1],
            "calibration": {"texts": [text | {"name": "c4.txt"}], "tokens": 65_536, "window": 256},
        },
    )
    return dataclasses.replace(made, **changes)
