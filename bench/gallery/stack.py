"""BitStack's claims on real layers; then one artifact of english-7m, loaded at twenty sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from bench.gallery import Layer, at_equal_bytes, layers, ordering, total, versus
from bench.harness import Row
from bench.measure import Subject
from waterfill import evaluate
from waterfill.codecs.stack import Stack
from waterfill.runtime.sizing import open_at
from waterfill.runtime.torch_model import load_model
from waterfill.types import Array, Weighting

MODEL, WHOLE, SMALLEST, SIZES = "english-7m", 4_000_000, 1_250_000, 20
LADDER = [f"stack:blocks={blocks}" for blocks in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)]
INTEGERS = [f"integer:bits={bits},pack=coded" for bits in (2, 3, 4, 5)]
TRELLIS = [f"trellis:step={step}" for step in (1.0, 0.7, 0.5, 0.25, 0.12)]


def rows(quick: bool) -> Iterator[Row]:
    """Claims of the paper, then what the issue of size is about."""
    yield from claims(quick)
    yield from sizes(quick)


def claims(quick: bool) -> Iterator[Row]:
    """On single layers, the blocks alone."""
    chosen = layers()
    plain = "stack:blocks=3.0,sweeps=0"
    yield ordering("three blocks: columns scaled by their inputs <= as they are", *_scaled(chosen))
    yield ordering("one block <= a singular value decomposition of its bytes", *_factored(chosen))
    deep = "stack:blocks=3.0,sweeps=0,rank=16,precision=16"
    shallow = [f"{rung},sweeps=0" for rung in LADDER]
    yield at_equal_bytes("rank 16, 16 bits (the paper's) <= rank 1", deep, shallow, chosen)
    yield versus("three blocks, signs by descent <= signs of the residual",
                 "stack:blocks=3.0", plain, chosen)  # fmt: skip
    for blocks in (2.0, 3.0) if quick else (2.0, 3.0, 4.0):
        yield at_equal_bytes(f"{blocks:g} blocks <= integers at equal bytes",
                             f"stack:blocks={blocks}", INTEGERS, chosen)  # fmt: skip
        yield at_equal_bytes(f"{blocks:g} blocks <= trellis at equal bytes",
                             f"stack:blocks={blocks}", TRELLIS, chosen)  # fmt: skip


def _scaled(chosen: tuple[Layer, ...]) -> tuple[float, str]:
    """Harm of signs of the residual, over that of the same without the inputs' sizes."""
    codec = Stack(blocks=3.0, sweeps=0)
    _, nats = total(str(codec), chosen)
    blind = 0.0
    for layer in chosen:
        unaware = Weighting(None, layer.weighting.row_weights)
        parts, extra = codec.encode(layer.bits, layer.info, unaware)
        blind += _nats(layer, codec.decode(parts, extra, layer.info))
    return nats / blind, f"{nats:.3g} nats; {blind:.3g}"


def _factored(chosen: tuple[Layer, ...]) -> tuple[float, str]:
    """Harm of one block over that of factors of 16 bits in as many bytes, columns scaled alike."""
    nbytes, nats = total("stack:blocks=1.0,sweeps=0", chosen)
    other = 0.0
    for layer in chosen:
        matrix, moment = layer.info.matrix(layer.bits), layer.weighting.second_moment
        assert moment is not None
        scale = np.sqrt(moment if moment.ndim == 1 else moment.diagonal()) + 1e-6
        u, s, v = np.linalg.svd(matrix * scale, full_matrices=False)
        rank = round(
            nbytes * matrix.size / sum(x.info.size for x in chosen) / 2 / sum(matrix.shape)
        )
        low = (u[:, :rank] * s[:rank]) @ v[:rank] / scale
        other += layer.weighting.distortion(matrix, low.astype(np.float32))
    return nats / other, f"{nats:.3g} nats; {other:.3g}"


def _nats(layer: Layer, decoded: Array) -> float:
    info = layer.info
    return layer.weighting.distortion(info.matrix(layer.bits), info.matrix(decoded))


def sizes(quick: bool) -> Iterator[Row]:
    """One file of four megabytes, at twenty sizes down to a third of it."""
    subject = Subject(MODEL, 4096 if quick else 16384)
    # Encoded once, as the files it is compared with: what a second time gains is another question.
    options = {"codec": {"*": "stack"}, "propagate": False}
    whole = subject.planned("stack", size=WHOLE, **options)
    path = subject.artifact(size=WHOLE, **options)
    asked = [int(size) for size in np.geomspace(SMALLEST, whole.nbytes, SIZES)]
    short, over, kl = [], 0, []
    for size in asked:
        with open_at(path, size) as reader:
            short.append(1 - reader.nbytes / size)
            over += reader.nbytes > size
        model = load_model(path, size=size, dtype="float32")
        kl.append(evaluate.compare(subject.original, model, subject.windows)["kl_nats"])
    yield Row(f"{MODEL}: sizes over the one asked for", over, "of 20", 0)
    yield Row(f"{MODEL}: most below the one asked for", 100 * max(short), "%", 0.5)
    rises = sum(after >= before for before, after in itertools.pairwise(kl))
    yield Row(f"{MODEL}: larger sizes whose KL is no lower", rises, "of 19", 0)
    for i in (0, 6, 12, 19) if quick else range(SIZES):
        yield Row(f"{MODEL}: KL at {asked[i]:,} bytes", kl[i], "nats")
    for i in (6, 19) if quick else (0, 6, 12, 19):
        other = subject.planned("trellis", size=asked[i], propagate=False)
        note = f"{8 * asked[i] / subject.params:.2f} bits; trellis {other.kl_nats:.4g} nats"
        name = f"{MODEL}: KL over that of trellis at {asked[i]:,} bytes"
        yield Row(name, kl[i] / other.kl_nats, "ratio", note=note)
