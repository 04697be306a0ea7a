"""Tuning: less harm, in the same bytes or fewer, and never a file the worse for it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import waterfill
from tests import tiny
from tests.pipeline import small
from waterfill.calibrate import calibrate, tuning
from waterfill.container import FILE_NAME, Reader
from waterfill.sources import open_source
from waterfill.types import SpecError

KEY = "kl_nats_calibration"


def statistics_of(folder: Path, architecture: str) -> tuple[Path, Path]:
    """A model of two blocks, and its statistics."""
    with small.quiet():
        tiny.tiny_model(architecture, folder / "model")
    texts = [tiny.write_text(folder)]
    calibrate(open_source(folder / "model"), folder / "stats", texts, tokens=2048, window=32)
    return folder / "model", folder / "stats"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return statistics_of(tmp_path_factory.mktemp("two"), "llama")


def made(model: tuple[Path, Path], out: Path, codec: str = "integer:bits=3", **options: Any) -> Any:
    options = {"tune": "pv", "tune_steps": 12, "propagate": False, "bits": 16, **options}
    return waterfill.compress(
        model[0], out, calibration=model[1], codec={"*": codec}, force=True, **options
    )


def specs(folder: Path) -> dict[str, Any]:
    with Reader(folder / FILE_NAME) as reader:
        for _ in reader.verify():
            pass
        return {name: (e.spec, e.info, set(e.parts)) for name, e in reader.entries.items()}


@pytest.mark.parametrize("codec", ["integer:bits=2,group=32", "integer:bits=3,pack=coded"])
def test_less_harm_in_the_same_bytes(model: tuple[Path, Path], tmp_path: Path, codec: str) -> None:
    plain = made(model, tmp_path / "plain", codec, tune=None)
    tuned = made(model, tmp_path / "tuned", codec, size=plain.nbytes + 400, bits=None)
    assert tuned.predicted[KEY] < 0.97 * plain.predicted[KEY]
    assert tuned.predicted["kl_nats_untuned"] == pytest.approx(plain.predicted[KEY])
    assert tuned.nbytes == (tmp_path / "tuned" / FILE_NAME).stat().st_size <= plain.nbytes + 400
    assert tuned.about["warnings"] == plain.about["warnings"]
    assert specs(tmp_path / "tuned") == specs(tmp_path / "plain")
    assert [f.name for f in (tmp_path / "tuned").iterdir() if FILE_NAME in f.name] == [FILE_NAME]
    small.check_ledger(tmp_path / "tuned", tuned, model[0])


def test_the_same_twice(model: tuple[Path, Path], tmp_path: Path) -> None:
    made(model, tmp_path / "a")
    made(model, tmp_path / "b")
    small.same_files(tmp_path / "a", tmp_path / "b")


def test_interrupted_and_gone_on(model: tuple[Path, Path], tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "tuning" and done == total // 2:
            raise KeyboardInterrupt

    made(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        made(model, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    steps: list[str] = []
    made(model, tmp_path / "out", progress=lambda stage, done, total: steps.append(stage))
    small.same_files(tmp_path / "out", tmp_path / "whole")
    assert steps.count("tuning") == 12
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "out"}


def test_a_worse_file_is_thrown_away(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(model, tmp_path / "plain", tune=None)
    monkeypatch.setattr(tuning, "Tuning", functools.partial(tuning.Tuning, rate=3.0))
    record = made(model, tmp_path / "kept")
    weights = [(tmp_path / name / FILE_NAME).read_bytes() for name in ("plain", "kept")]
    assert weights[0] == weights[1]
    assert any("not tuned" in line for line in record.about["warnings"])
    assert "kl_nats_untuned" not in record.predicted


def test_what_has_no_codes_is_left_and_said(model: tuple[Path, Path], tmp_path: Path) -> None:
    record = made(model, tmp_path / "path", "trellis", bits=4)
    assert any("no tensor has a codec" in line for line in record.about["warnings"])


def test_only_some_tensors_of_a_full_file(model: tuple[Path, Path], tmp_path: Path) -> None:
    codec = {"*": "trellis", "*mlp*": "integer:bits=2,group=32"}
    options = {"calibration": model[1], "codec": codec, "bits": 5, "propagate": False}
    plain = waterfill.compress(model[0], tmp_path / "plain", **options)
    tuned = waterfill.compress(model[0], tmp_path / "tuned", tune="pv", tune_steps=8, **options)
    budget = tuned.about["budget_nbytes"]
    assert budget - 64 <= plain.nbytes <= budget and budget - 64 <= tuned.nbytes <= budget
    before, after = (waterfill.load(tmp_path / name) for name in ("plain", "tuned"))
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    assert changed and all("mlp" in name for name in changed)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "mixtral", "gpt_oss", "bert"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    """Transposed weights, tied ones, experts in many tensors and in one, masked models."""
    model = statistics_of(tmp_path, architecture)
    record = made(model, tmp_path / "out")
    assert record.predicted[KEY] < record.predicted["kl_nats_untuned"]


def codes_of(folder: Path) -> dict[str, bytes]:
    with Reader(folder / FILE_NAME) as reader:
        return {n: reader.read(n).parts.get("codes", b"") for n in reader.entries}


def test_methods_differ_in_what_they_do_to_codes(model: tuple[Path, Path], tmp_path: Path) -> None:
    made(model, tmp_path / "plain", tune=None)
    plain = codes_of(tmp_path / "plain")
    found = {}
    for method in ("pv", "v", "ste"):
        record = made(model, tmp_path / method, tune=method, tune_steps=16)
        found[method] = codes_of(tmp_path / method)
        if method != "ste":
            assert record.predicted[KEY] < record.predicted["kl_nats_untuned"]
    assert found["v"] == plain != found["pv"]


@pytest.mark.parametrize(
    ("codec", "bits"),
    [("vector:bits=2.0,length=2", 6), ("codebook:bits=3,outliers=0.02,pack=coded", 9)],
)
def test_entropy_coded_codes(
    model: tuple[Path, Path], tmp_path: Path, codec: str, bits: float
) -> None:
    tuned = made(model, tmp_path / "out", codec, bits=bits, tune_steps=16)
    assert tuned.nbytes <= tuned.about["budget_nbytes"]
    assert tuned.predicted[KEY] < tuned.predicted["kl_nats_untuned"]


def test_misuse(model: tuple[Path, Path], tmp_path: Path) -> None:
    for options in ({"tune": "vp"}, {"tune_steps": 0}):
        with pytest.raises(SpecError, match="tune"):
            made(model, tmp_path / "out", **options)
    with pytest.raises(SpecError, match="tune"):
        waterfill.compress(model[0], tmp_path / "out", lossless=True, tune="pv")
