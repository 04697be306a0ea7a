"""All tensors of a file together, measured on a slice of the calibration text."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import waterfill  # noqa: E402
from tests import tiny  # noqa: E402
from tests.pipeline import small  # noqa: E402
from waterfill.calibrate import Statistics  # noqa: E402
from waterfill.container import FILE_NAME, Reader  # noqa: E402
from waterfill.pipeline import compare, record_of, remeasuring  # noqa: E402
from waterfill.sources import open_source  # noqa: E402
from waterfill.types import FormatError  # noqa: E402


def test_it_is_the_divergence_of_both_models_on_the_windows_kept() -> None:
    sample = Statistics.open(small.statistics()).sample
    assert sample is not None
    with torch.no_grad(), small.quiet():
        before = transformers.AutoModelForCausalLM.from_pretrained(small.model())
        after = waterfill.load_model(small.artifact(), dtype="float32")
        p, q = (
            m(input_ids=torch.from_numpy(sample)).logits.double().log_softmax(-1)
            for m in (before, after)
        )
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    predicted = record_of(small.artifact()).predicted
    assert predicted["kl_nats_calibration"] == pytest.approx(expected, rel=1e-3)
    assert predicted["tokens_calibration"] == sample.size
    assert 0.5 < predicted["kl_nats_calibration"] / predicted["kl_nats"] < 2


def test_evaluation_says_it_beside_the_sum(tmp_path: Path) -> None:
    shutil.copytree(small.artifact(), tmp_path / "copy")
    metrics = compare(tmp_path / "copy", small.model(), [small.text()], tokens=128)
    assert (
        metrics["calibration_kl_nats"]
        == record_of(tmp_path / "copy").predicted["kl_nats_calibration"]
    )


def test_slices_of_experts_are_read_from_the_file(tmp_path: Path) -> None:
    with small.quiet():
        tiny.tiny_model("mixtral", tmp_path / "model")
    source = open_source(tmp_path / "model")
    out = tmp_path / "out"
    record = waterfill.compress(
        tmp_path / "model",
        out,
        bits=9,
        calibration=[small.text()],
        tokens=256,
        codec={"*": "trellis"},
    )
    assert record.predicted["kl_nats_calibration"] > 0
    with Reader(out / FILE_NAME) as reader:
        decoded = remeasuring.Decoded(reader, source)
        whole = waterfill.load(out)
        assert decoded.fingerprint() == source.fingerprint()
        for name, (_, shape) in source.tensors.items():
            assert np.array_equal(decoded.read(name), whole[name])
            if len(shape) == 3:
                assert np.array_equal(decoded.read_slice(name, 1), whole[name][1])


def test_without_windows_there_is_nothing_to_say(tmp_path: Path) -> None:
    shutil.copytree(small.statistics(), tmp_path / "statistics")
    (tmp_path / "statistics" / "sample.safetensors").unlink()
    record = waterfill.compress(
        small.model(), tmp_path / "out", bits=4.5, calibration=tmp_path / "statistics"
    )
    assert "kl_nats_calibration" not in record.predicted


def test_a_sample_that_is_none_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    shutil.copytree(small.statistics(), tmp_path / "statistics")
    save_file({"ids": np.zeros(3)}, tmp_path / "statistics" / "sample.safetensors")
    with pytest.raises(FormatError, match="no windows of tokens"):
        _ = Statistics.open(tmp_path / "statistics").sample


def test_lossless_files_have_nothing_to_measure(tmp_path: Path) -> None:
    record = waterfill.compress(
        small.model(), tmp_path / "out", bits=40, calibration=small.statistics()
    )
    assert record.about["lossless"]
    assert "kl_nats_calibration" not in record.predicted


@pytest.mark.parametrize(("vocabulary", "windows", "batches"), [(100, 6, 1), (1 << 18, 4, 4)])
def test_batches_hold_no_more_logits_than_fit(vocabulary: int, windows: int, batches: int) -> None:
    ids = np.arange(6 * 64, dtype=np.int64).reshape(6, 64)
    made = remeasuring._batches(ids, vocabulary)
    assert len(made) == batches
    assert sum(map(len, made)) == windows
    assert all(b.size * vocabulary <= remeasuring.BATCH_LOGITS for b in made)
    assert made[0][0, 0] == 0 and made[-1][-1, 0] == 5 * 64
