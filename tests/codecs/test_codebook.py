"""Levels, tables and outliers of `codebook`, and the grid of `power`."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.codecs.power import power_levels
from waterfill.registry import parse_spec
from waterfill.types import FormatError, SpecError, TensorInfo, Weighting

INFO = TensorInfo("w", (48, 64), "F32", "linear")


def harm(text: str, matrix: np.ndarray, weighting: Weighting) -> float:
    chosen = parse_spec(text)
    parts, extra = chosen.encode(matrix, INFO, weighting)
    return weighting.distortion(matrix, chosen.decode(parts, extra, INFO))


@pytest.fixture
def matrix() -> np.ndarray:
    return (np.random.default_rng(0).standard_t(4, INFO.shape) * 0.02).astype(np.float32)


@pytest.mark.parametrize("table", ["tensor", "row"])
def test_few_distinct_weights_are_kept_as_they_are(table: str) -> None:
    matrix = np.random.default_rng(1).choice([-0.5, -0.125, 0.25, 0.75], INFO.shape)
    text = f"codebook:bits=2,table={table},solver=nearest"
    zero = Weighting().distortion(matrix, np.zeros_like(matrix))
    assert harm(text, matrix.astype(np.float32), Weighting()) < 1e-5 * zero


def test_weighted_levels_serve_the_inputs_that_matter(matrix: np.ndarray) -> None:
    weighting = Weighting(np.linspace(0.01, 1, 64).astype(np.float32) ** 4)
    base = "codebook:bits=2,table=row,solver=nearest"
    assert harm(base, matrix, weighting) < 0.9 * harm(f"{base},weighted=no", matrix, weighting)


def test_outliers_are_kept_to_eight_bits_and_spare_the_rest(matrix: np.ndarray) -> None:
    matrix[3, 7], matrix[40, 2] = 25.0, -17.0
    text = "codebook:bits=3,table=row,solver=nearest"
    chosen = parse_spec(f"{text},outliers=0.01")
    parts, extra = chosen.encode(matrix, INFO, Weighting())
    kept = chosen.decode(parts, extra, INFO)
    assert np.sum(np.abs(kept - matrix) <= np.abs(matrix) * 2.0**-8) >= int(0.01 * matrix.size)
    assert harm(f"{text},outliers=0.01", matrix, Weighting()) < 0.8 * harm(
        text, matrix, Weighting()
    )


def test_a_uniform_power_is_the_grid_of_integers(matrix: np.ndarray) -> None:
    assert (8 * power_levels(4, 1.0)).tolist() == list(range(-8, 8))
    assert np.allclose(np.abs(power_levels(3, 0.5)), np.square(np.arange(-4, 4) / 4))
    assert harm("power:bits=4,exponent=1.0", matrix, Weighting()) == pytest.approx(
        harm("integer:bits=4", matrix, Weighting()), rel=0.05
    )
    # Heavy tails: levels crowd about zero.
    searched = harm("power:group=64", matrix, Weighting())
    assert searched < 0.95 * harm("power:group=64,exponent=1.0", matrix, Weighting())


def test_levels_out_of_order_are_refused(matrix: np.ndarray) -> None:
    chosen = parse_spec("power:bits=3")
    parts, extra = chosen.encode(matrix, INFO, Weighting())
    parts["levels"] = parts["levels"][2:] + parts["levels"][:2]
    with pytest.raises(FormatError, match="not in order"):
        chosen.decode(parts, extra, INFO)


@pytest.mark.parametrize("text", ["power:bits=1", "power:exponent=0.05", "power:solver=x", "codebook:bits=7", "codebook:outliers=0.2", "codebook:table=group"])  # fmt: skip
def test_settings_out_of_range(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(text)
