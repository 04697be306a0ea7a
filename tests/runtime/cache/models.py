"""Small decoders of many kinds, with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from waterfill.runtime.cache.facts import facts_of
from waterfill.runtime.cache.fitting.calibrating import calibrate_cache
from waterfill.runtime.cache.fitting.statistics import CacheStatistics

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
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
SMALL_GPT = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512}
# Class of the configuration, perhaps with a word for a kind of its own -> what differs from COMMON.
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen2Config": {},
    "Qwen2Config sliding": {
        "use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1
    },
    "Qwen3Config": {"head_dim": 32},
    "MistralConfig": {"sliding_window": 48},
    "GemmaConfig": {"head_dim": 16},
    "Gemma2Config": {"head_dim": 16, "sliding_window": 48},
    "Gemma3TextConfig": {"head_dim": 16, "sliding_window": 48},
    # The last two layers read what the first two keep.
    "Gemma3nTextConfig": {
        "head_dim": 16, "sliding_window": 48, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [96] * 4,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "PhiConfig": {},
    "Phi3Config": {},
    "GPTNeoXConfig": {},
    "GPT2Config": {"n_positions": 512},
    "GPTJConfig": {**SMALL_GPT, "rotary_dim": 8},
    "GPTNeoConfig": {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 48,
    },
    "GPTBigCodeConfig": {"n_positions": 512, "multi_query": True},
    "CodeGenConfig": {**SMALL_GPT, "rotary_dim": 8, "n_ctx": 512},
    "Starcoder2Config": {"sliding_window": 48},
    "OPTConfig": {"word_embed_proj_dim": 64},
    "BloomConfig": {"n_head": 4, "n_layer": 2},
    "MptConfig": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "use_cache": True
    },
    "FalconConfig": {"multi_query": True},
    "FalconConfig new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "FalconConfig alibi": {"alibi": True},
    "XGLMConfig": {"d_model": 64, "attention_heads": 4, "ffn_dim": 96, "num_layers": 2},
    "CohereConfig": {},
    "Cohere2Config": {"sliding_window": 48},
    "Olmo2Config": {},
    "SmolLM3Config": {},
    "MixtralConfig": {},
    "Qwen2MoeConfig": {**MIXTURE, "shared_expert_intermediate_size": 40},
    "Qwen3MoeConfig": {**MIXTURE, "head_dim": 16},
    "GptOssConfig": {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 48
    },
    "Llama4TextConfig": {
        "head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 4,
        "num_experts_per_tok": 1, "attention_chunk_size": 64,
    },
    # These cache latents, from which attention makes its keys and values.
    "DeepseekV2Config": LATENT,
    "DeepseekV3Config": LATENT,
    # Attention reads the keys twice, with halves of the values.
    "DiffLlamaConfig": {},
    # Every other layer has a state of another kind.
    "Qwen3NextConfig": {
        **MIXTURE, "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 24,
    },
    "JambaConfig": {
        **MIXTURE, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip


# Whose layers of other kinds have a cache class of the model's own in older transformers.
MIXED = ("Qwen3NextConfig", "JambaConfig", "Lfm2Config")
if not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
    FAMILIES = {name: own for name, own in FAMILIES.items() if name not in MIXED}


@cache
def decoder(
    family: str = "LlamaConfig", dtype: torch.dtype = torch.float32, layers: int = 2
) -> Any:
    """A model of this family, the same at every call."""
    torch.manual_seed(0)
    config = getattr(transformers, family.partition(" ")[0])(
        **{**COMMON, "num_hidden_layers": layers, **FAMILIES[family]}
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
