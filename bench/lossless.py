"""Lossless coding against zipnn, zstandard and memcpy. ``python -m bench.lossless [--json FILE] [--quick]``"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import zipnn
import zstandard
from numpy.typing import NDArray

from bench.entropy import forced, interleaved, order0_bytes
from bench.harness import Row, main, shared_data
from waterfill.coding import lossless, native
from waterfill.sources import open_source
from waterfill.sources.safetensors_file import open_safetensors
from waterfill.types import Array, from_float32

PROTOCOL = (
    "one thread; medians of interleaved rounds, ratios of speeds in one run. Speed: bf16 weights of N(0, 0.02), "
    "256 MB (64 MB with --quick), in memory; against zipnn and zstandard both sides fill newly allocated memory, "
    "against memcpy both fill a buffer that is there; zipnn gets a fresh copy of its input each time, outside the "
    "clock, for it changes it. Size: streams of all tensors, heads included, against zipnn and zstandard -19 on the "
    "same bytes end to end, which is their better case"
)
Words = NDArray[np.uint16]
CAST = {"F16": "float16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
ZIPNN = {"BF16": "bfloat16", "F32": "float32", **CAST}


def gaussian(n: int) -> Words:
    """Weights as bf16 bits."""
    random = np.random.default_rng(0)
    out = np.empty(n, np.uint16)
    for first in range(0, n, 1 << 22):
        part = random.standard_normal(min(1 << 22, n - first), np.float32) * np.float32(0.02)
        out[first : first + part.size] = from_float32(part, "BF16")
    return out


def peer(dtype: str) -> zipnn.ZipNN:
    return zipnn.ZipNN(bytearray_dtype=ZIPNN[dtype], threads=1)


def exponents_and_rest(words: Words) -> float:
    """Bytes of exponents at their order-0 entropy, and sign and mantissa as they are."""
    return order0_bytes((words >> 7 & 255).astype(np.uint8)) + words.size


def speeds(quick: bool) -> Iterator[Row]:
    words = gaussian(1 << (25 if quick else 27))
    raw, nbytes = words.tobytes(), words.nbytes
    coded = lossless.encode(words, "BF16", threads=1)
    peer_coded = peer("BF16").compress(bytes(bytearray(raw)))
    yield Row("bf16: size of raw", len(coded) / nbytes, "ratio", 0.67)
    yield Row("bf16: size against zipnn's", len(coded) / len(peer_coded), "ratio", 1.0)
    bound = exponents_and_rest(words)
    yield Row("bf16: size against order-0 exponents and raw rest", len(coded) / bound, "ratio", 1.005)  # fmt: skip
    isas = native._core.simd_available() if native._core else []
    there, other = np.zeros_like(words), np.zeros_like(words)

    def decode_new() -> Words:
        out = np.empty_like(words)
        lossless.decode(coded, out, "BF16", threads=1)
        return out

    portable = lossless.encode(words, "BF16", "huffman", threads=1)

    def decode_portable() -> None:
        lossless.decode(portable, there, "BF16", threads=1)

    calls: dict[str, Callable[[], object]] = {
        "zipnn decode": lambda: peer("BF16").decompress(peer_coded),
        "memcpy": lambda: np.copyto(other, words),
    }
    for isa in isas:
        calls[f"{isa} new"] = forced(isa, decode_new)
        calls[f"{isa} there"] = forced(
            isa, partial(lossless.decode, coded, there, "BF16", threads=1)
        )
        calls[f"{isa} huffman"] = forced(isa, decode_portable)
    calls["two threads"] = partial(lossless.decode, coded, there, "BF16", threads=2)
    took = interleaved(calls, 3 if quick else 9)
    assert np.array_equal(there, words), "what was decoded is not what was encoded"
    gb = nbytes / 1e9
    bars = {"avx512": 2.5, "avx2": 1.3}
    for isa in isas:
        note = f"{gb / took[f'{isa} new']:.2f} GB/s against {gb / took['zipnn decode']:.2f}"
        ratio = took["zipnn decode"] / took[f"{isa} new"]
        yield Row(f"decode, {isa}: against zipnn", ratio, "times", bars.get(isa), ">=", note)
    for isa in isas:
        note = f"{gb / took[f'{isa} there']:.2f} GB/s against {gb / took['memcpy']:.2f}"
        bar = 0.35 if isa == "avx512" else None
        ratio = took["memcpy"] / took[f"{isa} there"]
        yield Row(f"decode, {isa}: against memcpy", ratio, "times", bar, ">=", note)
    ratio = took[f"{isas[-1]} there"] / took["two threads"]
    yield Row("decode: two threads against one", ratio, "times")
    yield Row("coder=huffman: size against coder=rans", len(portable) / len(coded), "ratio")
    for isa in isas:
        note = f"{gb / took[f'{isa} huffman']:.2f} GB/s into the same buffer"
        ratio = took[f"{isa} there"] / took[f"{isa} huffman"]
        yield Row(f"decode, {isa}: coder=huffman against coder=rans", ratio, "times", note=note)
    yield from encoding(words, raw, 3 if quick else 7)


def encoding(words: Words, raw: bytes, rounds: int) -> Iterator[Row]:
    copies = iter([bytes(bytearray(raw)) for _ in range(rounds + 1)])
    packer = zstandard.ZstdCompressor(level=3)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: lossless.encode(words, "BF16", threads=1),
        "zipnn": lambda: peer("BF16").compress(next(copies)),
        "zstd": lambda: packer.compress(raw),
    }
    took = interleaved(calls, rounds)
    gb = words.nbytes / 1e9
    for name, bar in (("zipnn", 1.5), ("zstd", 3.0)):
        note = f"{gb / took['ours']:.2f} GB/s against {gb / took[name]:.2f}"
        called = {"zstd": "zstandard -3"}.get(name, name)
        yield Row(f"encode: against {called}", took[name] / took["ours"], "times", bar, ">=", note)


def sizes(name: str, dtype: str, arrays: list[Array]) -> Iterator[Row]:
    raw = b"".join(a.tobytes() for a in arrays)
    ours = sum(len(lossless.encode(lossless.words_of(a), dtype, threads=1)) for a in arrays)
    packed = zstandard.ZstdCompressor(level=19).compress(raw)
    theirs = len(peer(dtype).compress(bytes(bytearray(raw))))
    yield Row(f"{name}: size of raw", ours / len(raw), "ratio", note=f"{len(raw):,} bytes")
    yield Row(f"{name}: size against zipnn's", ours / theirs, "ratio", 1.0)
    yield Row(f"{name}: size against zstandard -19's", ours / len(packed), "ratio", 1.0)
    if dtype == "BF16":
        bound = sum(exponents_and_rest(lossless.words_of(a)) for a in arrays)
        yield Row(f"{name}: size against order-0 exponents and raw rest", ours / bound, "ratio", 1.005)  # fmt: skip


def checkpoints() -> Iterator[tuple[str, str, list[Array]]]:
    """Every real checkpoint at hand: its tensors, repeats left out; and casts of one."""
    data = shared_data()
    for name in ("demo", "english-7m", "stories260K"):
        source = open_source("demo" if name == "demo" else str(data / "models" / name))
        tensors = [source.read(t) for t in source.tensors if t not in source.duplicates()]
        yield name, next(iter(source.tensors.values()))[0], tensors
    resnet = open_safetensors(data / "vision" / "resnet20.safetensors")
    floats = [resnet.read(n) for n, span in resnet.tensors.items() if span.dtype == "F32"]
    yield "resnet20", "F32", floats


def casts() -> Iterator[tuple[str, str, list[Array]]]:
    """Real bf16 weights and fresh Gaussian ones as other floats; fp8 scaled into its range."""
    import torch

    source = open_source(str(shared_data() / "models" / "english-7m"))
    words = [source.read(name).view(np.int16) for name in source.tensors]
    real = [torch.from_numpy(w).view(torch.bfloat16).float() for w in words]
    chance = [
        torch.from_numpy(np.random.default_rng(1).normal(0, 0.02, 1 << 22).astype(np.float32))
    ]
    for name, tensors in (("english-7m", real), ("Gaussian", chance)):
        for dtype, kind in CAST.items():
            scale = 64 if dtype.startswith("F8") else 1
            some = [(t * scale).to(getattr(torch, kind)) for t in tensors]
            bits = [t.contiguous().view(-1).view(torch.uint8).numpy() for t in some]
            width = some[0].element_size()
            yield f"{name} as {dtype}", dtype, [b.view(f"<u{width}") for b in bits]
        yield f"{name} as F32", "F32", [t.numpy() for t in tensors]


def run(quick: bool) -> Iterator[Row]:
    for name, dtype, arrays in [*checkpoints(), *casts()]:
        yield from sizes(name, dtype, arrays)
    yield from speeds(quick)


if __name__ == "__main__":
    main("lossless", PROTOCOL, run)
