"""One tensor without the rest, into memory of one's own."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import waterfill
from tests import checkpoints
from waterfill.container import FILE_NAME, Reader, describe, write
from waterfill.registry import Codec, make_codec
from waterfill.types import DTYPES, Encoded, FormatError, Spec, TensorInfo, WaterfillError

INFOS = {f"{dtype}.{len(s)}": (dtype, s) for dtype in DTYPES for s in ((), (0, 3), (6, 5))}
INFOS["big"] = ("BF16", (200, 50))


@pytest.fixture(scope="module")
def data() -> dict[str, bytes]:
    return checkpoints.random_bytes(INFOS) | {"big": checkpoints.weights((200, 50))}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, data: dict[str, bytes]) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    checkpoints.write_file(folder / "model" / FILE_NAME, INFOS, data)
    waterfill.compress(folder / "model", folder / "out", lossless=True)
    return folder / "out"


@pytest.fixture
def artifact(out: Path) -> Any:
    with waterfill.Artifact(out) as opened:
        yield opened


def test_names_and_infos(artifact: waterfill.Artifact) -> None:
    assert artifact.names == list(INFOS)
    for name in artifact.names:
        assert (artifact.info(name).dtype, artifact.info(name).shape) == INFOS[name]
    for call in (artifact.info, artifact.read):
        with pytest.raises(WaterfillError, match="has no tensor nothing"):
            call("nothing")


def test_arrays(artifact: waterfill.Artifact, data: dict[str, bytes]) -> None:
    for name, (dtype, shape) in INFOS.items():
        bits = artifact.read(name)
        assert (bits.dtype, bits.shape, bits.tobytes()) == (DTYPES[dtype], shape, data[name])
        own = np.ones(shape, DTYPES[dtype])
        assert artifact.read(name, own) is own
        assert own.tobytes() == data[name]


def test_torch_tensors(artifact: waterfill.Artifact, data: dict[str, bytes]) -> None:
    torch = pytest.importorskip("torch")
    own = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    for name, (dtype, shape) in INFOS.items():
        kind = getattr(torch, own.get(dtype, DTYPES[dtype].name))
        tensor = torch.zeros(shape, dtype=torch.float32).to(kind)
        if kind.is_floating_point:
            tensor = torch.nn.Parameter(tensor)  # as in a module
        assert artifact.read(name, tensor) is tensor
        assert tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() == data[name]


def test_the_bfloat16_of_ml_dtypes(artifact: waterfill.Artifact, data: dict[str, bytes]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    own = np.zeros((200, 50), ml_dtypes.bfloat16)
    artifact.read("big", own)
    assert own.tobytes() == data["big"]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (np.zeros((200, 50), np.float32), r"bfloat16\[200, 50\], and out is float32\[200, 50\]"),
        (np.zeros((200, 50), np.float16), "out is float16"),
        (np.zeros((200, 50), np.int16), "out is int16"),
        (np.zeros((50, 200), np.uint16), r"out is uint16\[50, 200\]"),
        (np.zeros((50, 200), np.uint16).T, "C-contiguous and writeable"),
        (np.broadcast_to(np.uint16(0), (200, 50)), "C-contiguous and writeable"),
        (np.zeros((200, 50), ">u2"), "little-endian"),
        ([[0] * 50] * 200, "not list"),
    ],
)
def test_what_cannot_be_filled(artifact: waterfill.Artifact, own: Any, said: str) -> None:
    with pytest.raises(WaterfillError, match=said):
        artifact.read("big", own)


def test_torch_tensors_that_cannot_be_filled(artifact: waterfill.Artifact) -> None:
    torch = pytest.importorskip("torch")
    for own in (
        torch.zeros(50, 200, dtype=torch.bfloat16).T,
        torch.zeros(200, 50, dtype=torch.float16),
        torch.zeros(50, dtype=torch.bfloat16),
        torch.zeros(200, 50, dtype=torch.bfloat16, device="meta"),
    ):
        with pytest.raises(WaterfillError, match="big"):
            artifact.read("big", own)


def test_no_other_byte_is_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(out) as reader:
        nbytes = reader.entries["big"].nbytes
    read: list[int] = []
    true_pread = os.pread

    def counting(*args: int) -> bytes:
        read.append(args[1])
        return true_pread(*args)

    with waterfill.Artifact(out) as artifact:
        monkeypatch.setattr(os, "pread", counting)
        artifact.read("big")
    assert sum(read) == nbytes < (out / FILE_NAME).stat().st_size / 2 * 3


def test_damage_elsewhere_does_not_matter(
    out: Path, tmp_path: Path, data: dict[str, bytes]
) -> None:
    with Reader(out) as reader:
        at = reader._data_start + reader.entries["F32.2"].parts["bytes"][0]
    changed = bytearray((out / FILE_NAME).read_bytes())
    changed[at] ^= 1
    (tmp_path / FILE_NAME).write_bytes(changed)
    with waterfill.Artifact(tmp_path) as artifact:
        assert artifact.read("big").tobytes() == data["big"]
        with pytest.raises(FormatError, match=r"F32\.2"):
            artifact.read("F32.2")


def test_slices_are_joined_in_place(tmp_path: Path) -> None:
    whole = np.arange(24, dtype="<f4").reshape(3, 2, 4)
    encoded = []
    for index, part in enumerate(whole):
        info = TensorInfo(f"experts[{index}]", part.shape, "F32", index=index)
        encoded.append(Encoded(Spec("raw"), info, {"bytes": part.tobytes()}))
    described = [describe(e, {}) for e in encoded]
    write(tmp_path / FILE_NAME, described, [e.parts.values() for e in encoded], {})
    with waterfill.Artifact(tmp_path / FILE_NAME) as artifact:
        assert artifact.names == ["experts"] and artifact.info("experts").shape == (3, 2, 4)
        own = np.zeros_like(whole)
        artifact.read("experts", own)
        assert np.array_equal(own, whole) and np.array_equal(artifact.read("experts"), whole)


def test_many_threads(artifact: waterfill.Artifact, data: dict[str, bytes]) -> None:
    names = artifact.names * 4
    with ThreadPoolExecutor(4) as pool:
        for name, bits in zip(names, pool.map(artifact.read, names), strict=True):
            assert bits.tobytes() == data[name]


def test_a_codec_that_gives_another_shape_does_not_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = make_codec(Spec("raw"))
    monkeypatch.setattr(type(codec), "decode", lambda *_: np.zeros(1, "<f4"))
    with pytest.raises(FormatError, match="w: decoded to"):
        Codec.decode_into(codec, {}, {}, TensorInfo("w", (4,), "F32"), np.zeros(4, "<f4"))


def test_a_damaged_file_does_not_open(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\0" * 40)
    with pytest.raises(FormatError):
        waterfill.Artifact(tmp_path)
