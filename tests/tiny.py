"""Tiny random models of many architectures, with a byte-level tokenizer, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

HIDDEN = 32
VOCABULARY = 260  # bytes, and four special tokens
POSITIONS = 128

_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# name -> (model class, configuration class, its arguments)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA, "sliding_window": 48}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": HIDDEN,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "n_positions": POSITIONS,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _LLAMA),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_LLAMA, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "tie_word_embeddings": True},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_LLAMA, **_MOE, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_LLAMA, **_MOE}),
    # experts in one tensor each, stored (experts, inputs, outputs)
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "vocab_size": VOCABULARY,
            "state_size": 4,
            "time_step_rank": 4,
        },
    ),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "vocab_size": VOCABULARY},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
        },
    ),
}

TEXT = (
    "The river rises in the hills and runs through three counties before it meets the sea. "
    "In 1871 a mill was built where the old road crosses it; 42 people worked there. "
) * 40


def tiny_model(name: str, folder: Path, seed: int = 0, dtype: str = "float32") -> Any:
    """Save a tiny model of an architecture, with a tokenizer, and return it in eval mode."""
    model_class, config_class, options = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(
        **options, bos_token_id=257, eos_token_id=258, pad_token_id=256
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Matrices large enough that attention and experts choose; vectors not all alike.
                if parameter.ndim > 1:
                    parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return model


def tiny_tokenizer(folder: Path) -> None:
    """Save a tokenizer whose tokens are bytes; it adds nothing of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate([*symbols, *special])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token"), special, strict=True))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))


def write_text(folder: Path) -> Path:
    """A text file of about 6,600 tokens for these tokenizers."""
    path = folder / "text.txt"
    path.write_text(TEXT)
    return path
