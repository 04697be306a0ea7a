"""What the layers before have lost: found, and made up for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests import tiny  # noqa: E402
from waterfill.calibrate import missing, propagation  # noqa: E402
from waterfill.calibrate.logits import streamed_logits  # noqa: E402
from waterfill.calibrate.text import read_windows  # noqa: E402
from waterfill.sources import open_source  # noqa: E402
from waterfill.types import from_float32, to_float32  # noqa: E402

KINDS = ["llama", "gpt2", "mixtral", "opt"]


class Changed:
    """A source with other values in some tensors."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.changed: dict[str, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def matrix(self, name: str) -> np.ndarray:
        return to_float32(self.source.read(name), self.source.tensors[name][0])

    def set(self, name: str, values: np.ndarray) -> None:
        self.changed[name] = from_float32(values.astype(np.float32), self.source.tensors[name][0])

    def read(self, name: str) -> Any:
        return self.changed[name] if name in self.changed else self.source.read(name)


def damaged(source: Any, part: float = 0.2, only: str = "") -> Changed:
    """Noise in every matrix, or in those of this name."""
    changed, random = Changed(source), np.random.default_rng(0)
    for name, (_, shape) in source.tensors.items():
        if len(shape) == 2 and only in name:
            values = changed.matrix(name)
            changed.set(name, values + part * values.std() * random.normal(size=shape))
    return changed


def divergence(source: Any, changed: Any, ids: np.ndarray) -> float:
    p, q = (next(streamed_logits(s, [ids])).double().log_softmax(-1) for s in (source, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


def walk(source: Any, changed: Changed, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Move each matrix as it is wanted, its noise as it was."""
    moves: dict[str, np.ndarray] = {}
    matrices = {
        n for n, (_, shape) in source.tensors.items() if len(shape) == 2 and "norm" not in n
    }

    def oriented(name: str, values: np.ndarray) -> np.ndarray:
        return values.T if conv1d(source, name) else values

    def move(name: str, guess: np.ndarray, share: float) -> None:
        factor = moves[name] = share * guess
        original = changed.matrix(name)
        noise = to_float32(changed.read(name), source.tensors[name][0]) - original
        moved = oriented(name, oriented(name, original) @ factor)
        changed.set(name, original + moved + noise)

    propagation.propagate(
        source,
        changed,
        ids,
        matrices,
        lambda n: oriented(n, changed.matrix(n)),
        move,
        lambda _: None,
        lambda *_: None,
    )
    return moves


def conv1d(source: Any, name: str) -> bool:
    return source.config["model_type"] == "gpt2" and "c_" in name


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    tiny.tiny_model(request.param, tmp_path / "model")
    return open_source(tmp_path / "model")


def windows(source: Any, folder: Path) -> np.ndarray:
    return read_windows(source, [tiny.write_text(folder)], 2048, 32, tiny.VOCABULARY).ids


def test_what_is_missing_is_found() -> None:
    """x = z + P z + noise, of which P is found and most of it trusted."""
    generator = torch.Generator().manual_seed(0)
    guess = 0.1 * torch.randn(12, 12, generator=generator)
    pair = missing.Pair()
    for half in (0, 1):
        z = torch.randn(1, 4000, 12, generator=generator)
        x = z + z @ guess.T + 0.1 * torch.randn(1, 4000, 12, generator=generator)
        pair.add(half, x, z)
    found = pair.guess([lambda: np.eye(12, dtype=np.float32)])
    assert found is not None and found[1][0] == pytest.approx(missing.TAKEN, abs=0.02)
    assert np.allclose(found[0], guess.numpy(), atol=0.02)
    assert missing.Pair().guess([]) is None


def test_noise_is_not_believed() -> None:
    generator = torch.Generator().manual_seed(1)
    pair = missing.Pair()
    for half in (0, 1):
        z = torch.randn(1, 40, 30, generator=generator)
        x = z + torch.randn(1, 40, 30, generator=generator)
        pair.add(half, x, z)
    found = pair.guess([lambda: np.eye(30, dtype=np.float32)])
    assert found is not None and np.abs(found[0]).max() * found[1][0] < 0.1


def test_a_model_that_lost_nothing_stays(model: Any, tmp_path: Path) -> None:
    moves = walk(model, Changed(model), windows(model, tmp_path)[:16])
    assert all(np.abs(factor).max() < 1e-3 for factor in moves.values())


def test_what_was_lost_is_made_up_for(model: Any, tmp_path: Path) -> None:
    ids = windows(model, tmp_path)
    half = len(ids) // 2
    changed = damaged(model)
    before = divergence(model, changed, ids[half:])
    moves = walk(model, changed, ids[:half])
    assert moves and all(np.isfinite(factor).all() for factor in moves.values())
    assert divergence(model, changed, ids[half:]) < before


def test_the_first_block_hears_only_of_the_embedding(tmp_path: Path) -> None:
    tiny.tiny_model("llama", tmp_path / "model")
    source = open_source(tmp_path / "model")
    moves = walk(source, damaged(source, only="layers.0"), windows(source, tmp_path)[:16])
    moved = {name for name, factor in moves.items() if np.abs(factor).max() > 1e-3}
    assert moved and not any("layers.0." in name for name in moved)
