"""Entropy decoding: speed against zstandard on the same symbols, size against the entropy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from bench.harness import Row, main, seconds
from waterfill.coding import entropy, huffman, native, rans
from waterfill.coding.models import quantise

PROTOCOL = (
    "one thread, medians of interleaved rounds, input in memory, output newly allocated by both; "
    "against zstandard level 1, decompression, on the same bytes; ratios of speeds in one run"
)
Bytes = NDArray[np.uint8]


def exponents(n: int) -> Bytes:
    """Exponents of weights rounded to bf16, Gaussian in groups of uneven scale: about 2.64 bits."""
    rng = np.random.default_rng(0)
    scale = 0.02 * np.exp(0.3 * rng.normal(0, 1, n // 128)).repeat(128)
    bits = (rng.normal(0, 1, n) * scale).astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) >> 23 & 255).astype(np.uint8)


def gaussian(n: int) -> Bytes:
    """Gaussian integers of about 2.17 bits, plus 15."""
    values = np.random.default_rng(1).normal(0, 1.06, n)
    return (np.clip(np.rint(values), -15, 15) + 15).astype(np.uint8)


def forced(simd: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with one implementation forced."""

    def run() -> Any:
        before = os.environ.get("WATERFILL_SIMD")
        os.environ["WATERFILL_SIMD"] = simd
        try:
            return call()
        finally:
            if before is None:
                del os.environ["WATERFILL_SIMD"]
            else:
                os.environ["WATERFILL_SIMD"] = before

    return run


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taken in turns so that a slow spell of the machine hits all."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeat=1, warmup=0))
    return {name: float(np.median(t)) for name, t in times.items()}


def order0_bytes(plane: Bytes) -> float:
    counts = np.bincount(plane, minlength=256)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / plane.size)).sum() / 8)


def one_plane(name: str, plane: Bytes, rounds: int) -> Iterator[Row]:
    n = plane.size
    isas = native._core.simd_available() if native._core else []
    coded = entropy.encode_bytes(plane)
    packed = zstandard.ZstdCompressor(level=1).compress(plane.tobytes())
    unpacker = zstandard.ZstdDecompressor()
    calls: dict[str, Callable[[], object]] = {"zstd": lambda: unpacker.decompress(packed)}
    for isa in isas:
        calls[isa] = forced(isa, lambda: entropy.decode_bytes(coded, n, threads=1))
    calls["encode"] = lambda: entropy.encode_bytes(plane, threads=1)
    took = interleaved(calls, rounds)
    best = isas[-1]
    speed = {key: n / value / 1e9 for key, value in took.items()}
    yield Row(
        f"{name}: decode, {best}, against zstandard", took["zstd"] / took[best], "times", 2.0, ">="
    )
    for isa in isas[:-1]:
        yield Row(f"{name}: decode, {isa}, against zstandard", took["zstd"] / took[isa], "times")
    for isa in isas:
        yield Row(
            f"{name}: decode, {isa}", speed[isa], "GB/s", note=f"{speed['zstd']:.2f} zstandard"
        )
    yield Row(f"{name}: encode", speed["encode"], "GB/s")
    entropy_nbytes = order0_bytes(plane)
    note = f"{8 * entropy_nbytes / n:.4f} bits, {n / 2**20:g} Mi symbols"
    yield Row(
        f"{name}: size against entropy", len(coded) / entropy_nbytes, "ratio", 1.003, note=note
    )
    yield Row(f"{name}: size against zstandard", len(coded) / len(packed), "ratio")


def huffman_plane(name: str, plane: Bytes, rounds: int) -> Iterator[Row]:
    n = plane.size
    coded = huffman.encode(plane)
    packed = zstandard.ZstdCompressor(level=1).compress(plane.tobytes())
    unpacker = zstandard.ZstdDecompressor()
    calls: dict[str, Callable[[], object]] = {"zstd": lambda: unpacker.decompress(packed)}
    for isa in native._core.simd_available() if native._core else []:
        calls[isa] = forced(isa, lambda: huffman.decode(coded, n, threads=1))
    calls["encode"] = lambda: huffman.encode(plane, threads=1)
    took = interleaved(calls, rounds)
    encoding, zstd = took.pop("encode"), took.pop("zstd")
    for isa, value in took.items():
        note = f"{n / value / 1e9:.2f} GB/s, {n / zstd / 1e9:.2f} zstandard"
        title = f"{name}: Huffman decode, {isa}, against zstandard"
        yield Row(title, zstd / value, "times", 2.0, ">=", note)
    yield Row(f"{name}: Huffman encode", n / encoding / 1e9, "GB/s")
    size = len(coded) / order0_bytes(plane)
    yield Row(f"{name}: Huffman size against entropy", size, "ratio", 1.05)


def classes(rounds: int) -> Iterator[Row]:
    rows, cols = 2048, 2048
    rng = np.random.default_rng(2)
    scale = 2.0 ** rng.normal(0, 0.8, cols)
    values = np.rint(rng.normal(0, 1, (rows, cols)) * scale).astype(np.int32)
    auto, alike = entropy.encode_ints(values), entropy.encode_ints(values, None)
    n = values.size
    calls: dict[str, Callable[[], object]] = {
        "auto": lambda: entropy.decode_ints(auto, rows, cols, threads=1),
        "alike": lambda: entropy.decode_ints(alike, rows, cols, threads=1),
        "encode": lambda: entropy.encode_ints(values, threads=1),
    }
    took = interleaved(calls, rounds)
    yield Row("classes: size against one class", len(auto) / len(alike), "ratio")
    yield Row("classes: decode to int32", n / took["auto"] / 1e9, "Gsymbols/s")
    yield Row("classes: decode of one class to int32", n / took["alike"] / 1e9, "Gsymbols/s")
    yield Row("classes: encode", n / took["encode"] / 1e9, "Gsymbols/s")


def agree(alphabet: int, n_classes: int) -> bool:
    """Whether all implementations write the same bytes, and read the symbols back from them."""
    paths = [*(native._core.simd_available() if native._core else []), "numpy"]
    rng = np.random.default_rng(alphabet + n_classes)
    ids = rng.integers(0, n_classes, 300).astype(np.uint8)
    table = quantise(rng.integers(1, 1000, (n_classes, alphabet)) ** 3)
    slots = np.stack([np.repeat(np.arange(alphabet), f) for f in table]).astype(np.uint8)
    symbols = slots[ids, rng.integers(0, 4096, (300, 300))]
    streams = {forced(path, lambda: rans.encode(symbols, ids, table, 128))() for path in paths}
    stream = streams.pop()
    return not streams and all(
        np.array_equal(forced(path, lambda: rans.decode(stream, 300, 300, ids, table))(), symbols)
        for path in paths
    )


def run(quick: bool) -> Iterator[Row]:
    n, rounds = 1 << 24, 9 if quick else 31
    yield from one_plane("exponents", exponents(n), rounds)
    yield from one_plane("Gaussian integers", gaussian(n), rounds)
    yield from huffman_plane("exponents", exponents(n), rounds)
    yield from huffman_plane("Gaussian integers", gaussian(n), rounds)
    yield from classes(rounds)
    same = all(agree(alphabet, n_classes) for alphabet in (16, 32, 200) for n_classes in (1, 6))
    yield Row("identical over instruction sets and numpy", float(same), "1 = yes", 1.0, ">=")


if __name__ == "__main__":
    main("entropy", PROTOCOL, run)
