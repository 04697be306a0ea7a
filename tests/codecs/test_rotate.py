"""What a rotation makes of weights with outliers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.coding.test_factors import layer
from waterfill.registry import Codec, parse_spec
from waterfill.types import SpecError, TensorInfo, Weighting

INFO = TensorInfo("w", (96, 80), "F32", "linear")
BITS, MOMENT, ROWS = layer(*INFO.shape)


def harm(chosen: Codec, bits: np.ndarray, weighting: Weighting) -> float:
    parts, extra = chosen.encode(bits, INFO, weighting)
    return weighting.distortion(bits, chosen.decode(parts, extra, INFO))


@pytest.mark.parametrize("form", ["matrix", "diagonal", "none"])
def test_outliers_are_spread(form: str) -> None:
    moment = {"matrix": MOMENT, "diagonal": MOMENT.diagonal().copy(), "none": None}[form]
    weighting = Weighting(moment, ROWS)
    bits = np.where(np.random.default_rng(3).random(BITS.shape) < 0.01, 20 * BITS, BITS)
    plain, rotated = parse_spec("integer:bits=3"), parse_spec("rotate:inner=(integer:bits=3)")
    assert harm(rotated, bits, weighting) < 0.8 * harm(plain, bits, weighting)


def test_the_seed_decides_the_signs_and_the_block_the_reach() -> None:
    weighting = Weighting(MOMENT, ROWS)
    coded = {
        options: parse_spec(f"rotate:{options}").encode(BITS, INFO, weighting)[0]["codes"]
        for options in ("seed=0", "seed=1", "block=2", "block=64")
    }
    assert len(set(coded.values())) == 3 and coded["seed=0"] == coded["block=64"]  # 80 columns


def test_what_the_codec_inside_shares_is_shared() -> None:
    weighting = Weighting(MOMENT, ROWS)
    inside = parse_spec("lowrank:rank=1,rounds=0")
    around = parse_spec("rotate:inner=(lowrank:rank=1,rounds=0)")
    parts, _ = around.encode(BITS, INFO, weighting)
    few = TensorInfo("w", (24, 80), "F32", "linear")
    fewer, _ = around.encode(BITS[:24], few, Weighting(MOMENT, ROWS[:24]))
    assert around.fair_rows == inside.fair_rows == 128
    assert abs(len(parts["shared"]) - len(fewer["shared"])) < 16 < len(parts["codes"]) / 3
    assert "shared" not in parse_spec("rotate").encode(BITS, INFO, weighting)[0]


@pytest.mark.parametrize("text", ["block=1", "block=100", "block=65536", "seed=-1", "inner=none"])
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(f"rotate:{text}")
