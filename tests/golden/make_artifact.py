"""Write the golden artifacts that do not exist yet: every codec and option on tiny tensors.

python -m tests.golden.make_artifact

Existing files are never touched: they are what an old waterfill wrote, and must stay readable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from waterfill import load
from waterfill.coding.entropy import encode_ints
from waterfill.container import describe, write
from waterfill.registry import parse_spec
from waterfill.types import (
    DTYPES,
    FLOAT_DTYPES,
    Array,
    Encoded,
    Spec,
    TensorInfo,
    Weighting,
    from_float32,
)

FOLDER = Path(__file__).parent / "artifact"
DIGESTS = FOLDER / "digests.json"
ABOUT = {"waterfill": "0.1.0", "note": "golden"}


def save(path: Path, items: list[Encoded]) -> None:
    """Write coded tensors as a weights file."""
    described = [describe(e, {"why": "golden"}) for e in items]
    for entry, item in zip(described, items, strict=True):
        if item.info.index is not None:
            entry["index"] = item.info.index
    write(path, described, [e.parts.values() for e in items], ABOUT)


def weights(info: TensorInfo, random: np.random.Generator, scale: float = 0.02) -> Array:
    """Stored bits of a Gaussian tensor (of any bits, where it holds no floats)."""
    if info.dtype in FLOAT_DTYPES:
        return from_float32(random.normal(0, scale, info.shape).astype(np.float32), info.dtype)
    raw = random.bytes(info.nbytes) if info.dtype != "BOOL" else b"\0\1\1" * info.size
    return np.frombuffer(raw[: info.nbytes], DTYPES[info.dtype]).reshape(info.shape)


def code(text: str, info: TensorInfo, bits: Array, weighting: Weighting | None = None) -> Encoded:
    """One tensor through one codec."""
    chosen = parse_spec(text)
    parts, extra = chosen.encode(bits, info, weighting or Weighting())
    return Encoded(chosen.spec, info, parts, extra)


def exact(codec: str) -> Iterator[Encoded]:
    """Every dtype and some shapes without loss."""
    random = np.random.default_rng(1)
    for dtype in DTYPES:
        info = TensorInfo(f"{codec}.{dtype}", (5, 7), dtype)
        yield code(codec, info, weights(info, random))
    for number, shape in enumerate([(), (0,), (3, 0, 2), (1,), (2, 1, 3, 2)]):
        info = TensorInfo(f"shape.{number}", shape, "F32")
        yield code(codec, info, weights(info, random))


def planes() -> Iterator[Encoded]:
    """Byte planes as version 1 of the codec wrote them; its writer is gone, its file stays."""
    raise RuntimeError("lossless.safetensors is what version 1 wrote: bring it back from history")


def words() -> Iterator[Encoded]:
    """Every kind of stream, plane, field and coder of version 2."""
    yield from exact("lossless")
    random = np.random.default_rng(2)
    for dtype in ("BF16", "F16", "F32", "F64"):
        for coder in ("rans", "huffman"):
            info = TensorInfo(f"weights.{dtype}.{coder}", (40, 50), dtype)
            yield code(f"lossless:coder={coder}", info, weights(info, random))
    info = TensorInfo("escapes.rans", (40, 50), "BF16")
    bits = weights(info, random).copy()
    bits.reshape(-1)[random.choice(bits.size, 5, replace=False)] = (0, 0x7FC1, 0x8000, 0xFF80, 1)
    yield code("lossless:coder=rans", info, bits)
    info = TensorInfo("escapes.huffman", (40, 50), "BF16")
    yield code("lossless:coder=huffman", info, bits)
    info = TensorInfo("bf16 in f32", (30, 40), "F32")
    bf16 = from_float32(random.normal(0, 1, info.shape).astype(np.float32), "BF16")
    yield code("lossless", info, (bf16.astype(np.uint32) << 16).view(np.float32))
    info = TensorInfo("sparse", (60, 70), "BF16")
    kept = random.random(info.shape) < 0.3
    yield code("lossless", info, np.where(kept, weights(info, random), np.uint16(0)))
    info = TensorInfo("sparse, others alike", (999,), "I32")
    yield code("lossless", info, (random.random(999) < 0.1).astype(np.int32) * 7)
    info = TensorInfo("sparse, others random", (999,), "I64")
    chance = random.integers(-(2**62), 2**62, 999) * (random.random(999) < 0.2)
    yield code("lossless", info, chance.astype(np.int64))
    info = TensorInfo("repeats", (40, 40), "I64")
    yield code("lossless", info, np.tile(np.arange(40), (40, 1)))
    info = TensorInfo("nibbles", (3000,), "I32")
    nibbles = np.clip(random.normal(8, 1.5, (3000, 8)), 0, 15).astype(np.int64)
    yield code("lossless", info, (nibbles << 4 * np.arange(8)).sum(axis=1).astype(np.int32))
    info = TensorInfo("ones", (300,), "F32")
    yield code("lossless", info, from_float32(np.ones(300, np.float32), "F32"))


def moment(n: int, random: np.random.Generator) -> Array:
    """A second moment of correlated inputs of different energies."""
    inputs = random.normal(size=(n + 20, n)) * np.linspace(0.1, 3, n)
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def rounded(texts: list[str]) -> Iterator[Encoded]:
    """A lossy codec's options, on matrices of every float dtype, turned and with more axes."""
    random = np.random.default_rng(3)
    for number, text in enumerate(texts):
        dtype = ("BF16", "F16", "F32", "F64")[number % 4]
        turned = number % 3 == 1
        info = TensorInfo(f"{number}.{text}", (22, 18), dtype, "linear", transposed=turned)
        rows = random.lognormal(0, 1.5, 18 if turned else 22).astype(np.float32)
        m, n = info.matrix_shape
        weighting = Weighting(moment(n, random), rows[:m])
        yield code(text, info, weights(info, random), weighting)
    for shape in [(6,), (1, 33), (33, 1), (0, 4), (4, 0), (4, 3, 2, 2)]:
        info = TensorInfo(f"shape.{'x'.join(map(str, shape))}", shape, "BF16", "conv")
        yield code(texts[0], info, weights(info, random))
    info = TensorInfo("turned", (6, 2, 5), "F32", "conv", transposed=True)
    yield code(texts[0], info, weights(info, random))
    info = TensorInfo("zeros", (9, 9), "F16")
    yield code(texts[0], info, from_float32(np.zeros((9, 9), np.float32), "F16"))


