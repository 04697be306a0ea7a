"""Tokens per second, end to end, in every residency. ``python -m bench.generate [--json FILE] [--quick]``"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.bigmodel import artifact, big_model
from bench.harness import Row, main
from bench.models import source_of
from bench.peers import llama
from bench.peers.make import Skipped
from waterfill.coding import native

PROTOCOL = (
    "a random Llama (1.1 G parameters, bf16; every matrix, embedding and head in one codec, without "
    "calibration: integer 4 bits in groups of 128, and trellis at about 2.2 bits); batch 1, greedy, prompt of "
    "32 tokens; time from the first new token to the last, sampling included; threads = cores everywhere; "
    "medians of interleaved rounds. transformers and waterfill through model.generate, both as loaded by "
    "default; llama.cpp (built here from source) in a process of its own through its C functions, its own "
    "quantiser, Q4_0 with the head in Q4_0 too"
)
PROMPT = 32
Round = Callable[[], float]


def loaders(model: str | Path) -> dict[str, Callable[[], Any]]:
    """What is measured -> how to load it."""
    import waterfill

    def plain() -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            source_of("demo").path if model == "demo" else model, dtype="auto"
        )

    def ours(codec: str, residency: str) -> Callable[[], Any]:
        return lambda: waterfill.load_model(artifact(model, codec), residency=residency)

    return {
        "transformers bf16": plain,
        "dense": ours("integer", "dense"),
        "packed 4-bit": ours("integer", "packed"),
        "packed trellis": ours("trellis", "packed"),
        "coded": ours("trellis", "coded"),
    }


def generating(model: Any, prompt: list[int], new: int) -> Round:
    """Seconds of ``new - 1`` decode steps."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])

    class Clock(StoppingCriteria):  # type: ignore[misc]
        """Notes when each token came; never stops."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def one() -> float:
        clock = Clock()
        options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        model.generate(ids, stopping_criteria=StoppingCriteriaList([clock]), **options)
        assert len(clock.times) == new, "generation stopped early"
        return clock.times[-1] - clock.times[0]

    return one


def peers(
    model: Path, prompt: list[int], new: int, quick: bool, stack: ExitStack
) -> dict[str, Round]:
    """llama.cpp with each of its types; nothing, and a word, where it is not to be had."""
    try:
        files = llama.gguf_files(model, new=not quick)
    except Skipped as why:
        sys.stdout.write(f"  llama.cpp: left out: {why}\n")
        return {}

    def ours(process: llama.Process) -> Round:
        return lambda: process.seconds(prompt, new)

    return {
        f"llama.cpp {kind}": ours(stack.enter_context(llama.Process(file, native.threads())))
        for kind, file in files.items()
    }


def rates(rounds: Mapping[str, Round], steps: int, repeat: int) -> dict[str, float]:
    """Tokens per second of each, in turns so that a slow spell of the machine hits all."""
    took: dict[str, list[float]] = {name: [] for name in rounds}
    for turn in range(repeat + 1):  # the first warms up
        for name, one in rounds.items():
            seconds = one()
            if turn:
                took[name].append(seconds)
    return {name: steps / median(times) for name, times in took.items()}


def measured(model: str | Path, new: int, repeat: int, quick: bool) -> dict[str, float]:
    """Tokens per second of each way to run a model."""
    prompt = np.random.default_rng(0).integers(2, 2000, PROMPT).tolist()
    with ExitStack() as stack:
        rounds = {}
        for name, load in loaders(model).items():
            rounds[name] = generating(load(), prompt, new)
        if isinstance(model, Path):
            rounds |= peers(model, prompt, new, quick, stack)
        return rates(rounds, new - 1, repeat)


def run(quick: bool) -> Iterator[Row]:
    """The large model with its bars, the demo for context."""
    new, repeat = (17, 3) if quick else (65, 7)
    speed = measured(big_model(), new, repeat, quick)
    plain = speed["transformers bf16"]
    for name, rate in speed.items():
        yield Row(name, rate, "tokens/s", note=f"{1000 / rate:.1f} ms a token")
    bars = {"packed 4-bit": 2.5, "coded": 0.7}
    for name in (n for n in loaders("") if n != "transformers bf16"):
        ratio = speed[name] / plain
        yield Row(f"{name}: against transformers bf16", ratio, "times", bars.get(name), ">=")
    for name in (n for n in speed if n.startswith("llama.cpp")):
        ratio = speed["packed 4-bit"] / speed[name]
        yield Row(f"packed 4-bit: against {name}", ratio, "times", 1.0, ">=")
    demo = measured("demo", 65, repeat, quick)
    for name, rate in demo.items():
        yield Row(f"demo, {name}", rate, "tokens/s")


if __name__ == "__main__":
    main("generate", PROTOCOL, run)
