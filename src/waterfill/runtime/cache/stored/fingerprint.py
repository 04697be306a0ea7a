"""Which model, and which tokenizer, a stored cache belongs to: fast enough to ask each time.

Reading every byte of 70 billion parameters takes longer than many a prefix takes to compute, so of a large
tensor some runs of bytes, evenly spread, stand for it: a training step changes all of them.
"""

from __future__ import annotations

import json
import weakref
from typing import Any

import torch

from waterfill.runtime.cache.facts import tensor_state

__all__ = ["model_fingerprint", "tokenizer_fingerprint"]

WHOLE = 1 << 20  # bytes up to which a tensor is read whole
RUNS, RUN = 256, 256  # of a larger one: so many runs of so many bytes
# Says how a configuration is run or where it came from, not what the model computes.
INCIDENTAL = ("_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation",
    "architectures", "use_cache", "torch_dtype", "dtype", "quantization_config")  # fmt: skip

_KNOWN: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def model_fingerprint(model: Any) -> str:
    """BLAKE3 of a model's configuration, and of its tensors' names, dtypes, shapes and sampled bytes.

    Kept for each model for as long as its tensors are the same objects and none was written to.

    Returns
    -------
    64 hexadecimal digits
    """
    from blake3 import blake3

    state = tensor_state(model)
    known = _KNOWN.get(model)
    if known is not None and known[0] == state:
        return known[1]
    hashed = blake3(_canonical(_plain(model.config.to_dict())))
    for name, tensor in sorted(_tensors(model).items()):
        hashed.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
        hashed.update(_bytes(tensor))
    found = str(hashed.hexdigest())
    _KNOWN[model] = state, found
    return found


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """BLAKE3 of a tokenizer's vocabulary and special tokens, 64 hexadecimal digits."""
    from blake3 import blake3

    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = _canonical([sorted(tokenizer.get_vocab().items(), key=lambda x: (x[1], x[0])), special])
    return str(blake3(text).hexdigest())


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def _plain(config: Any) -> Any:
    if isinstance(config, dict):
        return {k: _plain(v) for k, v in config.items() if k not in INCIDENTAL}
    return [_plain(v) for v in config] if isinstance(config, (list, tuple)) else config


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.device.type != "meta"
    }


def _bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, or runs of them spread over it from the first to the last."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() > WHOLE:
        starts = torch.linspace(0, flat.numel() - RUN, RUNS, dtype=torch.float64).long()
        flat = flat[(starts[:, None] + torch.arange(RUN)).to(flat.device)]
    return flat.cpu().numpy().tobytes()