INTEGERS = [f"integer:bits={b},group=8" for b in range(2, 9)]
INTEGERS += [f"integer:bits={b},group=16,pack=coded" for b in (2, 5, 8)]
OUTLIERS = [
    f"integer:bits=3,group=8,solver={solver},outliers={share}"
    for solver, share in (("nearest", 0.003), ("successive", 0.05), ("coordinate", 0.01))
]
INTEGERS += ["integer:solver=nearest", "integer:bits=3,group=8,damping=0.1,pack=coded"]
TRELLISES = ["trellis", "trellis:states=1", "trellis:step=2.0,rows=1.0", "trellis:rows=0.0"]
TRELLISES += ["trellis:gains=yes", "trellis:gains=yes,mmse=0.1,states=1", "trellis:step=0.01"]
TRELLISES += [f"trellis:states={s},step={t}" for s in (4, 8, 16, 32, 128, 256) for t in (0.4, 0.1)]


def paths() -> Iterator[Encoded]:
    """The trellis: its options and every number of states; segments, escapes, each precision."""
    yield from rounded(TRELLISES)
    random = np.random.default_rng(6)
    cases: dict[str, tuple[str, Array]] = {
        "segments": ("states=8,step=0.5", random.normal(size=(2100, 3))),
        "fine": ("states=4,step=2.5", random.normal(size=(1030, 512))),
        "outliers": ("states=16,step=0.3", random.standard_t(2, size=(70, 60))),
        "few": ("step=1.5", random.standard_t(1, size=(40, 9))),
        "far": ("states=1,step=0.001", np.where(random.random((9, 7)) < 0.1, 900, 0.01)),
        "scaled": ("states=32,step=0.7", random.normal(size=(90, 80)) * 2.0 ** random.integers(-9, 9, 80)),
        "shifted": ("states=4,step=0.7", 1e4 * random.normal(size=(80, 90)) * 2.0 ** random.integers(0, 9, (80, 1))),
        "constant": ("states=4", np.full((20, 30), 3.0)),
        "silence": ("states=8", np.zeros((300, 40))),
        "blocks": ("states=4,step=3.0", random.normal(size=(33_000, 2))),
        "cells": ("states=8,step=0.02", random.normal(size=(40, 30)) * 2.0 ** random.integers(-2, 3, 30)),
        "wide cells": ("states=16,step=0.0005", random.normal(size=(40, 30)) * 2.0 ** random.integers(-2, 3, 30)),
    }  # fmt: skip
    for name, (text, values) in cases.items():
        info = TensorInfo(name, values.shape, "F32", "linear")
        rows = np.where(np.arange(len(values)) % 2, 9, 1).astype(np.float32)
        weighting = Weighting(np.ones(values.shape[1], np.float32), rows)
        yield code(f"trellis:{text}", info, values.astype(np.float32), weighting)


