"""Walsh-Hadamard and codebook kernels against copy, torch and memory. ``python -m bench.transforms [--json FILE] [--quick]``"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from bench.entropy import forced, interleaved
from bench.harness import Row, main
from waterfill.coding import native
from waterfill.coding.hadamard import hadamard

PROTOCOL = (
    "one thread unless said; medians of interleaved rounds, ratios of speeds in one run. Rows of 4096 "
    "float32, 256 MB (64 MB with --quick); copy is numpy.copyto of the same rows; GB/s of rows, read or written"
)


def isas() -> list[str]:
    return native._core.simd_available() if native._core else []


def walsh_hadamard(quick: bool) -> Iterator[Row]:
    """Rows of 4096 points, one block each."""
    import torch

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    x = random.standard_normal(((4096 if quick else 16384), 4096), np.float32)
    signs = (1 - 2 * random.integers(0, 2, 4096)).astype(np.int8)
    there, copied, few = x.copy(), np.zeros_like(x), x[:512]
    side = torch.from_numpy(hadamard(np.eye(64, dtype=np.float32)))
    blocks, made = torch.from_numpy(few).view(-1, 64, 64), torch.zeros(len(few), 64, 64)
    scratch = torch.zeros_like(made)

    def kronecker() -> None:
        torch.matmul(torch.matmul(side, blocks, out=scratch), side, out=made)

    calls: dict[str, Callable[[], object]] = {
        "copy": partial(np.copyto, copied, x),
        "torch": kronecker,
        "numpy": forced("numpy", partial(hadamard, few)),
        "two": partial(hadamard, there, out=there, threads=2),
        "signs": partial(hadamard, there, signs=signs, out=there, threads=1),
    }
    for isa in isas():
        calls[f"{isa} in place"] = forced(isa, partial(hadamard, there, out=there, threads=1))
        calls[f"{isa} apart"] = forced(isa, partial(hadamard, x, out=copied, threads=1))
    took = interleaved(calls, 5 if quick else 11)
    assert np.allclose(made.reshape(few.shape).numpy(), hadamard(few), atol=1e-4), "not the same"
    gb, few_gb = x.nbytes / 1e9, few.nbytes / 1e9
    copy = gb / took["copy"]
    for isa in isas():
        for where in ("in place", "apart"):
            speed = gb / took[f"{isa} {where}"]
            bar = 0.9 if isa != "scalar" else None
            note = f"{speed:.1f} GB/s against {copy:.1f}"
            yield Row(f"Walsh-Hadamard, {isa}, {where}: of copy", speed / copy, "times", bar, ">=", note)  # fmt: skip
    best = gb / took[f"{isas()[-1]} in place"]
    for name, called in (("torch", "torch 64 x 64 Kronecker product"), ("numpy", "numpy")):
        speed = few_gb / took[name]
        note = f"{speed:.2f} GB/s"
        yield Row(f"Walsh-Hadamard: against {called}", best / speed, "times", note=note)
    yield Row("Walsh-Hadamard: with signs against without", gb / took["signs"] / best, "times")
    yield Row("Walsh-Hadamard: two threads against one", gb / took["two"] / best, "times")


def run(quick: bool) -> Iterator[Row]:
    yield from walsh_hadamard(quick)


if __name__ == "__main__":
    main("transforms", PROTOCOL, run)
