"""Walsh-Hadamard, codebook and packing kernels. ``python -m bench.transforms [--json FILE] [--quick]``"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from bench.entropy import forced, interleaved
from bench.harness import Row, main
from waterfill.coding import native
from waterfill.coding.codebook import CodebookMatrix, integers
from waterfill.coding.hadamard import hadamard
from waterfill.coding.packing import pack, unpack
from waterfill.types import Array

PROTOCOL = (
    "one thread unless said; medians of interleaved rounds, ratios of speeds in one run. Rows of 4096 "
    "float32, 256 MB (64 MB with --quick); copy is numpy.copyto of the same rows; GB/s of rows, read or written. "
    "Codebook: NF4, 4096 x 11008, float16 scales of 128 columns, float32 activations, nine copies in turn. "
    "Packing: 2 million values, in a cache"
)
COPIES = 9  # 210 MB together
NF4 = np.array(
    [
        -1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
    ],
    np.float32,
)  # fmt: skip


def isas() -> list[str]:
    return native._core.simd_available() if native._core else []


def walsh_hadamard(quick: bool) -> Iterator[Row]:
    """Rows of 4096 points, one block each."""
    import torch

    random = np.random.default_rng(0)
    x = random.standard_normal(((4096 if quick else 16384), 4096), np.float32)
    signs = (1 - 2 * random.integers(0, 2, 4096)).astype(np.int8)
    there, copied, few = x.copy(), np.zeros_like(x), x[:512]
    near = there[:128]
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
        calls[f"{isa} near"] = forced(isa, partial(hadamard, near, out=near, threads=1))
        calls[f"{isa} apart"] = forced(isa, partial(hadamard, x, out=copied, threads=1))
    took = interleaved(calls, 5 if quick else 11)
    assert np.allclose(made.reshape(few.shape).numpy(), hadamard(few), atol=1e-4), "not the same"
    gb, few_gb = x.nbytes / 1e9, few.nbytes / 1e9
    copy = gb / took["copy"]
    for isa in isas():
        for where in ("in place", "apart"):
            speed = gb / took[f"{isa} {where}"]
            # Apart, the lines written are read first: three streams where copy has two.
            bar = 0.9 if isa != "scalar" and where == "in place" else None
            note = f"{speed:.1f} GB/s against {copy:.1f}"
            yield Row(f"Walsh-Hadamard, {isa}, {where}: of copy", speed / copy, "times", bar, ">=", note)  # fmt: skip
    for isa in isas():
        speed = near.nbytes / 1e9 / took[f"{isa} near"]
        yield Row(f"Walsh-Hadamard, {isa}, 2 MB in a cache", speed, "GB/s")
    best = gb / took[f"{isas()[-1]} in place"]
    for name, called in (("torch", "torch 64 x 64 Kronecker product"), ("numpy", "numpy")):
        speed = few_gb / took[name]
        note = f"{speed:.2f} GB/s"
        yield Row(f"Walsh-Hadamard: against {called}", best / speed, "times", note=note)
    yield Row("Walsh-Hadamard: with signs against without", gb / took["signs"] / best, "times")
    yield Row("Walsh-Hadamard: two threads against one", gb / took["two"] / best, "times")


def codebook_matvec(quick: bool) -> Iterator[Row]:
    """4096 x 11008, a scale for 128 columns: copies in turn, so that none is left in a cache."""
    import torch

    m, n, group = 4096, 11008, 128
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (m, n), np.uint8)
    scales = random.random((m, n // group), np.float32).astype(np.float16)
    first = CodebookMatrix.build(integers(codes, NF4, scales, group), "BF16")
    assert first is not None
    ours = [CodebookMatrix.from_arrays(copied(first.arrays)) for _ in range(COPIES)]
    plain = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.from_numpy(codes.astype(np.int32)), 1
    )
    theirs = [plain.clone() for _ in range(COPIES)]
    both = torch.ones(n // group, m, 2, dtype=torch.bfloat16)
    x = random.standard_normal((1, n), np.float32)
    y, theirs_x = np.empty((1, m), np.float32), torch.from_numpy(x).to(torch.bfloat16)

    def multiply(threads: int) -> None:
        for matrix in ours:
            matrix.matmul(x.ctypes.data, "F32", y.ctypes.data, 1, threads)

    def torch_int4() -> None:
        for packed in theirs:
            torch.ops.aten._weight_int4pack_mm_for_cpu(theirs_x, packed, group, both)

    def read() -> None:
        for matrix in ours:
            native._core.packed_read(matrix.arrays["codes"])  # type: ignore[union-attr]

    calls: dict[str, Callable[[], object]] = {"read": read, "torch": torch_int4}
    calls["two"] = partial(multiply, 2)
    for isa in isas():
        calls[isa] = forced(isa, partial(multiply, 1))
    took = interleaved(calls, 5 if quick else 15)
    nbytes = first.nbytes * COPIES
    bandwidth = first.arrays["codes"].nbytes * COPIES / took["read"]
    for isa in isas():
        share = nbytes / took[isa] / bandwidth
        note = f"{took[isa] / COPIES * 1e3:.2f} ms; reading alone {bandwidth / 1e9:.1f} GB/s"
        bar = 0.62 if isa == "avx512" else None
        yield Row(f"codebook matvec, {isa}: of read bandwidth", share, "ratio", bar, ">=", note)
    note = f"torch {took['torch'] / COPIES * 1e3:.2f} ms"
    ratio = took["torch"] / took[isas()[-1]]
    yield Row("codebook matvec: against torch int4, bf16 input", ratio, "times", 1.2, ">=", note)
    ratio = took[isas()[-1]] / took["two"]
    yield Row("codebook matvec: two threads against one", ratio, "times")


def packing(quick: bool) -> Iterator[Row]:
    """Values of three and four bits, out of their bytes and into them."""
    random = np.random.default_rng(0)
    for width in (4,) if quick else (3, 4):
        values = random.integers(0, 1 << width, 1 << 21).astype(np.uint8)
        data = pack(values, width)
        calls: dict[str, Callable[[], object]] = {}
        for isa in [*isas(), "numpy"]:
            calls[f"unpack, {isa}"] = forced(isa, partial(unpack, data, values.size, width))
            calls[f"pack, {isa}"] = forced(isa, partial(pack, values, width))
        took = interleaved(calls, 5 if quick else 15)
        for isa in isas():
            for what in ("unpack", "pack"):
                ratio = took[f"{what}, numpy"] / took[f"{what}, {isa}"]
                note = f"{values.size / took[f'{what}, {isa}'] / 1e9:.1f} billion values a second"
                yield Row(f"{what} {width} bits, {isa}: against numpy", ratio, "times", note=note)


def copied(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array.copy() for name, array in arrays.items()}


def rows(quick: bool) -> Iterator[Row]:
    import torch

    torch.set_num_threads(1)
    yield from walsh_hadamard(quick)
    yield from codebook_matvec(quick)
    yield from packing(quick)


if __name__ == "__main__":
    main("transforms", PROTOCOL, rows)
