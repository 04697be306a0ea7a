"""A codec inside another: there and back, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest

from waterfill import registry
from waterfill.coding.nested import decode_inner, encode_inner
from waterfill.registry import Codec, Inner, codec_ids, find_codec, parse_spec
from waterfill.runtime.arrays import unpack
from waterfill.testing import check_round_trip
from waterfill.types import Array, Encoded, FormatError, Spec, SpecError, TensorInfo, Weighting

INFO = TensorInfo("w", (6, 8), "BF16", "linear", transposed=True)
MATRIX = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)


@pytest.fixture
def odd() -> Iterator[None]:
    """A codec with a part that need not be there, and one that all rows share."""

    @registry.codec("odd")
    class _(Codec):
        parts: ClassVar[tuple[str, ...]] = ("rows", "table", "maybe")
        shared: ClassVar[tuple[str, ...]] = ("table",)
        lossy: ClassVar[bool] = False
        every: bool = False

        def encode(
            self, x: Array, info: TensorInfo, weighting: Weighting
        ) -> tuple[dict[str, bytes], dict[str, Any]]:
            found = {"rows": x.tobytes(), "table": b"table"}
            return ({**found, "maybe": b""} if self.every else found), {"of": info.dtype}

        def decode(
            self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
        ) -> Array:
            if (
                parts["table"] != b"table"
                or ("maybe" in parts) != self.every
                or extra != {"of": "F32"}
            ):
                raise FormatError("the parts of odd are not as it wrote them")
            return np.frombuffer(parts["rows"], "<f4").reshape(info.shape)

    yield
    registry._REGISTRY.pop("odd")


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize("text", ["odd", "odd:every=yes"])
def test_parts_go_where_they_belong(text: str) -> None:
    coded, decoded = encode_inner(Inner(text), MATRIX, INFO, Weighting())
    each, once, notes = coded
    assert decoded.tobytes() == MATRIX.tobytes() and once == b"table"
    assert each.endswith(MATRIX.tobytes()) and notes["version"] == 1
    assert ("absent" in notes) == (text == "odd")
    assert decode_inner(Inner(text), coded, INFO).tobytes() == MATRIX.tobytes()


@pytest.mark.parametrize(
    "notes",
    [
        {},
        {"version": 9},
        {"version": 0},
        {"version": "1"},
        {"version": True},
        {"version": 1, "extra": []},
        {"version": 1, "absent": "codes"},
        {"version": 1, "absent": ["codes"]},
        {"version": 1, "absent": [7]},
        {"version": 1, "absent": ["nothing"]},
    ],
)
def test_notes_that_lie_are_refused(notes: dict[str, Any]) -> None:
    inner = Inner("integer:bits=3")
    (each, once, _), _ = encode_inner(inner, MATRIX, INFO, Weighting())
    with pytest.raises((FormatError, KeyError)):
        decode_inner(inner, (each, once, notes), INFO)


def test_bytes_that_nobody_claims_are_refused() -> None:
    inner = Inner("integer:bits=3")
    (each, _, notes), _ = encode_inner(inner, MATRIX, INFO, Weighting())
    with pytest.raises(FormatError, match="claims"):
        decode_inner(inner, (each, b"more", notes), INFO)


@pytest.mark.parametrize("name", ["lowrank", "rotate"])
def test_between_is_where_the_codec_inside_goes(name: str) -> None:
    a, b = (parse_spec(f"{name}:inner=(trellis:step={step})") for step in (0.25, 1.0))
    assert a.between(b, 0.5) == parse_spec(f"{name}:inner=(trellis:step=0.5)")
    for other in (f"{name}:inner=integer", f"{name}:inner=raw"):
        assert a.between(parse_spec(other), 0.5) is None
    integers = [parse_spec(f"{name}:inner=(integer:bits={bits})") for bits in (3, 4)]
    assert integers[0].between(integers[1], 0.5) is None


def test_between_two_that_differ_in_more_there_is_nothing() -> None:
    a, b = (parse_spec(f"lowrank:inner=trellis,rank={rank}") for rank in (1, 2))
    assert a.between(b, 0.5) is None


def test_a_nest_without_end_is_refused() -> None:
    text = "integer"
    for _ in range(500):
        text = f"rotate:inner=({text})"
    encoded = Encoded(Spec("rotate", {"inner": text}), INFO, {"codes": b""}, {"version": 1})
    with pytest.raises(FormatError, match="w: more than 6 codecs"):
        unpack(encoded)
    for _ in range(8):  # each of these reads what is inside twice
        text = f"affine:inner=rotate:inner={text}"
    with pytest.raises(SpecError, match="more than 6 codecs"):
        parse_spec(text)


@pytest.mark.parametrize("name", codec_ids())
@pytest.mark.parametrize("around", ["lowrank:inner=({}),rank=2,rounds=1", "rotate:inner=({})"])
def test_any_codec_may_be_inside(name: str, around: str) -> None:
    random = np.random.default_rng(7)
    info = TensorInfo("w", (48, 32), "BF16", "linear")
    rungs = [str(rung) for rung in find_codec(name).ladder(TensorInfo("w", (48, 32), "F32"))]
    bits = info.unmatrix((random.standard_t(4, info.shape) * 0.02).astype(np.float32))
    inputs = random.standard_normal((99, 32)) * np.exp(random.uniform(-1, 1, 32))
    moment = (inputs.T @ inputs / 99).astype(np.float32)
    weighting = Weighting(moment, random.lognormal(0, 1, 48).astype(np.float32))
    for text in [name, *rungs[-1:]]:
        check_round_trip(parse_spec(around.format(text)), info, bits, weighting)
