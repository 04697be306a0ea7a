"""Solvers and outliers of the integer codec, through its bytes."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.coding.outliers import decode_outliers
from waterfill.registry import parse_spec
from waterfill.types import Array, FormatError, SpecError, TensorInfo, Weighting

INFO = TensorInfo("w", (48, 160), "F32", "linear")


def layer() -> tuple[Array, Weighting]:
    random = np.random.default_rng(0)
    bits = random.standard_t(3, INFO.shape).astype(np.float32)
    inputs = random.normal(size=(500, 160)) @ random.normal(size=(160, 160))
    moment = (inputs.T @ inputs / 500).astype(np.float32)
    return bits, Weighting(moment, random.lognormal(0, 1, 48).astype(np.float32))


def harm(text: str) -> float:
    bits, weighting = layer()
    codec = parse_spec(text)
    parts, extra = codec.encode(bits, INFO, weighting)
    return weighting.distortion(bits, codec.decode(parts, extra, INFO))


def test_better_solvers_do_less_harm() -> None:
    pytest.importorskip("torch")
    nearest, successive, coordinate, adaround = (
        harm(f"integer:bits=3,group=32,solver={solver}")
        for solver in ("nearest", "successive", "coordinate", "adaround")
    )
    assert coordinate < 0.9 * successive < 0.9 * nearest
    assert adaround < 0.9 * successive


@pytest.mark.parametrize("solver", ["nearest", "successive", "coordinate"])
def test_outliers_are_few_exact_and_worth_it(solver: str) -> None:
    text = f"integer:bits=3,solver={solver}"
    bits, weighting = layer()
    codec = parse_spec(f"{text},outliers=0.02")
    parts, extra = codec.encode(bits, INFO, weighting)
    places, _ = decode_outliers(parts["outliers"], bits.size)
    assert 0 < len(places) <= 0.02 * bits.size
    decoded = codec.decode(parts, extra, INFO)
    error = np.abs(decoded - bits).reshape(-1)
    if solver == "nearest":
        assert (error[places] <= 2**-8 * np.abs(bits.reshape(-1)[places])).all()
    assert weighting.distortion(bits, decoded) < 0.8 * harm(text)


def test_kernels_are_not_told_of_integers_where_there_are_outliers() -> None:
    bits, weighting = layer()
    for text, there in (("integer", True), ("integer:outliers=0.01", False)):
        codec = parse_spec(text)
        parts, extra = codec.encode(bits, INFO, weighting)
        assert set(parts) == set(codec.names)
        for outline in (False, True):
            assert (codec.integers(parts, extra, INFO, outline) is not None) == there


def test_too_few_weights_for_an_outlier_have_none() -> None:
    parts, _ = parse_spec("integer:outliers=0.01").encode(
        np.ones((3, 4), np.float32), TensorInfo("w", (3, 4), "F32"), Weighting()
    )
    assert set(parts) == {"codes", "scales"}


def test_outliers_of_another_tensor_are_refused() -> None:
    bits, weighting = layer()
    codec = parse_spec("integer:outliers=0.01")
    parts, extra = codec.encode(bits, INFO, weighting)
    smaller = TensorInfo("w", (4, 160), "F32")
    few, _ = codec.encode(bits[:4], smaller, Weighting(weighting.second_moment))
    with pytest.raises(FormatError):
        codec.decode({**few, "outliers": parts["outliers"]}, extra, smaller)


@pytest.mark.parametrize("text", ["outliers=0.6", "outliers=-0.1", "solver=best"])
def test_what_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(f"integer:{text}")
