"""What `--keep` and `--codec` leave to the planner."""

from __future__ import annotations

import dataclasses

import pytest

from waterfill.plan.price import Rules
from waterfill.registry import Codec, find_codec, parse_spec
from waterfill.types import SpecError, TensorInfo

MATRIX = TensorInfo("a.weight", (64, 64), "BF16")


def candidates(text: str, info: TensorInfo = MATRIX) -> tuple[list[Codec], str]:
    return Rules(codecs=(("*", text),)).candidates(info, weighted=True)


def test_an_id_alone_is_its_whole_ladder() -> None:
    assert candidates("trellis") == (
        list(find_codec("trellis").ladder(MATRIX)),
        "codec set by --codec",
    )


def test_options_hold_for_every_rung() -> None:
    rungs, why = candidates("trellis:states=1")
    assert why == "codec set by --codec"
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
