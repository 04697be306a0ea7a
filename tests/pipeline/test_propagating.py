"""The second encoding: the better file stays, at the size that was named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import waterfill
from tests import tiny
from tests.pipeline import small
from waterfill.calibrate import calibrate, missing
from waterfill.container import FILE_NAME, Reader
from waterfill.pipeline import propagating, remeasuring
from waterfill.sources import open_source
from waterfill.types import WaterfillError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of two blocks, and its statistics."""
    folder = tmp_path_factory.mktemp("two")
    with small.quiet():
        tiny.tiny_model("llama", folder / "model")
    texts = [tiny.write_text(folder)]
    calibrate(open_source(folder / "model"), folder / "stats", texts, tokens=2048, window=32)
    return folder / "model", folder / "stats"


def made(model: tuple[Path, Path], out: Path, **options: Any) -> Any:
    return waterfill.compress(model[0], out, calibration=model[1], force=True, **options)


def test_it_is_no_worse_and_of_the_size_named(model: tuple[Path, Path], tmp_path: Path) -> None:
    for bits in (3.5, 5.0):
        once = made(model, tmp_path / "once", bits=bits, propagate=False)
        twice = made(model, tmp_path / "twice", bits=bits)
        budget = twice.about["budget_nbytes"]
        assert budget - max(64, budget // 1000) <= twice.nbytes <= budget
        assert twice.nbytes == (tmp_path / "twice" / FILE_NAME).stat().st_size
        key = "kl_nats_calibration"
        assert twice.predicted[key] <= once.predicted[key]
        assert not list((tmp_path / "twice").glob("*.second"))
        with Reader(tmp_path / "twice" / FILE_NAME) as reader:
            for _ in reader.verify():
                pass


def test_the_same_twice(model: tuple[Path, Path], tmp_path: Path) -> None:
    made(model, tmp_path / "a", bits=4)
    made(model, tmp_path / "b", bits=4)
    small.same_files(tmp_path / "a", tmp_path / "b")


def test_a_worse_file_is_thrown_away(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(model, tmp_path / "once", bits=4, propagate=False)
    monkeypatch.setattr(
        missing.Pair,
        "guess",
        lambda self, ms: (-0.9 * np.eye(ms[0]().shape[1], dtype=np.float32), [1.0] * len(ms)),
    )
    made(model, tmp_path / "kept", bits=4)
    weights = [(tmp_path / name / FILE_NAME).read_bytes() for name in ("once", "kept")]
    assert weights[0] == weights[1]


def test_fine_tensors_are_left_alone(model: tuple[Path, Path], tmp_path: Path) -> None:
    made(model, tmp_path / "once", bits=12, propagate=False)
    made(model, tmp_path / "fine", bits=12)
    assert propagating.MOST_BITS < 12
    weights = [(tmp_path / name / FILE_NAME).read_bytes() for name in ("once", "fine")]
    assert weights[0] == weights[1]


def test_a_second_file_that_cannot_be_measured_leaves_no_trace(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(model, tmp_path / "once", bits=4, propagate=False)

    def fail(*_: Any) -> dict[str, float]:
        raise WaterfillError("no")

    monkeypatch.setattr(remeasuring, "remeasure", fail)
    record = made(model, tmp_path / "kept", bits=4)
    assert any("not encoded a second time" in warning for warning in record.about["warnings"])
    assert record.predicted["kl_nats_calibration"] > 0
    assert [p.name for p in (tmp_path / "kept").glob("*.second")] == []
    weights = [(tmp_path / name / FILE_NAME).read_bytes() for name in ("once", "kept")]
    assert weights[0] == weights[1]
