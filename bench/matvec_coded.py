"""Entropy-coded weights multiplied as they are. ``python -m bench.matvec_coded [--json FILE] [--quick]``"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch

from bench.entropy import forced, interleaved
from bench.harness import Row, main, seconds
from waterfill.coding import native
from waterfill.coding.coded import CodedMatrix
from waterfill.registry import parse_spec
from waterfill.types import Array, Integers, TensorInfo, Weighting, from_float32, to_float32

PROTOCOL = (
    "a bf16 matrix 4096 x 11008, Gaussian in rows of uneven scale, by the trellis codec with 64 states at about "
    "2.2 bits, columns and rows of uneven weight; bf16 activations and outputs; copies of more than the last "
    "cache, a call each, so that memory is measured; medians of interleaved rounds, ratios of speeds in one run, "
    "against torch's bf16 linear of as many threads"
)
M, N = 4096, 11008
SPEC = "trellis:step=0.436"
COPIES_NBYTES = 200 << 20


def tensor() -> tuple[Integers, int, Array, Integers]:
    """What the codec holds, bytes in a file, decompressed bits, and what is known without decoding."""
    random = np.random.default_rng(0)
    rows = np.exp(random.normal(0, 0.2, (M, 1))).astype(np.float32)
    bits = from_float32(
        random.standard_normal((M, N), np.float32) * np.float32(0.02) * rows, "BF16"
    )
    moment = np.exp(random.normal(0, 1, N)).astype(np.float32)
    weighting = Weighting(moment, np.exp(random.normal(0, 1, M)).astype(np.float32))
    info, codec = TensorInfo("w", (M, N), "BF16", "linear"), parse_spec(SPEC)
    parts, extra = codec.encode(bits, info, weighting)
    integers = codec.integers(parts, extra, info)
    outline = codec.integers(parts, extra, info, outline=True)
    assert integers is not None and outline is not None
    nbytes = sum(len(p) for p in parts.values())
    return integers, nbytes, codec.decode(parts, extra, info), outline


class Turns:
    """Products of copies of a matrix, each call with the next one."""

    def __init__(self, matrix: CodedMatrix, x: Array) -> None:
        self.x, self.y = x, np.empty((len(x), matrix.shape[0]), np.uint16)
        count = COPIES_NBYTES // matrix.nbytes + 1
        arrays = [{k: a.copy() for k, a in matrix.arrays.items()} for _ in range(count)]
        self.copies = cycle([matrix, *map(CodedMatrix.from_arrays, arrays)])

    def __call__(self, batch: int = 1, threads: int = 1) -> None:
        x, y = self.x.ctypes.data, self.y.ctypes.data
        next(self.copies).matmul(x, "BF16", y, batch, threads)


def linear(copies: Iterator[torch.Tensor], x: torch.Tensor, threads: int = 1) -> None:
    torch.set_num_threads(threads)
    torch.nn.functional.linear(x, next(copies))


def exactness(matrix: CodedMatrix, bits: Array, x: Array) -> Iterator[Row]:
    weights = np.empty((M, N), np.uint16)
    matrix.rows(0, M, weights)
    same = float(np.array_equal(weights, bits))
    yield Row("weights are those of decompress, bit for bit", same, "1 = yes", 1.0, ">=")
    exact, inputs = to_float32(bits, "BF16"), to_float32(x, "BF16")
    y, size = np.empty((1, M), np.float64), np.empty((1, M), np.float64)
    for first in range(0, M, 512):
        part = exact[first : first + 512].astype(np.float64).T
        y[:, first : first + 512] = inputs[:1].astype(np.float64) @ part
        size[:, first : first + 512] = np.abs(inputs[:1]).astype(np.float64) @ np.abs(part)
    ours = matrix.apply(inputs[:1])
    rounded = np.empty((1, M), np.uint16)
    matrix.matmul(x.ctypes.data, "BF16", rounded.ctypes.data, 1, 2)
    for name, values, bar in (
        ("float32", ours, 2.0**-22),
        ("bf16, beside its rounding", to_float32(rounded, "BF16"), 2.0**-22),
    ):
        half_ulp = 2.0**-8 * np.abs(y) if values is not ours else 0
        error = np.maximum(np.abs(values - y) - half_ulp, 0) / size
        title = f"product, {name}: greatest error against float64"
        yield Row(title, float(error.max()), "of sum |w x|", bar)


def sizes(matrix: CodedMatrix, outline: Integers, nbytes: int) -> Iterator[Row]:
    note = f"{matrix.nbytes:,} bytes, {8 * matrix.nbytes / (M * N):.3f} bits"
    yield Row("resident bytes against bf16", matrix.nbytes / (2 * M * N), "ratio", 0.2, note=note)
    note = f"{nbytes:,} bytes, {8 * nbytes / (M * N):.3f} bits"
    yield Row("resident bytes against the file's", matrix.nbytes / nbytes, "ratio", 1.03, note=note)
    expected = CodedMatrix.expected_nbytes(outline, nbytes)
    assert expected is not None
    off = abs(expected / matrix.nbytes - 1)
    yield Row("resident bytes: off the estimate before decoding", off, "ratio", 0.03)


def speeds(matrix: CodedMatrix, bits: Array, x: Array, rounds: int) -> Iterator[Row]:
    first = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    weights = cycle([first, *(first.clone() for _ in range(2))])
    inputs = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    ours = Turns(matrix, x)
    isas = native._core.simd_available() if native._core else []
    calls: dict[str, Callable[[], Any]] = {}
    for threads in (1, 2):
        calls[f"torch {threads}"] = partial(linear, weights, inputs[:1], threads)
        calls[f"ours {threads}"] = partial(ours, 1, threads)
    for batch in (4, 16):
        calls[f"torch x{batch}"] = partial(linear, weights, inputs[:batch])
        calls[f"ours x{batch}"] = partial(ours, batch)
    took = interleaved(calls, rounds)
    for threads in (1, 2):
        mine, theirs = took[f"ours {threads}"], took[f"torch {threads}"]
        note = f"{1e3 * mine:.2f} ms against {1e3 * theirs:.2f}"
        name = "one thread" if threads == 1 else "two threads"
        bar = 0.8 if threads == 1 else None
        yield Row(f"product, {name}: speed against torch bf16", theirs / mine, "times", bar, ">=", note)  # fmt: skip
    for batch in (4, 16):
        mine, theirs = took[f"ours x{batch}"], took[f"torch x{batch}"]
        note = f"{1e3 * mine:.2f} ms against {1e3 * theirs:.2f}"
        yield Row(f"product, batch {batch}: speed against torch bf16", theirs / mine, "times", note=note)  # fmt: skip
    slower = {isa: forced(isa, ours) for isa in isas[:-1]}
    for isa, mine in interleaved(slower, max(1, rounds // 8)).items():
        note = f"{1e3 * mine:.2f} ms"
        yield Row(f"product, {isa}: speed against torch bf16", took["torch 1"] / mine, "times", note=note)  # fmt: skip


def making(integers: Integers, matrix: CodedMatrix, rounds: int) -> Iterator[Row]:
    took = seconds(lambda: CodedMatrix.build(integers, "BF16", 1), repeat=rounds)
    yield Row("build, one thread", M * N / took / 1e6, "Mweights/s", 100, ">=")
    os.environ["WATERFILL_THREADS"] = "1"
    out = np.zeros((1024, N), np.uint16)
    took = seconds(lambda: matrix.rows(1024, 2048, out), repeat=rounds)
    yield Row("rows 1024 to 2048 as bf16, one thread", out.size / took / 1e6, "Mweights/s")
    del os.environ["WATERFILL_THREADS"]


def rows(quick: bool) -> Iterator[Row]:
    """All figures."""
    integers, nbytes, bits, outline = tensor()
    matrix = CodedMatrix.build(integers, "BF16")
    assert matrix is not None
    x = from_float32(np.random.default_rng(1).standard_normal((16, N), np.float32), "BF16")
    yield from sizes(matrix, outline, nbytes)
    yield from exactness(matrix, bits, x)
    yield from speeds(matrix, bits, x, 15 if quick else 61)
    yield from making(integers, matrix, 1 if quick else 5)


if __name__ == "__main__":
    main("matvec_coded", PROTOCOL, rows)
