"""Half-quadratic quantisation (no calibration). Options: bits, group."""

from __future__ import annotations

import torch
from common import finish, job, plain_folder
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Every linear layer but the head, groups along inputs; the file holds what HQQLinear keeps.

    Its own `save_quantized` is a pickle with a copy of the settings in every layer; a safetensors
    file of the tensors alone is smaller, in the peer's favour; so is float16 for all the rest.
    """
    work = job()
    config = BaseQuantizeConfig(
        nbits=int(work.options["bits"]), group_size=int(work.options["group"]), axis=1
    )
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float16)
    plain = {k: v.float() for k, v in model.state_dict().items()}
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head"):
            coded = HQQLinear(
                layer, config, compute_dtype=torch.float16, device="cpu", del_orig=False
            )
            plain[f"{name}.weight"] = coded.dequantize().float().contiguous()
            del kept[f"{name}.weight"]
            parts = {
                "W_q": coded.W_q.data,
                "scale": coded.meta["scale"],
                "zero": coded.meta["zero"],
            }
            kept |= {f"{name}.{k}": v.contiguous() for k, v in parts.items()}
    if model.config.tie_word_embeddings:
        for tensors in (plain, kept):
            tensors.pop("lm_head.weight", None)
    native = work.out / "model.safetensors"
    save_file(kept, native)
    save_file(plain, plain_folder(work) / "model.safetensors", {"format": "pt"})
    exact = [k for k, v in kept.items() if k.endswith(".weight") and v.ndim > 1]
    finish(work, native, exact, ["hqq", "torch", "transformers"])


if __name__ == "__main__":
    main()
