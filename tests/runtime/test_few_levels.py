"""Small floats in memory: four bits a weight, whatever their levels, and the products of the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from waterfill.coding.codebook import CodebookMatrix  # noqa: E402
from waterfill.coding.packed import PackedMatrix  # noqa: E402
from waterfill.registry import parse_spec  # noqa: E402
from waterfill.runtime.residency import matrix_class  # noqa: E402
from waterfill.types import Integers, TensorInfo, Weighting  # noqa: E402

INFO = TensorInfo("w", (96, 128), "BF16", "linear")


def integers(text: str) -> tuple[Integers, Integers, Any]:
    chosen = parse_spec(text)
    values = np.random.default_rng(0).standard_t(4, INFO.shape) * 0.03
    bits = INFO.unmatrix(values.astype(np.float32))
    parts, extra = chosen.encode(bits, INFO, Weighting())
    found, outline = (chosen.integers(parts, extra, INFO, o) for o in (False, True))
    assert found is not None and outline is not None
    return found, outline, INFO.matrix(chosen.decode(parts, extra, INFO))


@pytest.mark.parametrize("split", ["ebits=2,mbits=1", "ebits=3,mbits=0", "ebits=1,mbits=2"])
def test_fp4_takes_four_bits_packed(split: str) -> None:
    found, outline, dense = integers(f"float:{split},search=clip")
    kind = matrix_class("packed", outline)
    assert kind is (PackedMatrix if "ebits=1" in split else CodebookMatrix)
    matrix = kind.build(found, "BF16")
    assert matrix.nbytes == kind.expected_nbytes(outline, 0) < 0.65 * INFO.size
    rows = np.empty(INFO.shape, np.float32)
    matrix.rows(0, len(rows), rows)
    assert np.array_equal(INFO.matrix(INFO.unmatrix(rows)), dense)


def test_more_levels_are_integers_of_more_bits() -> None:
    found, outline, _ = integers("float:mbits=2,search=clip")
    assert found.entries == 31 and matrix_class("packed", outline) is PackedMatrix
    assert matrix_class("packed", integers("integer:bits=8")[1]) is PackedMatrix


def test_a_model_of_small_floats_runs_packed(tmp_path: Path) -> None:
    from tests.pipeline import small
    from waterfill.pipeline import compress
    from waterfill.runtime.torch_model import load_model

    compress(
        str(small.model()), tmp_path / "out", bits=8,
        calibration=small.statistics(), codec={"*_proj.weight": "float:search=clip,group=32"},
    )  # fmt: skip
    ids = torch.arange(20, 40)[None]
    dense, packed = (
        load_model(tmp_path / "out", residency=form, dtype="float32")
        for form in ("dense", "packed")
    )
    with torch.no_grad():
        wanted, got = dense(input_ids=ids).logits, packed(input_ids=ids).logits
    held = packed.model.layers[0].mlp.up_proj.held.matrix
    assert isinstance(held, PackedMatrix)
    assert (wanted - got).abs().max() < 0.05 * wanted.abs().max()
