"""What calibration learns, and its file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runtime.cache.models import decoder, statistics, tokens
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.fitting.calibrating import _pull, calibrate_cache
from waterfill.runtime.cache.fitting.statistics import (
    CacheStatistics,
    LayerStatistics,
    StreamStatistics,
    load_statistics,
    save_statistics,
)
from waterfill.types import FormatError, WaterfillError


def test_saved_and_loaded(tmp_path: Path) -> None:
    save_statistics(statistics(), tmp_path / "cache.safetensors")
    again = load_statistics(tmp_path / "cache.safetensors")
    assert again.protocol == statistics().protocol and set(again.layers) == {0, 1}
    for index, layer in statistics().layers.items():
        np.testing.assert_array_equal(again.layers[index].keys.harm, layer.keys.harm)
        np.testing.assert_array_equal(again.layers[index].values.growth, layer.values.growth)
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


def test_what_is_all_but_certain_can_still_be_turned() -> None:
    """At a margin of 12 nats, Fisher information of the plain prediction would be about 1e-5."""
    logits = torch.zeros(4096, 2)
    logits[:, 0] = 12.0
    pulled = _pull(logits, torch.Generator().manual_seed(0))
    assert float(pulled.square().sum(1).mean()) > 1e-3
    torch.testing.assert_close(pulled.sum(1), torch.zeros(4096), atol=1e-6, rtol=0)


def test_large_errors_have_a_harm_of_their_own() -> None:
    one = statistics().layers[0].keys
    grown = dataclasses.replace(one, growth=np.array([3.0], np.float32)).of_large_errors
    np.testing.assert_allclose(grown.harm, 3 * one.harm, rtol=1e-6)
    assert grown.growth == 1
    np.testing.assert_allclose(
        grown.basis.variances, 3 * one.basis.variances, rtol=1e-3, atol=1e-12
    )


@pytest.mark.parametrize(("bits", "large"), [(1.0, True), (14.0, False)])
def test_a_small_cache_is_planned_by_large_errors(bits: float, large: bool) -> None:
    made = {
        i: LayerStatistics(*(_costly(s) for s in (one.keys, one.values)))
        for i, one in statistics().layers.items()
    }
    given = CacheStatistics(made, statistics().protocol)
    cache = KVCache(
        decoder(), bits=bits, tokens=4096, method="transform", statistics=given, guard=None
    )
    assert cache.statistics is not None
    assert (cache.statistics is given) != large
    harm = cache.statistics.layers[1].values.harm / given.layers[1].values.harm
    np.testing.assert_allclose(harm, 2.0 if large else 1.0, rtol=1e-6)


def _costly(stream: StreamStatistics) -> StreamStatistics:
    """As if a vector that is left out cost a nat, and large errors twice what small ones say."""
    cost = stream.basis.variances.sum()
    return dataclasses.replace(
        stream, harm=(stream.harm / cost).astype(np.float32), growth=np.array([2.0], np.float32)
    )


def test_short_windows_are_refused() -> None:
    with pytest.raises(WaterfillError, match="windows of at least"):
        calibrate_cache(decoder(), tokens(2, 20))
