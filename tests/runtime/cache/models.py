"""Small decoders of many kinds, with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from waterfill.runtime.cache.calibrating import calibrate_cache
from waterfill.runtime.cache.facts import facts_of
from waterfill.runtime.cache.statistics import CacheStatistics

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen2Config": {},
    "Qwen3Config": {"head_dim": 32},
    "MistralConfig": {"sliding_window": 48},
    "Gemma2Config": {"head_dim": 16, "sliding_window": 48},
    "Gemma3TextConfig": {"head_dim": 16, "sliding_window": 48},
    "Phi3Config": {},
    "GPTNeoXConfig": {},
    "GPT2Config": {"n_positions": 512},
    "OPTConfig": {"word_embed_proj_dim": 64},
    "CohereConfig": {},
    "MixtralConfig": {},
}


@cache
def decoder(
    family: str = "LlamaConfig", dtype: torch.dtype = torch.float32, layers: int = 2
) -> Any:
    """A model of this family, the same at every call."""
    torch.manual_seed(0)
    config = getattr(transformers, family)(
        **{**COMMON, **FAMILIES[family], "num_hidden_layers": layers}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model


def tokens(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    """Random tokens, none of them padding."""
    return torch.randint(
        2, COMMON["vocab_size"], (rows, count), generator=torch.Generator().manual_seed(seed)
    )


def plant_outliers(model: Any, factor: float = 30.0) -> Any:
    """Make two pairs of key channels huge without changing what the model computes.

    Channels that rotate together are multiplied alike, those of the queries divided, so scores stay; biases
    go along. For models whose queries and keys come straight from `q_proj` and `k_proj`.
    """
    facts = next(one for one in facts_of(model) if one is not None)
    assert facts.rotary is not None
    ends = [0, len(facts.rotary.frequencies) - 1]
    channels = torch.cat([facts.rotary.first[ends], facts.rotary.second[ends]])
    with torch.no_grad():
        for name, module in model.named_modules():
            kind = name.rpartition(".")[2]
            for weight in module.parameters() if kind in ("q_proj", "k_proj") else ():
                heads = weight.view(-1, facts.key_width, *weight.shape[1:])
                heads[:, channels] *= factor if kind == "k_proj" else 1 / factor
    return model


@cache
def statistics(family: str = "LlamaConfig") -> CacheStatistics:
    """What calibration says of such a model."""
    return calibrate_cache(decoder(family), tokens(8, 128))