def streams() -> Iterator[Encoded]:
    """Matrices of integers that need every part of the entropy coder; one scale for all."""
    random = np.random.default_rng(4)
    normal = random.normal(size=(30, 24))
    cases: dict[str, Array] = {
        "constant": np.full((3, 4), -70),
        "empty": np.zeros((0, 3)),
        "parametric": np.rint(normal * 3),
        "explicit": np.where(random.random((30, 24)) < 0.7, 50, 70),
        "wide": np.rint(20 + 20 * random.normal(size=(40, 40))),
        "escapes": np.rint(random.standard_cauchy((40, 50)) * 3),
        "ends": np.where(random.random((9, 9)) < 0.9, 0, [[127, -128, 5] * 3] * 9),
        "classes": np.rint(random.normal(size=(300, 6)) * 2.0 ** np.arange(6)),
        "silent columns": np.rint(random.normal(size=(200, 5)) * [0, 9, 0, 90, 9]),
        "many columns": np.rint(random.normal(size=(30, 300)) * np.where(np.arange(300) % 99, 0.5, 40)),
    }  # fmt: skip
    spec = parse_spec("integer:bits=8,group=1024,pack=coded").spec
    for name, values in cases.items():
        info = TensorInfo(name, values.shape, "F32", "linear")
        codes = encode_ints(values.clip(-128, 127).astype(np.int64))
        yield Encoded(spec, info, {"codes": codes, "scales": b"\0\x3c" * len(values)})


def shared() -> Iterator[Encoded]:
    """Slices of fused tensors, repeats, names that JSON has to escape."""
    random = np.random.default_rng(5)
    for index, text in enumerate(["trellis", "integer:group=8", "lossless"]):
        info = TensorInfo(f"experts[{index}]", (8, 12), "BF16", "expert", index=index)
        yield code(text, info, weights(info, random))
    first = TensorInfo('embed "näme" \n/€😀', (11, 6), "F16", "embedding")
    yield code("integer:bits=8,group=8", first, weights(first, random))
    again = TensorInfo("head", (11, 6), "F16", "embedding", group=first.name)
    yield Encoded(Spec("raw"), again, {})
    for index in range(3):
        info = TensorInfo(f"more[{index}]", (4,), "F32", index=index)
        yield code("raw", info, weights(info, random))


ARTIFACTS = {
    "raw": lambda: exact("raw"),
    "lossless": planes,
    "lossless_2": words,
    "integer": lambda: rounded(INTEGERS),
    "outliers": lambda: rounded(OUTLIERS),
    "trellis": paths,
    "streams": streams,
    "shared": shared,
    "empty": lambda: iter(()),
}


def digest(arrays: Mapping[str, Array]) -> str:
    """Of names, dtypes, shapes and bits."""
    state = hashlib.sha256()
    for name, array in arrays.items():
        state.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    return state.hexdigest()


def main() -> None:
    """Write whatever is missing."""
    digests = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    for name, items in ARTIFACTS.items():
        path = FOLDER / f"{name}.safetensors"
        if not path.exists():
            save(path, list(items()))
        digests.setdefault(name, digest(load(path)))
    DIGESTS.write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
