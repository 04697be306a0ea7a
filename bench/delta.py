"""Exact deltas: size and speed against sparse indices and values, and against zstandard of those."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import zstandard

import waterfill
from bench.harness import Row, main, seconds
from waterfill.sources import StateSource
from waterfill.types import from_float32

PROTOCOL = (
    "bf16 tensors of 4096 x 4096, N(0, 0.02), float32 master moved by lr up or down and rounded again; "
    "sparse: int32 index and bf16 value of each changed word; one thread; hashes of both models and "
    "the patch file included; GB/s of the bf16 model; median of interleaved rounds"
)
SIDE = 4096
STEPS = 4

State = dict[str, Any]


def gaussian(tensors: int, lr: float) -> tuple[State, State]:
    """A model, and the same after one step of a fixed size in a random direction."""
    rng = np.random.default_rng(0)
    old, new = {}, {}
    for number in range(tensors):
        master = rng.standard_normal((SIDE, SIDE), np.float32) * np.float32(0.02)
        step = np.where(rng.random((SIDE, SIDE), np.float32) < 0.5, np.float32(lr), np.float32(-lr))
        old[f"w{number}"] = _bfloat16(master)
        new[f"w{number}"] = _bfloat16(master + step)
    return old, new


def _bfloat16(values: Any) -> Any:
    import torch

    return torch.from_numpy(from_float32(values, "BF16").view(np.int16)).view(torch.bfloat16)


def _words(tensor: Any) -> Any:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.int16).numpy()


def sparse(old: State, new: State) -> list[bytes]:
    """Index and value of each changed word, tensor by tensor."""
    found = []
    for name, tensor in new.items():
        a, b = _words(old[name]), _words(tensor)
        places = np.flatnonzero(a != b)
        found.append(places.astype(np.int32).tobytes() + b[places].tobytes())
    return found


def sizes(label: str, old: State, new: State, patch: bytes) -> Iterator[Row]:
    """The patch against the sparse format, and against what zstandard makes of that."""
    plain = sparse(old, new)
    total = sum(map(len, plain))
    packed = sum(len(zstandard.ZstdCompressor(level=3).compress(part)) for part in plain)
    elements = sum(t.numel() for t in new.values())
    share = total / 6 / elements
    note = f"{share:.2%} changed, {8 * len(patch) / elements:.3f} bits a weight"
    yield Row(f"{label}: sparse over patch", total / len(patch), "times", 6.0, ">=", note)
    yield Row(f"{label}: sparse after zstandard -3 over patch", packed / len(patch), "times")
    nbytes = sum(t.nbytes for t in new.values())
    yield Row(f"{label}: model over patch", nbytes / len(patch), "times")


def speeds(label: str, old: State, new: State, rounds: int) -> Iterator[Row]:
    """Diff and apply, each with every hash."""
    patch = waterfill.diff(old, new)
    yield from sizes(label, old, new, patch)
    nbytes = sum(t.nbytes for t in new.values())
    took: dict[str, list[float]] = {"diff": [], "apply": []}
    for _ in range(rounds):
        took["diff"].append(seconds(lambda: waterfill.diff(old, new), 1, 0))
        target = {name: tensor.clone() for name, tensor in old.items()}
        took["apply"].append(seconds(lambda: waterfill.apply_(target, patch), 1, 0))  # noqa: B023
    assert all((_words(target[name]) == _words(new[name])).all() for name in new)
    for name, times in took.items():
        yield Row(f"{label}: {name}", nbytes / float(np.median(times)) / 1e9, "GB/s", 0.5, ">=")


def fine_tune(quick: bool) -> Iterator[Row]:
    """A few steps of AdamW on the demo model, float32 master weights, saved in bf16."""
    import torch

    from waterfill.runtime.torch_model import load_original
    from waterfill.sources import resolve
    from waterfill.sources.text import load_tokenizer

    folder = resolve("demo").path
    text = (folder.parent / "text" / "calibration.txt").read_text("utf-8")
    tokens = load_tokenizer(folder)(text, return_tensors="pt")["input_ids"][0]
    for lr in (1e-6, 1e-5):
        torch.manual_seed(0)
        model = load_original(folder, False).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for step in range(STEPS + 1):
            if step == STEPS:
                old = _saved(model)
            at = 512 * step
            batch = tokens[at : at + 512].reshape(4, 128)
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        new = _saved(model)
        yield from sizes(f"demo, AdamW, lr {lr:g}", old, new, waterfill.diff(old, new))
        if quick:
            return


def _saved(model: Any) -> State:
    """What a checkpoint would hold: bf16, tied tensors once."""
    source = StateSource(model.state_dict())
    return {n: t.bfloat16().clone() for n, t in source.state.items() if n not in source.shared}


def run(quick: bool) -> Iterator[Row]:
    """All figures."""
    os.environ["WATERFILL_THREADS"] = "1"
    tensors = 2 if quick else 8
    for lr in (1e-6, 3e-6):
        old, new = gaussian(tensors, lr)
        yield from speeds(f"gaussian, lr {lr:g}", old, new, 3 if quick else 7)
        del old, new
    yield from fine_tune(quick)


if __name__ == "__main__":
    main("delta", PROTOCOL, run)
