"""GPTQ of llmcompressor, saved as compressed-tensors. Options: bits, group."""

from __future__ import annotations

import numpy as np
import torch
from common import finish, job, plain_folder
from compressed_tensors.compressors.base import decompress_module
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def groups_of(model: torch.nn.Module, bits: int, group: int) -> dict[str, dict[str, object]]:
    """A scheme for each group size at work: halved until it divides, whole rows below 32."""
    targets: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head"):
            size = group
            while layer.in_features % size:
                size //= 2
            targets.setdefault(size if size >= 32 else 0, []).append(name)
    return {
        f"group_{size}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if size else "channel",
                **({"group_size": size} if size else {}),
            },
        }
        for size, names in targets.items()
    }


def main() -> None:
    """Every linear layer but the head; calibrated in float32, scales and the rest saved in float16."""
    work = job()
    tokens = np.load(work.tokens)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    groups = groups_of(model, int(work.options["bits"]), int(work.options["group"]))
    text = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(text),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        batch_size=8,
    )
    folder = work.out / "native"
    model.half().save_pretrained(folder, save_compressed=True)
    # Decoded from the file as saved, so that what is measured is what is counted.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    exact = [n for n, p in model.named_parameters() if n.endswith(".weight") and p.ndim > 1]
    for layer in model.modules():
        decompress_module(layer)
    names = {n for n, _ in AutoModelForCausalLM.from_pretrained(work.model).named_parameters()}
    plain = {k: v.float().contiguous() for k, v in model.state_dict().items() if k in names}
    save_file(plain, plain_folder(work) / "model.safetensors", {"format": "pt"})
    native = folder / "model.safetensors"
    finish(work, native, exact, ["llmcompressor", "compressed-tensors", "torch", "transformers"])


if __name__ == "__main__":
    main()
