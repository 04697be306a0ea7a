"""llama.cpp generating greedily, one round for each line it reads. Runs where llama-cpp-python is.

::

    python bench/peers/llama_decode.py MODEL.gguf THREADS

reads ``{"prompt": [ids], "new": N}`` and answers ``{"seconds": ..., "tokens": [ids]}``: the time of
N - 1 decode steps, each with its sampling, after the prompt and the first token.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp as lib


class Model:
    """A model and a context of its own."""

    def __init__(self, path: str, threads: int) -> None:
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        context = lib.llama_context_default_params()
        context.n_ctx, context.n_batch = 1024, 1024
        context.n_threads = context.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, context)
        self.sampler = lib.llama_sampler_init_greedy()

    def step(self, tokens: list[int]) -> int:
        """Read tokens, give the likeliest next one."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        if lib.llama_decode(self.context, lib.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit("llama.cpp could not decode")
        return int(lib.llama_sampler_sample(self.sampler, self.context, -1))

    def generate(self, prompt: list[int], new: int) -> dict[str, Any]:
        """One round from an empty cache."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        tokens = [self.step(prompt)]
        start = time.perf_counter()
        while len(tokens) < new:
            tokens.append(self.step(tokens[-1:]))
        return {"seconds": time.perf_counter() - start, "tokens": tokens}


def main() -> None:
    """Answer until the input ends."""
    model = Model(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(model.generate(job["prompt"], job["new"])), flush=True)


if __name__ == "__main__":
    main()
