"""What a low-rank matrix makes of the errors of another codec."""

from __future__ import annotations

import numpy as np
import pytest

from tests.coding.test_factors import layer
from waterfill.coding.sections import join, split
from waterfill.registry import find_codec, parse_spec
from waterfill.types import FormatError, SpecError, TensorInfo, Weighting

INFO = TensorInfo("w", (96, 80), "F32", "linear")
BITS, MOMENT, ROWS = layer(*INFO.shape)
WEIGHTING = Weighting(MOMENT, ROWS)


def harm(text: str) -> tuple[int, float]:
    chosen = parse_spec(text)
    parts, extra = chosen.encode(BITS, INFO, WEIGHTING)
    return sum(map(len, parts.values())), WEIGHTING.distortion(
        BITS, chosen.decode(parts, extra, INFO)
    )


@pytest.mark.parametrize(
    "inner", ["integer:bits=2,solver=nearest", "integer:bits=3", "trellis:step=0.5"]
)
def test_the_more_the_metric_knows_the_less_is_left(inner: str) -> None:
    around = f"lowrank:inner=({inner}),rank=6,rounds=0"
    harms = [harm(inner)[1], *(harm(f"{around},method={m}")[1] for m in ("lorc", "eora", "harm"))]
    assert harms == sorted(harms, reverse=True)


def test_a_rank_more_is_less_harm_until_nothing_is_left() -> None:
    harms = [
        harm(f"lowrank:inner=(integer:bits=2),bits=8,rounds=0,rank={rank}")[1]
        for rank in (1, 4, 16, 80, 1024)
    ]
    assert harms == sorted(harms, reverse=True) and harms[3] < 1e-3 * harms[0]
    assert harms[3] == harms[4]


def test_rounds_are_kept_only_where_they_pay() -> None:
    inner = "integer:bits=2,solver=nearest,pack=coded"
    scores = []
    for rounds in (0, 1, 4):
        nbytes, nats = harm(f"lowrank:inner=({inner}),rank=4,rounds={rounds}")
        scores.append(np.log2(nats) + 16 * nbytes / BITS.size)
    assert scores[2] <= scores[1] <= scores[0] and scores[2] < scores[0] - 0.05


def test_errors_of_huge_and_tiny_weights_are_corrected() -> None:
    plain = parse_spec("lowrank:inner=(integer:bits=2),rank=4")
    for peak in (1e-30, 1e25):
        bits = (BITS * np.float32(peak)).astype(np.float32)
        parts, extra = plain.encode(bits, INFO, WEIGHTING)
        decoded = plain.decode(parts, extra, INFO) / np.float32(peak)
        assert WEIGHTING.distortion(BITS, decoded) < 1.2 * harm(str(plain))[1]


def test_factors_of_another_tensor_are_refused() -> None:
    chosen = parse_spec("lowrank:rank=2,bits=4")
    parts, extra = chosen.encode(BITS, INFO, WEIGHTING)
    scale, right, rest = split(parts["shared"], 3)
    for wrong, word in (
        ([scale[:-4], right, rest], "bytes of scales"),
        ([b"\0\0\xc0\x7f" + scale[4:], right, rest], "not finite"),
    ):
        with pytest.raises(FormatError, match=word):
            chosen.decode({**parts, "shared": join(wrong)}, extra, INFO)
    wide, extra = parse_spec("lowrank:rank=2,bits=8").encode(BITS, INFO, WEIGHTING)
    with pytest.raises(FormatError, match="more than 4 bits"):
        chosen.decode(wide, extra, INFO)


def test_the_ladder_spends_at_most_a_tenth_of_a_bit_on_factors() -> None:
    for shape, rank in (((64, 64), 1), ((704, 256), 4), ((4096, 4096), 8)):
        info = TensorInfo("w", shape, "BF16", "linear")
        assert {rung.rank for rung in find_codec("lowrank").ladder(info)} == {rank}


@pytest.mark.parametrize(
    "text", ["rank=0", "rank=1025", "bits=1", "bits=9", "rounds=-1", "method=svd", "inner=nothing"]
)
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(f"lowrank:{text}")
