"""What `--keep` and `--codec` leave to the planner."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from waterfill.plan.price import Rules, price
from waterfill.registry import Codec, find_codec, parse_spec
from waterfill.types import SpecError, TensorInfo, Weighting

MATRIX = TensorInfo("a.weight", (64, 64), "BF16")


def candidates(text: str, info: TensorInfo = MATRIX) -> tuple[list[Codec], str]:
    return Rules(codecs=(("*", text),)).candidates(info, weighted=True)


def test_an_id_alone_is_its_whole_ladder() -> None:
    assert candidates("trellis") == (
        list(find_codec("trellis").ladder(MATRIX)),
        "",
    )


def test_options_hold_for_every_rung() -> None:
    rungs, why = candidates("trellis:states=1")
    assert not why
    ladder = find_codec("trellis").ladder(MATRIX)
    assert rungs == [dataclasses.replace(r, states=1) for r in ladder]
    assert [r.spec.config["group"] for r in candidates("integer:group=64")[0]] == [64] * 5


def test_an_option_that_the_ladder_varies_pins_the_codec() -> None:
    for text in ("trellis:step=0.25,states=1", "integer:bits=3,group=64"):
        assert candidates(text) == ([parse_spec(text)], "set by --codec")


def test_what_a_codec_cannot_take_stays_free() -> None:
    vector = TensorInfo("norm.weight", (64,), "BF16")
    rungs, why = candidates("trellis:states=1", vector)
    assert why == ""
    assert {r.id for r in rungs} == {"raw", "lossless"}


def test_options_are_checked() -> None:
    rules = Rules(codecs=(("*", "trellis:states=7"),))
    with pytest.raises(SpecError, match="states"):
        rules.check({"a.weight": MATRIX}, {"a.weight": True})


def test_a_sample_has_the_rows_that_a_codec_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors fitted to a few rows alone fit them too well, and their price would be too low."""
    monkeypatch.setattr("waterfill.plan.price.SAMPLE_WEIGHTS", 0)
    random = np.random.default_rng(0)
    bits = random.standard_normal((2400, 192)).astype(np.float32)
    info, weighting = TensorInfo("w", bits.shape, "F32", "linear"), Weighting()
    chosen = parse_spec("lowrank:inner=(integer:bits=2),rank=8,rounds=0")
    parts, extra = chosen.encode(bits, info, weighting)
    harm = weighting.distortion(bits, chosen.decode(parts, extra, info))
    (fair,) = price(bits, info, weighting, [chosen])
    assert fair.distortion_nats == pytest.approx(harm, rel=0.03)
    assert fair.nbytes == pytest.approx(sum(map(len, parts.values())), rel=0.01)
    monkeypatch.setattr(type(chosen), "fair_rows", 0)
    (few,) = price(bits, info, weighting, [chosen])
    assert few.distortion_nats < 0.93 * harm


def test_codecs_that_need_more_rows_are_priced_beside_those_that_do_not() -> None:
    random = np.random.default_rng(1)
    bits = random.standard_normal((2400, 2048)).astype(np.float32)
    info = TensorInfo("w", bits.shape[::-1], "F32", "linear", transposed=True)
    rows = random.lognormal(0, 1, 2400).astype(np.float32)
    rungs = [parse_spec("integer:bits=4"), parse_spec("rotate:inner=(lowrank:rank=1,rounds=0)")]
    assert [rung.fair_rows for rung in rungs] == [0, 128]
    points = price(np.ascontiguousarray(bits.T), info, Weighting(None, rows), rungs)
    assert [point.spec for point in points] == [rung.spec for rung in rungs]
    assert points[0].nbytes / bits.size == pytest.approx(4.125 / 8)


def test_layers_of_one_encoding_cost_what_each_would_alone() -> None:
    random = np.random.default_rng(3)
    info = TensorInfo("w", (1100, 512), "F32", "linear")  # more rows than are sampled
    inputs = random.normal(size=(900, 512)) * np.linspace(0.2, 2, 512)
    weighting = Weighting((inputs.T @ inputs / 900).astype(np.float32), np.ones(1100, np.float32))
    bits = random.normal(size=info.shape).astype(np.float32)
    rungs = [parse_spec(f"stack:blocks={blocks}") for blocks in (1.0, 1.5, 2.0, 3.0)]
    together = price(bits, info, weighting, rungs)
    for rung, point in zip(rungs, together, strict=True):
        (alone,) = price(bits, info, weighting, [rung])
        assert (point.spec, point.nbytes) == (alone.spec, alone.nbytes)
        assert point.distortion_nats == pytest.approx(alone.distortion_nats, rel=1e-3)
