"""What calibration learns, and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.runtime.cache.models import decoder, statistics, tokens
from waterfill.runtime.cache.fitting.calibrating import calibrate_cache
from waterfill.runtime.cache.fitting.statistics import load_statistics, save_statistics
from waterfill.types import FormatError, WaterfillError


def test_saved_and_loaded(tmp_path: Path) -> None:
    save_statistics(statistics(), tmp_path / "cache.safetensors")
    again = load_statistics(tmp_path / "cache.safetensors")
    assert again.protocol == statistics().protocol and set(again.layers) == {0, 1}
    for index, layer in statistics().layers.items():
        np.testing.assert_array_equal(again.layers[index].keys.harm, layer.keys.harm)
        np.testing.assert_allclose(
            again.layers[index].values.samples, layer.values.samples, rtol=1e-3, atol=1e-4
        )


def test_any_other_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    save_statistics(statistics(), path)
    whole = path.read_bytes()
    for data in (
        b"",
        b"nonsense",
        whole[:-5],
        whole.replace(b"waterfill-cache", b"waterfull-cache"),
    ):
        path.write_bytes(data)
        with pytest.raises(FormatError):
            load_statistics(path)
    with pytest.raises(FormatError):
        load_statistics(tmp_path / "absent")


def test_harm_is_a_second_derivative() -> None:
    """A small error in all keys and values costs about what the matrices say."""
    layer = statistics().layers[0]
    for stream in (layer.keys, layer.values):
        eigenvalues = np.linalg.eigvalsh(stream.harm.astype(np.float64))
        assert (eigenvalues > -1e-7 * eigenvalues.max()).all() and eigenvalues.max() > 0
        assert stream.samples.shape[1] % 32 == 0


def test_short_windows_are_refused() -> None:
    with pytest.raises(WaterfillError, match="windows of at least"):
        calibrate_cache(decoder(), tokens(2, 20))
