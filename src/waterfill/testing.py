"""Checks that every codec must pass; call them from your own tests.

>>> from waterfill.testing import check_codec
>>> check_codec(MyCodec())                                   # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping

import numpy as np

from waterfill.container import describe, payload_nbytes
from waterfill.registry import Codec, make_codec, parse_spec
from waterfill.types import (
    DTYPES,
    FLOAT_DTYPES,
    Array,
    Encoded,
    FormatError,
    Spec,
    TensorInfo,
    WaterfillError,
    Weighting,
    from_float32,
)

__all__ = [
    "check_codec",
    "check_corruption",
    "check_layers",
    "check_round_trip",
    "check_spec",
    "check_tunable",
    "samples",
]

SHAPES = ((16, 24), (1, 64), (64, 1), (7, 5), (33, 130), (130, 33), (0, 8), (8, 0), (12, 4, 3))


def samples(dtype: str = "BF16", seed: int = 0) -> Iterator[tuple[TensorInfo, Array, Weighting]]:
    """Tensors of awkward shapes and values, with a weighting that fits each."""
    random = np.random.default_rng(seed)
    for number, shape in enumerate(SHAPES):
        info = TensorInfo(
            f"t{number}", shape, dtype, "linear", transposed=number % 3 == 1 and len(shape) == 2
        )
        values = random.normal(0, 0.02, shape).astype(np.float32)
        if number == 3:
            values[:] = 0
        if number == 4:
            values[0, 0] = 1e4  # an outlier of the kind real checkpoints have
        yield info, _stored(values, dtype), _weighting(info, random, plain=number % 2 == 1)


def _stored(values: Array, dtype: str) -> Array:
    if dtype in FLOAT_DTYPES:
        return from_float32(values, dtype)
    if dtype == "BOOL":
        return values > 0
    return (values * 1000).astype(np.int64).astype(DTYPES[dtype])


def _weighting(info: TensorInfo, random: np.random.Generator, plain: bool) -> Weighting:
    m, n = info.matrix_shape
    if plain:
        return Weighting()
    inputs = random.normal(0, 1, (n + 8, n)) * random.lognormal(0, 1, n)
    moment = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    if n > 2:
        moment[1] = moment[:, 1] = 0  # an input that calibration never saw
    return Weighting(moment, random.lognormal(0, 1, m).astype(np.float32))


def check_spec(codec: Codec) -> None:
    """Specification -> JSON -> specification and -> string -> codec give back the same codec."""
    assert make_codec(Spec.from_json(json.loads(json.dumps(codec.spec.to_json())))) == codec
    assert parse_spec(str(codec.spec)) == codec == parse_spec(str(codec))


def check_round_trip(codec: Codec, info: TensorInfo, bits: Array, weighting: Weighting) -> Array:
    """Encode twice and decode: deterministic, honest size, right shape; returns the decoded bits."""
    before = bits.tobytes()
    parts, extra = codec.encode(bits, info, weighting)
    again, extra_again = codec.encode(bits, info, weighting)
    assert parts == again and extra == extra_again, "encoding must be deterministic"
    assert parts.keys() <= set(codec.names) <= set(codec.parts), (
        "the class attribute `parts` names what encode returns, `names` those of these settings"
    )
    assert before == bits.tobytes(), "encoding must not change its input"
    assert json.loads(json.dumps(extra)) == extra, "extra must be plain JSON"
    encoded = Encoded(codec.spec, info, parts, extra)
    assert payload_nbytes(describe(encoded, {})) == encoded.nbytes == sum(map(len, parts.values()))
    decoded = codec.decode(parts, extra, info)
    assert decoded.shape == info.shape and decoded.dtype == DTYPES[info.dtype]
    filled = np.zeros(info.shape, DTYPES[info.dtype])
    codec.decode_into(parts, extra, info, filled)
    assert filled.tobytes() == decoded.tobytes(), "decode_into must fill what decode returns"
    if codec.lossy:
        x, y = info.matrix(bits), info.matrix(decoded)
        assert np.isfinite(y).all()
        zero = weighting.distortion(x, np.zeros_like(x))
        # Coarse rungs may cost as much as dropping the tensor, never much more.
        assert weighting.distortion(x, y) <= 2 * zero + 1e-6
    else:
        assert decoded.tobytes() == np.ascontiguousarray(bits).tobytes()
    return decoded


def check_layers(codec: Codec, info: TensorInfo, bits: Array, weighting: Weighting) -> None:
    """What a codec says can be left out, can: every prefix decodes, and so do cuts between two."""
    parts, extra = codec.encode(bits, info, weighting)
    sizes = {name: len(part) for name, part in parts.items()}
    layers = codec.layers(sizes, extra, info)
    if layers is None:
        assert codec.truncate(sizes, extra, info, 0) == sizes, "nothing can be left out"
        return
    assert layers[-1][0] == sum(sizes.values()), "the last prefix is all there is"
    wanted = [nbytes for nbytes, _ in layers]
    for nbytes in [*wanted, *(sum(pair) // 2 for pair in itertools.pairwise(wanted))]:
        lengths = codec.truncate(sizes, extra, info, nbytes)
        assert sum(lengths.values()) <= nbytes
        kept = {name: parts[name][:length] for name, length in lengths.items()}
        decoded = codec.decode(kept, extra, info)
        assert decoded.shape == info.shape and decoded.dtype == DTYPES[info.dtype]
        again = codec.layers(dict(lengths), extra, info)
        assert again is not None and again[-1][0] == sum(lengths.values())


def check_tunable(codec: Codec, info: TensorInfo, bits: Array, weighting: Weighting) -> bool:
    """What tuning may change says what is decoded, before and after; whether there is any such."""
    parts, extra = codec.encode(bits, info, weighting)
    one = Encoded(codec.spec, info, parts, extra)
    tunable = codec.tunable(one)
    if tunable is None:
        return False
    assert codec.retuned(tunable, one) == parts, "what was not tuned must stay as it is"
    terms = [dataclasses.replace(t, codes=np.roll(t.codes, 1, 0)) for t in tunable.terms]
    for changed in (tunable, dataclasses.replace(tunable, terms=tuple(terms))):
        again = codec.retuned(changed, one)
        assert again.keys() == parts.keys(), "tuning must not change what parts there are"
        decoded = info.matrix(codec.decode(again, extra, info))
        expected = info.matrix(info.unmatrix(changed.values()))
        assert np.allclose(decoded, expected, rtol=2.0**-7, atol=1e-30)
    return True


def check_corruption(
    codec: Codec, info: TensorInfo, bits: Array, weighting: Weighting, seed: int = 0
) -> None:
    """Damaged parts are refused with FormatError or decode to the right shape; nothing else."""
    random = np.random.default_rng(seed)
    parts, extra = codec.encode(bits, info, weighting)
    for _ in range(60):
        damaged = dict(parts)
        name = list(parts)[random.integers(len(parts))]
        damaged[name] = _damage(parts[name], random)
        _refused_or_shaped(codec, damaged, dict(extra), info)


def _damage(data: bytes, random: np.random.Generator) -> bytes:
    if not data:
        return b"\x00"
    match random.integers(3):
        case 0:
            at = int(random.integers(len(data)))
            return data[:at] + bytes([data[at] ^ (1 << int(random.integers(8)))]) + data[at + 1 :]
        case 1:
            return data[: int(random.integers(len(data)))]
        case _:
            return data + random.bytes(3)


def _refused_or_shaped(
    codec: Codec, parts: Mapping[str, bytes], extra: Mapping[str, object], info: TensorInfo
) -> None:
    filled = np.zeros(info.shape, DTYPES[info.dtype])
    try:
        decoded = codec.decode(parts, extra, info)
    except FormatError:
        try:
            codec.decode_into(parts, extra, info, filled)
        except FormatError:
            return
        raise AssertionError("decode_into must refuse what decode refuses") from None
    assert decoded.shape == info.shape
    codec.decode_into(parts, extra, info, filled)
    assert filled.tobytes() == decoded.tobytes(), "decode_into must fill what decode returns"


def check_codec(codec: Codec, dtypes: tuple[str, ...] = ("BF16", "F16", "F32")) -> None:
    """Everything a codec must do, on awkward tensors; AssertionError names what it did not."""
    check_spec(codec)
    for dtype in dtypes:
        for info, bits, weighting in samples(dtype):
            check_round_trip(codec, info, bits, weighting)
    for info, bits, weighting in samples(dtypes[-1]):
        check_tunable(codec, info, bits, weighting)
        check_layers(codec, info, bits, weighting)
    info, bits, weighting = next(samples(dtypes[0]))
    check_corruption(codec, info, bits, weighting)
    if codec.lossy:
        bad = info.matrix(bits)
        bad[0, 0] = np.nan
        try:
            codec.encode(info.unmatrix(bad), info, weighting)
        except WaterfillError:
            return
        raise AssertionError("a NaN among the weights must be refused")
