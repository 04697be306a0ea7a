"""Peak memory of compress against the model's size. ``python -m bench.memory [--json FILE] [--quick]``"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.harness import Row, main
from bench.models import WORK, source_of

PROTOCOL = (
    "a random Llama (bf16, hidden 1024, feed-forward 2816, vocabulary 8192, 24 blocks, 279 M parameters) is "
    "compressed to 3 bits in a process of its own with 4096 (512) calibration tokens; "
    "peak = ru_maxrss of that process, Python, torch and transformers included; size = 4 bytes a parameter"
)
CHILD = """
import resource, sys
from waterfill.pipeline import compress
record = compress(sys.argv[1], sys.argv[2], bits=3.0, tokens=int(sys.argv[3]), force=True)
print(record.about["params"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def random_llama(folder: Path, blocks: int) -> None:
    """Write a checkpoint tensor by tensor: this process, too, stays small."""
    hidden, inner, vocabulary = 1024, 2816, 8192
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(blocks):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qo"}
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (hidden // 4, hidden) for p in "kv"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in source_of("demo").files_beside:  # any tokenizer will do; the demo's ids fit
        if file.name.startswith("tokenizer"):
            shutil.copyfile(file, folder / file.name)
    with (folder / "model.safetensors").open("wb") as weights:
        text = json.dumps(header).encode()
        weights.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = np.ones(shape, np.float32)
            if len(shape) == 2:
                values = random.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
            weights.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def run(quick: bool) -> Iterator[Row]:
    """Peak over size."""
    blocks, tokens = 24, 512 if quick else 4096
    model = WORK / f"random-llama-{blocks}"
    if not (model / "model.safetensors").exists():
        random_llama(model, blocks)
    out = subprocess.run(
        [sys.executable, "-c", CHILD, str(model), str(WORK / "memory"), str(tokens)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    params, peak = map(int, out.split())
    yield Row("parameters", params / 1e6, "million", 200, ">=")
    yield Row("size in fp32", 4 * params / 1e6, "MB")
    yield Row("peak memory of compress", peak / 1e6, "MB")
    yield Row("peak / size in fp32", peak / (4 * params), "", 0.6)


if __name__ == "__main__":
    main("memory", PROTOCOL, run)
