"""What is special to points of the pyramid: the rate asked for, what weights buy, hostile numbers."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.coding.sections import join, split
from waterfill.registry import parse_spec
from waterfill.testing import check_round_trip
from waterfill.types import FormatError, TensorInfo, Weighting

INFO = TensorInfo("w", (96, 120), "F32", "linear")


def _layer() -> tuple[np.ndarray, Weighting]:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(400, 120)) @ random.normal(size=(120, 120)) / 11
    inputs *= random.lognormal(0, 1, 120)
    moment = (inputs.T @ inputs / 400).astype(np.float32)
    weights = (random.standard_t(5, INFO.shape) * random.lognormal(0, 0.5, (96, 1))).astype(
        np.float32
    )
    return weights, Weighting(moment, random.lognormal(0, 1, 96).astype(np.float32))


def _measure(text: str) -> tuple[int, float]:
    codec, (weights, weighting) = parse_spec(text), _layer()
    parts, extra = codec.encode(weights, INFO, weighting)
    back = codec.decode(parts, extra, INFO)
    return sum(map(len, parts.values())), weighting.distortion(weights, back)


@pytest.mark.parametrize("bits", [1.0, 1.7, 2.5, 3.5])
def test_numbers_take_the_bits_asked_for(bits: float) -> None:
    codec, (weights, weighting) = parse_spec(f"pyramid:bits={bits}"), _layer()
    parts, _ = codec.encode(weights, INFO, weighting)
    assert 8 * len(parts["codes"]) / weights.size == pytest.approx(bits, rel=0.04)


def test_errors_carried_on_and_pulses_water_filled_help() -> None:
    plain = _measure("pyramid:even=yes,solver=nearest")
    carried = _measure("pyramid:even=yes")
    filled = _measure("pyramid")
    assert carried[1] < 0.7 * plain[1] and abs(carried[0] / plain[0] - 1) < 0.02
    # 6.02 dB a bit for what it takes more.
    more = 8 * (filled[0] - carried[0]) / (96 * 120)
    assert filled[1] * 4**more < carried[1]


def test_better_than_integers_at_no_more_bytes() -> None:
    points, integers = _measure("pyramid:bits=2.7"), _measure("integer:bits=3,group=64")
    assert points[0] <= integers[0] and points[1] < 0.7 * integers[1]


def test_rows_and_groups_of_zeros_come_back_as_zeros() -> None:
    weights, _ = _layer()
    weights[3], weights[:, 16:32] = 0, 0
    for text in ("pyramid", "pyramid:even=yes,bits=2.0"):
        codec = parse_spec(text)
        back = codec.decode(*codec.encode(weights, INFO, Weighting()), INFO)
        assert not back[3].any() and not back[:, 16:32].any() and back.any()


def test_between_two_rungs_lie_bytes_between_theirs() -> None:
    low, high = parse_spec("pyramid:bits=2.0"), parse_spec("pyramid:bits=3.0")
    sizes = [_measure(str(low.between(high, t)))[0] for t in (0.0, 0.3, 0.7, 1.0)]
    assert sizes == sorted(set(sizes))


def test_a_number_that_no_point_has_is_refused() -> None:
    codec, (weights, weighting) = parse_spec("pyramid:bits=2.0"), _layer()
    parts, extra = codec.encode(weights, INFO, weighting)
    whole, rest = split(parts["codes"], 2)
    hostile = {**parts, "codes": join([b"\xff" * len(whole), rest])}
    with pytest.raises(FormatError, match=r"beyond|padding"):
        codec.decode(hostile, extra, INFO)
    with pytest.raises(FormatError, match="pulses take"):
        codec.decode({**parts, "codes": join([whole + b"\0", rest])}, extra, INFO)


def test_levels_and_gains_that_lie_are_refused() -> None:
    codec, (weights, weighting) = parse_spec("pyramid:bits=2.0"), _layer()
    parts, extra = codec.encode(weights, INFO, weighting)
    other, _ = parse_spec("pyramid:bits=1.0").encode(weights, INFO, weighting)
    with pytest.raises(FormatError):
        codec.decode({**parts, "columns": other["columns"]}, extra, INFO)
    rows, rates, gains = split(parts["gains"], 3)
    with pytest.raises(FormatError):
        codec.decode({**parts, "gains": join([rows, rates, b""])}, extra, INFO)
    with pytest.raises(FormatError, match="outside"):
        # A constant: one gain for all, far above the largest.
        codec.decode({**parts, "gains": join([rows, rates, b"\x01\xa0\x8d\x06"])}, extra, INFO)
    assert len(gains) > 4


@pytest.mark.parametrize("size", [1e-20, 1e15, 1e30])
def test_one_weight_far_from_all_others(size: float) -> None:
    bits = np.zeros((33, 40), np.float32)
    bits[0, 1] = size
    check_round_trip(parse_spec("pyramid"), TensorInfo("w", bits.shape, "F32"), bits, Weighting())
