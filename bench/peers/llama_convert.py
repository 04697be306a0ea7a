"""A Llama checkpoint as GGUF, quantised by llama.cpp itself. Runs where llama-cpp-python is.

::

    python bench/peers/llama_convert.py MODEL OUT TYPE...

leaves OUT/TYPE.gguf for each type (Q4_0, Q4_K_M, ...).
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from common import tensors_of
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

# Below Hugging Face's names, above llama.cpp's.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def renamed(name: str) -> str:
    """llama.cpp's name of a tensor."""
    stem, _, end = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, block, inner = stem.split(".", 3)
        return f"blk.{block}.{NAMES[inner]}.{end}"
    return f"{NAMES[stem]}.{end}"


def write(model: Path, out: Path) -> None:
    """Matrices in BF16, vectors in F32; a vocabulary of the right size and no meaning."""
    config = json.loads((model / "config.json").read_text())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    writer = GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(config.get("rope_parameters", {}).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, values in tensors_of(model).items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # Halves of a head rotate together here, neighbours there.
            m, n = values.shape
            halves = values.reshape(m // (hidden // heads), 2, hidden // heads // 2, n)
            values = halves.swapaxes(1, 2).reshape(m, n)
        kind = GGMLQuantizationType.F32 if values.ndim < 2 else GGMLQuantizationType.BF16
        writer.add_tensor(
            renamed(name), quantize(np.ascontiguousarray(values), kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def requantise(plain: Path, out: Path, kind: str) -> None:
    """As llama-quantize would; Q4_0 takes the head too, which makes it faster."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.pure = kind == "Q4_0"
    names = (str(plain).encode(), str(out).encode())
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantise to {kind}")


def main() -> None:
    """Convert once, quantise to each type."""
    model, out, *kinds = sys.argv[1:]
    plain = Path(out) / "plain.gguf"
    write(Path(model), plain)
    for kind in kinds:
        requantise(plain, Path(out) / f"{kind}.gguf", kind)
    plain.unlink()


if __name__ == "__main__":
    main()
