"""What is special to codebooks of vectors: what each part of the method buys, and hostile codebooks."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.coding.scales import encode_grid
from waterfill.coding.sections import join, split
from waterfill.registry import parse_spec
from waterfill.types import FormatError, TensorInfo, Weighting

INFO = TensorInfo("w", (192, 128), "F32", "linear")
PUBLISHED = "vector:bits=2.0,length=2,scaled=no,classes=1,passes=1,entropy=0.0"


def _layer() -> tuple[np.ndarray, Weighting]:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(400, 128)) @ random.normal(size=(128, 128)) / 11
    inputs *= random.lognormal(0, 1, 128)
    moment = (inputs.T @ inputs / 400).astype(np.float32)
    weights = random.normal(size=INFO.shape) * random.lognormal(0, 0.3, (192, 1))
    return weights.astype(np.float32), Weighting(
        moment, random.lognormal(0, 1, 192).astype(np.float32)
    )


def _measure(text: str) -> tuple[float, float]:
    """Bits a weight, and harm as if at two bits: 6.02 dB a bit."""
    codec, (weights, weighting) = parse_spec(text), _layer()
    parts, extra = codec.encode(weights, INFO, weighting)
    back = codec.decode(parts, extra, INFO)
    bits = 8 * sum(map(len, parts.values())) / weights.size
    return bits, weighting.distortion(weights, back) * 4 ** (bits - 2)


def test_errors_carried_on_beat_plain_k_means() -> None:
    assert _measure(PUBLISHED)[1] < 0.8 * _measure(f"{PUBLISHED},solver=nearest")[1]


def test_a_codebook_for_columns_of_most_energy_pays() -> None:
    assert _measure(PUBLISHED.replace("classes=1", "classes=2"))[1] < 0.95 * _measure(PUBLISHED)[1]


def test_classes_and_the_price_of_bits_pay_at_equal_bytes() -> None:
    published = _measure(PUBLISHED)
    scaled = _measure("vector:bits=2.0,length=2,classes=4,entropy=0.0")
    priced = _measure("vector:bits=2.0,length=2,classes=4")
    assert scaled[1] < 0.8 * published[1] and priced[1] < 0.9 * scaled[1]
    assert priced[0] == pytest.approx(2, abs=0.35)


def test_a_residual_codebook_takes_fewer_bytes_of_books() -> None:
    sizes = []
    for text in ("vector:bits=4.0,length=2,entropy=0.0,classes=1", "vector:bits=4.0,length=2,residual=0.5,classes=1"):  # fmt: skip
        codec, (weights, weighting) = parse_spec(text), _layer()
        parts, extra = codec.encode(weights, INFO, weighting)
        sizes.append(len(parts["books"]))
        zero = weighting.distortion(weights, np.zeros_like(weights))
        assert weighting.distortion(weights, codec.decode(parts, extra, INFO)) < 0.05 * zero
    assert sizes[1] < 0.5 * sizes[0]


def test_the_same_matrix_transposed_in_the_file_is_the_same_matrix() -> None:
    weights, weighting = _layer()
    turned = TensorInfo("w", (128, 192), "F32", "linear", transposed=True)
    codec = parse_spec("vector")
    assert codec.encode(weights, INFO, weighting) == codec.encode(
        np.ascontiguousarray(weights.T), turned, weighting
    )


def test_hostile_codebooks_and_indices_are_refused() -> None:
    codec, (weights, weighting) = parse_spec("vector:length=2,classes=2"), _layer()
    parts, extra = codec.encode(weights, INFO, weighting)
    columns, ids, sizes, entries = split(parts["books"], 4)

    def refused(match: str, **changed: bytes) -> None:
        with pytest.raises(FormatError, match=match):
            codec.decode({**parts, **changed}, extra, INFO)

    two = np.frombuffer(entries, "<f2").size // 2
    refused("codebooks", books=join([columns, ids, sizes, entries[:-2]]))
    refused(
        "codebooks", books=join([columns, ids, encode_grid(np.array([4096, 0, 4096, 0])), entries])
    )
    refused(
        "impossible",
        books=join([columns, ids, encode_grid(np.array([0, two, 0, 0])), entries]),
    )
    refused(
        "beyond a codebook",
        books=join([columns, ids, encode_grid(np.array([2, 0, two - 2, 0])), entries]),
    )
    refused("not finite", books=join([columns, ids, sizes, b"\0\x7c" + entries[2:]]))
    refused(
        "impossible",
        books=join([columns, encode_grid(np.where(np.arange(128) > 3, -1, 1)), sizes, entries]),
    )
    refused(
        "outside the grid",
        books=join([columns, encode_grid(np.where(np.arange(128) > 3, 64, 1)), sizes, entries]),
    )
    refused("no choice|section", codes=join([*split(parts["codes"], 4)[:3], b"\1"]))
