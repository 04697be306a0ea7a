"""A codec of another package: one source file, named by its entry point, and every verb knows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import safetensors.numpy

import waterfill
from tests.commands import refused, shell
from tests.pipeline import small
from waterfill.types import FormatError

TOY = '''
"""Signs, and a float32 for each matrix."""

import numpy as np

from waterfill.registry import Codec, codec
from waterfill.types import FLOAT_DTYPES, FormatError


@codec("toy", version=3)
class Toy(Codec):
    """The sign of each weight, times the mean magnitude of all."""

    louder: float = 1.0

    @classmethod
    def ladder(cls, info):
        if info.dtype in FLOAT_DTYPES and len(info.shape) == 2:
            yield cls()

    def encode(self, x, info, weighting):
        w = info.matrix(x)
        scale = np.float32(self.louder * np.abs(w).mean())
        return {"codes": scale.tobytes() + np.packbits(w > 0).tobytes()}, {}

    def decode(self, parts, extra, info):
        data, (m, n) = parts["codes"], info.matrix_shape
        if len(data) != 4 + -(-m * n // 8):
            raise FormatError(f"{info.name}: the signs are of another tensor")
        scale = np.frombuffer(data[:4], "<f4")[0]
        signs = np.unpackbits(np.frombuffer(data[4:], np.uint8), count=m * n).reshape(m, n)
        return info.unmatrix(np.where(signs, scale, -scale).astype(np.float32))
'''
MATRICES = "model.layers.*_proj.weight"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the package `toy-codec` is installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_codec.py").write_text(TOY)
    info = folder / "toy_codec-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-codec\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[waterfill.codecs]\ntoy = toy_codec:Toy\n")
    return {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def artifact(installed: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, its matrices as the toy codes them."""
    out = tmp_path_factory.mktemp("toy") / "out"
    done = shell(
        "compress", small.model(), "-o", out, "--bits", "6", "--calibrate", small.statistics(),
        "--codec", f"{MATRICES}=toy:louder=1.25", "--json", env=installed,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    chosen = {row["name"]: row["codec"] for row in json.loads(done.stdout)["ledger"]}
    assert {k for k, v in chosen.items() if v == "toy:louder=1.25"} == {
        k for k in chosen if k.startswith("model.layers.") and k.endswith("_proj.weight")
    }
    return out


def python(program: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def test_it_is_listed_where_its_package_is_installed(installed: dict[str, str]) -> None:
    there = {row["id"]: row for row in json.loads(shell("codecs", "--json", env=installed).stdout)}
    assert there["toy"]["version"] == 3 and there["toy"]["lossy"] is True
    assert there["toy"]["about"] == "The sign of each weight, times the mean magnitude of all."
    absent = [row["id"] for row in json.loads(shell("codecs", "--json").stdout)]
    assert sorted([*absent, "toy"]) == sorted(there)


def test_what_it_coded_comes_back(
    installed: dict[str, str], artifact: Path, tmp_path: Path
) -> None:
    done = shell("decompress", artifact, "-o", tmp_path / "plain", env=installed)
    assert done.returncode == 0, done.stderr
    name = "model.layers.0.mlp.down_proj.weight"
    program = f"import waterfill, sys; sys.stdout.write(waterfill.load({str(artifact)!r})[{name!r}].tobytes().hex())"
    loaded = python(program, installed)
    assert loaded.returncode == 0, loaded.stderr
    plain, original = (
        safetensors.numpy.load_file(folder / "model.safetensors")[name]
        for folder in (tmp_path / "plain", small.model())
    )
    assert plain.tobytes().hex() == loaded.stdout
    scale = np.float32(1.25 * np.abs(original).mean())
    assert np.array_equal(plain, np.where(original > 0, scale, -scale))


def test_the_codec_inside_another_may_be_of_a_package(installed: dict[str, str]) -> None:
    program = (
        "from waterfill.registry import parse_spec\n"
        "from waterfill.testing import check_codec\n"
        "check_codec(parse_spec('rotate:inner=(lowrank:inner=(toy:louder=0.5),rank=1)'), ('F32',))"
    )
    done = python(program, installed)
    assert done.returncode == 0, done.stderr


def test_without_its_package_a_file_is_refused_by_name(artifact: Path, tmp_path: Path) -> None:
    refused(shell("decompress", artifact, "-o", tmp_path / "plain"), "toy")
    assert not (tmp_path / "plain").exists()
    with pytest.raises(FormatError, match=r"no codec is called 'toy'"):
        waterfill.load(artifact)
