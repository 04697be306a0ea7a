"""Matrices multiplied as they are stored. ``python -m bench.matvec [--json FILE] [--quick]``"""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.entropy import forced
from bench.harness import Row, main
from waterfill.coding import native
from waterfill.coding.packed import PackedMatrix
from waterfill.types import Floats, Integers

M, N, GROUP = 4096, 11008, 128
WARMUP = 20  # calls: as many as there are copies of the smallest matrix
COLD_NBYTES = (
    210_000_000  # of copies that take turns, so that each comes from memory and not from a cache
)
PROTOCOL = (
    f"y = W x, W {M} x {N}, bf16 in and out, batch 1 and one thread unless said; copies of W that take turns hold "
    f"over 200 MB, so that memory is measured and no cache; medians of interleaved rounds in CPU time of the one "
    "thread (two threads: wall clock), ratios in one run. Groups of 128 with a float16 scale, as torch's int4 has. "
    "Read bandwidth: 256 MB summed as int64 by numpy, or read by a loop of vectors, whichever is faster. Errors: "
    "relative, root of the sum of squares, against a float64 product; Gaussian activations"
)
MORE = ("bench.matvec_coded", "bench.transforms")  # each with rows(quick), where it exists
Call = Callable[[], object]


def turns(calls: dict[str, Call], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each call, taken in turns so that a slow spell of the machine hits all.

    Memory is slower when it is read for the first time after it was written: every copy has its turn
    before the clock runs.
    """
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def grouped(bits: int, m: int = M, n: int = N) -> Integers:
    """Uniform integers, a float16 scale for each row and group."""
    random = np.random.default_rng(bits)
    levels = random.integers(-(1 << bits - 1), 1 << bits - 1, (m, n), dtype=np.int8)
    rows = random.normal(0, 0.01, (m, -(-n // GROUP))).astype(np.float16).astype(np.float32)
    spread = np.full(n, 2.0**bits / 4, np.float32)
    return Integers(levels, np.ones(n, np.float32), rows, GROUP, 1, spread, bits)


def columnwise(m: int = M, n: int = N) -> Integers:
    """Gaussian integers of uneven columns, a step for each, as a trellis of some 2.2 bits leaves them."""
    random = np.random.default_rng(0)
    spread = (1.25 * 2 ** random.normal(0, 0.4, n)).astype(np.float32)
    levels = np.rint(random.standard_normal((m, n), np.float32) * spread).astype(np.int16)
    return Integers(levels, 0.02 / spread, np.ones((m, 1), np.float32), n, 1, spread)


def bits_of(packed: PackedMatrix) -> str:
    return f"{packed.nbytes * 8 / (M * N):.2f} bits a weight"


def copies(integers: Integers) -> list[PackedMatrix]:
    """Enough of them that none is still in a cache when its turn comes."""
    made: list[PackedMatrix] = []
    while not made or len(made) * made[0].nbytes < COLD_NBYTES:
        packed = PackedMatrix.build(integers, "BF16")
        assert packed is not None
        made.append(packed)
    return made


def multiplier(
    made: list[PackedMatrix], batch: int = 1, activations: Any = "int8", threads: int = 1
) -> Call:
    x, y = torch.randn(batch, N).bfloat16(), torch.empty(batch, M, dtype=torch.bfloat16)
    turn = itertools.cycle([packed.using(activations) for packed in made])

    def call() -> torch.Tensor:
        next(turn).matmul(x.data_ptr(), "BF16", y.data_ptr(), batch, threads)
        return x  # kept, as its address is

    return call


def torch_bf16(batch: int = 1) -> Call:
    x = torch.randn(batch, N).bfloat16()
    count = -(-COLD_NBYTES // (2 * M * N))
    turn = itertools.cycle([torch.randn(M, N, dtype=torch.bfloat16) for _ in range(count)])
    return lambda: torch.nn.functional.linear(x, next(turn))


def torch_int4(batch: int = 1) -> Call:
    x = torch.randn(batch, N).bfloat16()
    codes = torch.randint(0, 15, (M, N), dtype=torch.int32)
    count = -(-COLD_NBYTES // (M * N // 2))
    weights = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2) for _ in range(count)]
    scales = torch.randn(N // GROUP, M, 2, dtype=torch.bfloat16)
    turn = itertools.cycle(weights)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, next(turn), GROUP, scales)


def readers() -> tuple[int, dict[str, Call]]:
    memory = np.random.default_rng(0).integers(0, 255, 1 << 28, dtype=np.uint8)
    calls: dict[str, Call] = {"read numpy": memory.view(np.int64).sum}
    if native._core is not None:
        calls["read vectors"] = partial(native._core.packed_read, memory)
    return memory.nbytes, calls


def speeds(quick: bool) -> Iterator[Row]:
    isas = list(reversed(native._core.simd_available())) if native._core else []
    best = isas[0]
    widths = {bits: copies(grouped(bits)) for bits in (4, 3, 2, 8, 6, 5)}
    uneven = copies(columnwise())
    read_nbytes, calls = readers()
    calls |= {"torch bf16": torch_bf16(), "torch int4": torch_int4()}
    for isa in isas:
        calls |= {f"{isa} {bits}": forced(isa, multiplier(made)) for bits, made in widths.items()}
        calls[f"{isa} uneven"] = forced(isa, multiplier(uneven))
    calls["int16"] = multiplier(widths[4], activations="int16")
    took = turns(calls, 7 if quick else 25, time.thread_time)
    bandwidth = max(read_nbytes / took[name] / 1e9 for name in calls if name.startswith("read"))
    each = [f"{name} {read_nbytes / took[name] / 1e9:.1f}" for name in took if "read" in name]
    yield Row("read bandwidth", bandwidth, "GB/s", note=", ".join(each))
    yield Row("torch bf16 linear", took["torch bf16"] * 1e3, "ms")
    yield Row("torch int4, bf16 input", took["torch int4"] * 1e3, "ms")

    def share(key: str, made: list[PackedMatrix]) -> float:
        return made[0].nbytes / took[key] / 1e9 / bandwidth

    four = took[f"{best} 4"]
    note = f"{ms(four)}, {best}"
    yield Row("4 bits against torch int4", took["torch int4"] / four, "times", 1.4, ">=", note)
    yield Row("4 bits against torch bf16", took["torch bf16"] / four, "times", 6.0, ">=", note)
    for bits, bar in ((4, 0.7), (3, 0.6), (2, 0.65), (5, None), (6, None), (8, None)):
        ratio = share(f"{best} {bits}", widths[bits])
        note = f"{ms(took[f'{best} {bits}'])}, {bits_of(widths[bits][0])}"
        yield Row(f"{bits} bits: of read bandwidth", ratio, "ratio", bar, ">=", note)
    ratio = share(f"{best} uneven", uneven)
    note = f"{ms(took[f'{best} uneven'])}, {bits_of(uneven[0])}"
    yield Row("uneven columns: of read bandwidth", ratio, "ratio", note=note)
    ratio = took["torch bf16"] / took[f"{best} uneven"]
    yield Row("uneven columns against torch bf16", ratio, "times")
    for isa in isas[1:]:
        for bits in (4, 3, 2):
            bar = 0.85 if bits == 4 and isa == "avx2" and best == "avx512" else None
            took_here = took[f"{isa} {bits}"]
            ratio = took[f"{best} {bits}"] / took_here
            title = f"{bits} bits: {isa} against {best}"
            yield Row(title, ratio, "times", bar, ">=", ms(took_here))
    title = "4 bits: int16 activations against int8"
    yield Row(title, four / took["int16"], "times", note=ms(took["int16"]))
    yield from batches(widths[4], 5 if quick else 15)
    yield from rows_back(widths[4][0], uneven[0], 3 if quick else 7)


def batches(made: list[PackedMatrix], rounds: int) -> Iterator[Row]:
    sizes = (1, 2, 4, 8, 16)
    calls: dict[str, Call] = {f"ours {b}": multiplier(made, b) for b in sizes}
    calls |= {"bf16 4": torch_bf16(4), "bf16 16": torch_bf16(16)}
    calls |= {"int4 4": torch_int4(4), "int4 16": torch_int4(16)}
    took = turns(calls, rounds, time.thread_time)
    for b in sizes[1:]:
        ours = took[f"ours {b}"]
        yield Row(
            f"4 bits, batch {b}: time of batch 1", ours / took["ours 1"], "times", note=ms(ours)
        )
    for b in (4, 16):
        for peer in ("bf16", "int4"):
            theirs = took[f"{peer} {b}"]
            title = f"4 bits, batch {b}: against torch {peer}"
            yield Row(title, theirs / took[f"ours {b}"], "times", note=ms(theirs))
    cores = os.cpu_count() or 1
    if cores > 1:
        both = {"one": multiplier(made), "two": multiplier(made, threads=2)}
        took = turns(both, 3 * rounds, time.perf_counter)
        yield Row("4 bits: two threads against one", took["one"] / took["two"], "times", note="wall clock")  # fmt: skip


def rows_back(grouped: PackedMatrix, uneven: PackedMatrix, rounds: int) -> Iterator[Row]:
    """What prefill needs: weights as bf16, 256 rows at a time into one buffer."""
    tile, source, copy = (np.ones((256, N), np.uint16) for _ in range(3))
    os.environ["WATERFILL_THREADS"] = "1"

    def whole(packed: PackedMatrix) -> None:
        for first in range(0, M, 256):
            packed.rows(first, first + 256, tile)

    calls: dict[str, Call] = {
        "4 bits": partial(whole, grouped),
        "uneven columns": partial(whole, uneven),
        "copy": lambda: [np.copyto(copy, source) for _ in range(M // 256)],
    }
    took = turns(calls, rounds, time.thread_time)
    for name in ("4 bits", "uneven columns"):
        ratio = took["copy"] / took[name]
        note = f"{2 * M * N / took[name] / 1e9:.1f} GB/s of bf16"
        yield Row(f"{name}: rows to bf16 against a copy of bf16", ratio, "times", note=note)


def errors() -> Iterator[Row]:
    random = np.random.default_rng(9)
    x = random.normal(size=(8, N)).astype(np.float32)
    spiky = x.copy()
    spiky[:, random.random(N) < 0.01] *= 20
    rounded = torch.from_numpy(x).bfloat16().float().numpy()
    for name, integers in (("4 bits", grouped(4, 512)), ("uneven columns", columnwise(512))):
        weights = integers.values().astype(np.float64).T
        packed = PackedMatrix.build(integers, "BF16")
        assert packed is not None

        def error(y: Floats, x: Floats, weights: Any = weights) -> float:
            exact = x.astype(np.float64) @ weights
            return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))

        yield Row(f"{name}: error, int8 activations", error(packed.apply(x), x), "ratio", 0.01)
        fine = packed.using("int16")
        yield Row(f"{name}: error, int16 activations", error(fine.apply(x), x), "ratio", 1e-4)
        exact = (rounded.astype(np.float64) @ weights).astype(np.float32)
        yield Row(f"{name}: error, activations rounded to bf16", error(exact, x), "ratio")
        note = "1 % of the inputs 20 times larger"
        yield Row(f"{name}: error, int8, spiky", error(packed.apply(spiky), spiky), "ratio", note=note)  # fmt: skip
        yield Row(f"{name}: error, int16, spiky", error(fine.apply(spiky), spiky), "ratio", note=note)  # fmt: skip


def run(quick: bool) -> Iterator[Row]:
    torch.set_num_threads(1)
    yield from errors()
    yield from speeds(quick)
    for name in MORE:
        if importlib.util.find_spec(name):
            yield from importlib.import_module(name).rows(quick)


if __name__ == "__main__":
    main("matvec", PROTOCOL, run)
