"""Small decoders of many kinds, with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from waterfill.runtime.cache.calibrating import calibrate_cache
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


@cache
def statistics(family: str = "LlamaConfig") -> CacheStatistics:
    """What calibration says of such a model."""
    return calibrate_cache(decoder(family), tokens(8, 128))
