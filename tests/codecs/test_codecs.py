"""Every codec that can be found is put through the same checks, and its old bytes still decode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden.make_codecs import all_cases
from waterfill import registry
from waterfill.registry import (
    Codec,
    Inner,
    codec_ids,
    find_codec,
    make_codec,
    parse_spec,
    read_spec,
)
from waterfill.testing import check_codec, check_round_trip, samples
from waterfill.types import DTYPES, FormatError, Spec, SpecError, TensorInfo, Weighting

CASES = list(all_cases())


def _name(case: dict[str, Any]) -> str:
    codec = make_codec(Spec.from_json(case["codec"]))
    return f"{codec}, version {codec.version}" + (", example" if case.get("example") else "")


SETTINGS = sorted(
    {
        str(make_codec(spec))
        for case in CASES
        if (spec := Spec.from_json(case["codec"])).version == find_codec(spec.id).version
    }
)


def test_every_codec_has_a_setting_here() -> None:
    assert {s.partition(":")[0] for s in SETTINGS} == set(codec_ids())


@pytest.mark.parametrize("text", SETTINGS)
def test_conformance(text: str) -> None:
    check_codec(parse_spec(text))


@pytest.mark.parametrize("name", codec_ids())
def test_ladder_prices_from_cheap_to_dear(name: str) -> None:
    info, bits, weighting = next(samples("F32"))
    info = TensorInfo("w", (64, 96), "F32", "linear")
    random = np.random.default_rng(1)
    bits = random.normal(size=info.shape).astype(np.float32)
    weighting = Weighting(np.eye(96, dtype=np.float32))
    sizes, harms = [], []
    for rung in find_codec(name).ladder(info):
        decoded = check_round_trip(rung, info, bits, weighting)
        parts, _ = rung.encode(bits, info, weighting)
        sizes.append(sum(map(len, parts.values())))
        harms.append(weighting.distortion(bits, decoded))
    assert sizes == sorted(sizes)
    assert harms == sorted(harms, reverse=True)


@pytest.mark.parametrize("name", codec_ids())
def test_lossy_ladders_leave_small_and_exact_tensors_alone(name: str) -> None:
    cls = find_codec(name)
    for info in (TensorInfo("b", (300,), "F32"), TensorInfo("i", (32, 32), "I32")):
        assert not cls.lossy or not list(cls.ladder(info))


@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_lossless_keeps_every_bit(dtype: str, shape: tuple[int, ...], seed: int) -> None:
    info = TensorInfo("x", shape, dtype)
    raw = np.random.default_rng(seed).bytes(info.nbytes)
    if dtype == "BOOL":
        raw = bytes(b & 1 for b in raw)
    bits = np.frombuffer(raw, DTYPES[dtype]).reshape(shape)
    for name in ("raw", "lossless"):
        check_round_trip(find_codec(name)(), info, bits, Weighting())


def test_finer_steps_cost_more_and_harm_less_whatever_the_weighting() -> None:
    for info, bits, weighting in samples("F32"):
        if 0 in info.shape or info.size < 100:
            continue
        harms = []
        for step in (1.0, 0.25, 0.06):
            chosen = parse_spec(f"trellis:step={step}")
            harms.append(
                weighting.distortion(
                    info.matrix(bits), info.matrix(_back(chosen, info, bits, weighting))
                )
            )
        assert harms[2] <= harms[1] * 1.05 <= harms[0] * 1.2


def _back(chosen: Codec, info: TensorInfo, bits: np.ndarray, weighting: Weighting) -> np.ndarray:
    parts, extra = chosen.encode(bits, info, weighting)
    return chosen.decode(parts, extra, info)


def test_four_states_beat_one_at_equal_bytes() -> None:
    random = np.random.default_rng(5)
    info = TensorInfo("w", (2048, 64), "F32", "linear")
    bits = random.normal(size=info.shape).astype(np.float32)
    weighting = Weighting(np.eye(64, dtype=np.float32))
    results = {}
    for states, step in ((1, 0.25), (4, 0.155)):
        chosen = parse_spec(f"trellis:states={states},step={step}")
        parts, extra = chosen.encode(bits, info, weighting)
        harm = weighting.distortion(bits, chosen.decode(parts, extra, info))
        results[states] = (len(parts["codes"]), harm)
    bits_saved = 8 * (results[1][0] - results[4][0]) / info.size
    harm_saved = 0.5 * np.log2(results[1][1] / results[4][1])
    assert bits_saved + harm_saved > 0.1


@pytest.mark.parametrize(
    "text",
    ["nothing", "integer:bits=9", "integer:bits=x", "trellis:states=3", "trellis:step", "raw:x=1", "lossless:=", "trellis:gains=maybe"],
)  # fmt: skip
def test_bad_specifications_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(text)


@pytest.fixture
def wrap() -> Iterator[None]:
    """A codec, for as long as a test takes, that has another one inside."""

    @registry.codec("wrap")
    class _(Codec):
        inner: Inner = Inner("integer:bits=3")
        rank: int = 1

    yield
    registry._REGISTRY.pop("wrap")


@pytest.mark.usefixtures("wrap")
def test_a_codec_inside_another_is_read_to_its_closing_parenthesis() -> None:
    spec = read_spec("wrap:inner=(integer:bits=3,group=64),rank=2")
    assert spec.config == {"inner": "integer:bits=3,group=64", "rank": 2}
    assert parse_spec(str(make_codec(spec))) == parse_spec(str(make_codec(spec).spec))
    inner = make_codec(spec).spec.config["inner"]
    assert inner.codec == parse_spec("integer:bits=3,group=64")
    nested = parse_spec("wrap:inner=(wrap:inner=(integer:bits=3,group=8),rank=2)")
    assert parse_spec(str(nested.spec)) == nested
    assert make_codec(Spec.from_json(json.loads(json.dumps(nested.spec.to_json())))) == nested
    for wrong in (
        "wrap:inner=(integer",
        "wrap:inner=integer)",
        "wrap:inner=(nothing)",
        "wrap:inner=()",
    ):
        with pytest.raises(SpecError):
            parse_spec(wrong)


def test_a_newer_codec_version_is_refused() -> None:
    with pytest.raises(FormatError, match="upgrade"):
        make_codec(Spec("trellis", {}, 99))


def test_a_version_that_is_no_longer_read_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match=r"trellis version 1 cannot be read.*versions 2 to 2"):
        make_codec(Spec("trellis", {"states": 4}, 1))
    with pytest.raises(FormatError, match="raw version 0"):
        make_codec(Spec("raw", {}, 0))


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_golden_bytes_still_decode(case: dict[str, Any]) -> None:
    """Bytes written when the format was fixed, of every version that is still read."""
    chosen = make_codec(Spec.from_json(case["codec"]))
    info = TensorInfo("golden", tuple(case["shape"]), case["dtype"], "linear")
    parts = {k: bytes.fromhex(v) for k, v in case["parts"].items()}
    assert chosen.decode(parts, case["extra"], info).tobytes().hex() == case["decoded"]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    "text",
    ["integer:bits=3,group=32", "integer:bits=8", "trellis:step=0.3", "trellis:step=0.02,states=1"],
)
def test_integers_are_what_a_codec_decodes_to(text: str, dtype: str) -> None:
    codec = parse_spec(text)
    random = np.random.default_rng(5)
    values = (random.standard_t(4, (96, 80)) * 0.03).astype(np.float32)
    info = TensorInfo("w", values.shape, dtype, "linear")
    bits = info.unmatrix(values)
    weighting = Weighting(None, random.uniform(0.1, 4, 96).astype(np.float32))
    parts, extra = codec.encode(bits, info, weighting)
    found = codec.integers(parts, extra, info)
    assert found is not None and found.levels is not None
    assert np.array_equal(info.unmatrix(found.values()), codec.decode(parts, extra, info))
    outline = codec.integers(parts, extra, info, outline=True)
    assert outline is not None and outline.levels is None and outline.shape == values.shape
    measured = float(np.sqrt(np.mean(np.square(found.levels, dtype=np.float64))))
    expected = float(np.sqrt(np.mean(np.square(outline.spread, dtype=np.float64))))
    if text.startswith("trellis"):
        assert 0.8 < measured / expected < 1.25
    else:
        assert np.abs(found.levels).max() <= 2 ** (found.bits - 1)
