"""Encoding against integers, decoding against zstandard. ``python -m bench.speed [--json FILE] [--quick]``"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import zstandard
from numpy.typing import NDArray

from bench.entropy import forced, interleaved
from bench.harness import Row, main
from waterfill.codecs.integer import Integer
from waterfill.codecs.trellis import Trellis
from waterfill.coding import native, paths
from waterfill.coding.sections import split
from waterfill.types import TensorInfo, Weighting

PROTOCOL = (
    "one 4096 x 4096 layer, bf16 Gaussian weights, S of random inputs with a wide spectrum, about 2.5 bits; encode "
    "= factor S, round, code, all cores, against integer:bits=4,group=128,solver=successive; decode = bytes to bf16 "
    "weights, one thread (unless said), against zstandard level 1 decompressing the same symbols as bytes; "
    "medians of interleaved rounds, ratios in one run"
)
SIZE = 4096
Bytes = NDArray[np.uint8]


def layer() -> tuple[NDArray[np.uint16], TensorInfo, Weighting]:
    """Weights as bf16 bits, and a second moment with a wide spectrum."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((SIZE, SIZE), np.float32) * np.float32(0.02)
    spread = np.exp(random.uniform(-3.5, 3.5, SIZE)).astype(np.float32)
    mixing = random.standard_normal((SIZE, SIZE), np.float32) / np.float32(SIZE**0.5)
    moment = (mixing * spread) @ mixing.T
    bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
    return bits, TensorInfo("layer", bits.shape, "BF16", "linear", ""), Weighting(moment)


def encoding(quick: bool) -> Iterator[Row]:
    bits, info, weighting = layer()
    peer = Integer(bits=4, group=128)
    ours = {f"trellis, {n} states": Trellis(states=n, step=0.4) for n in (4, 64, 256)}

    def encode(codec: Integer | Trellis) -> Callable[[], object]:
        def call() -> object:
            return codec.encode(bits, info, weighting)

        return call

    calls = {"integer": encode(peer)} | {name: encode(codec) for name, codec in ours.items()}
    took = interleaved(calls, 1 if quick else 3)
    default = f"trellis, {Trellis().states} states"
    for name in ours:
        bar = 2.0 if name == default else None
        note = f"{took[name]:.1f} s against {took['integer']:.1f} s"
        yield Row(
            f"encode, {name}: time against integers",
            took[name] / took["integer"],
            "times",
            bar,
            note=note,
        )
    yield Row("encode, default", SIZE * SIZE / took[default] / 1e6, "Mweights/s")


def coded() -> tuple[bytes, bytes, tuple[NDArray[np.float32], ...], int]:
    """A path of about 2.5 bits, the same symbols through zstandard, and what decoding needs."""
    bits, info, _ = layer()
    codec = Trellis(step=0.4)
    parts, _ = codec.encode(bits, info, Weighting(np.ones(SIZE, np.float32)))
    path = split(parts["codes"], 4)[3]
    ones = np.ones(SIZE, np.float32)
    octaves = (np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32))
    levels = paths.decode(path, codec.states, ones, ones, octaves)
    symbols = (np.sign(levels) * np.ceil(np.abs(levels) / 2) + 64).astype(np.uint8)
    packed = zstandard.ZstdCompressor(level=1).compress(symbols.tobytes())
    return path, packed, (ones, ones, *octaves), codec.states


def decoding(quick: bool) -> Iterator[Row]:
    path, packed, (step, scale, *octaves), states = coded()
    isas = native._core.simd_available() if native._core else []
    unpacker = zstandard.ZstdDecompressor()
    pair = (octaves[0], octaves[1])

    def decode(threads: int, bf16: bool = True) -> Callable[[], object]:
        return lambda: paths.decode(path, states, step, scale, pair, bf16=bf16, threads=threads)

    calls: dict[str, Callable[[], object]] = {"zstd": lambda: unpacker.decompress(packed)}
    calls |= {isa: forced(isa, decode(1)) for isa in isas}
    calls |= {"two threads": decode(2), "one thread": decode(1), "float32": decode(1, bf16=False)}
    took = interleaved(calls, 5 if quick else 21)
    n = SIZE * SIZE
    bars = {"avx512": 4.0, "avx2": 2.0}
    for isa in isas:
        note = f"{n / took[isa] / 1e9:.2f} G weights/s against {n / took['zstd'] / 1e9:.2f} G symbols/s"
        yield Row(
            f"decode to bf16, {isa}: against zstandard",
            took["zstd"] / took[isa],
            "times",
            bars.get(isa),
            ">=",
            note,
        )
    if "avx512" in isas:
        yield Row("decode to bf16, avx512", n / took["avx512"] / 1e9, "G weights/s", 0.6, ">=")
    else:
        yield Row("decode to bf16, avx512: no such machine", 0, "not measured")
    yield Row("decode to float32", n / took["float32"] / 1e9, "G weights/s")
    yield Row(
        "two threads against one", took["one thread"] / took["two threads"], "times", 1.7, ">="
    )
    yield Row("size against zstandard", len(path) / len(packed), "ratio")


def run(quick: bool) -> Iterator[Row]:
    """Decoding first: it is quick."""
    yield from decoding(quick)
    yield from encoding(quick)


if __name__ == "__main__":
    main("speed", PROTOCOL, run)
