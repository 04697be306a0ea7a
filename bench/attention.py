"""Attention of one token against torch's. ``python -m bench.attention [--json FILE] [--quick]``"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping

from bench.harness import Row, main

PROTOCOL = (
    "one query over a cache of T keys, bf16, batch 1, heads of 64; through the function that transformers "
    "calls for each layer, against its own for sdpa; threads = cores for both; medians of interleaved calls"
)
SHAPES = {"32 heads over 8": (32, 8), "16 heads over 16": (16, 16)}
KEYS = (64, 1000, 4000)
WIDTH = 64


def microseconds(calls: Mapping[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median of each, in turns so that a slow spell of the machine hits all."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat + 2):  # the first two warm up
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 1:
                took[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(times) for name, times in took.items()}


def attention(heads: int, shared: int, keys: int, repeat: int) -> dict[str, float]:
    """Microseconds of both for one shape."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from waterfill.runtime.quick import attention_forward

    class Module(torch.nn.Module):
        num_key_value_groups = heads // shared

    module = Module()
    q = torch.randn(1, heads, 1, WIDTH).bfloat16()
    k, v = (torch.randn(1, shared, keys, WIDTH).bfloat16() for _ in range(2))
    calls = {
        "kernel": lambda: attention_forward(module, q, k, v, None),
        "torch": lambda: sdpa_attention_forward(module, q, k, v, None),
    }
    with torch.no_grad():
        return microseconds(calls, repeat)


def norm(repeat: int) -> dict[str, float]:
    """Microseconds of both for one token of 2048 numbers."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from waterfill.runtime.norms import quicken_norm

    plain, quick = LlamaRMSNorm(2048).bfloat16(), LlamaRMSNorm(2048).bfloat16()
    quicken_norm(quick)
    x = torch.randn(1, 1, 2048).bfloat16()
    with torch.no_grad():
        return microseconds({"kernel": lambda: quick(x), "torch": lambda: plain(x)}, 10 * repeat)


def run(quick: bool) -> Iterator[Row]:
    """Each shape, then a norm."""
    repeat = 15 if quick else 101
    for name, (heads, shared) in SHAPES.items():
        for keys in KEYS:
            took = attention(heads, shared, keys, repeat)
            what = f"{name}, {keys} keys"
            yield Row(what, took["kernel"], "us", note=f"torch {took['torch']:.0f} us")
            yield Row(f"{what}: against torch", took["torch"] / took["kernel"], "times", 2, ">=")
    took = norm(repeat)
    yield Row("norm of 2048", took["kernel"], "us", note=f"torch {took['torch']:.1f} us")
    yield Row("norm of 2048: against torch", took["torch"] / took["kernel"], "times", 1.5, ">=")


if __name__ == "__main__":
    main("attention", PROTOCOL, run)
