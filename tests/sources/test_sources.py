"""Sources: what they give, and every bad input they refuse."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from waterfill.runtime.artifact import read_config
from waterfill.sources import FolderSource, ModuleSource, Source, open_source
from waterfill.sources.safetensors_file import open_safetensors
from waterfill.types import FormatError, WaterfillError

A = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
B = np.arange(600, dtype=np.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": A, "b": B, "c": B.copy(), "d": np.float32(3)[None]}, path / "model.safetensors")
    return path


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD_HEADERS: dict[str, tuple[Any, bytes, int | None, str]] = {
    "longer than the file": ({}, b"", 1000, "cut short"),
    "longer than allowed": ({}, b"", 1 << 40, "cut short"),
    "not JSON": (b"{,}", b"", None, "not JSON"),
    "not text": (b"\xff\xfe", b"", None, "not JSON"),
    "deep": (b"[" * 100_000, b"", None, "JSON"),
    "not an object": ([1], b"", None, "not a JSON object"),
    "a hole": ({"x": entry(0, 4), "y": entry(8, 12)}, bytes(12), None, "y leaves a hole"),
    "overlap": ({"x": entry(0, 8), "y": entry(4, 12)}, bytes(12), None, "y overlaps"),
    "begins late": ({"x": entry(4, 8)}, bytes(8), None, "hole"),
    "truncated": ({"x": entry(0, 8)}, bytes(4), None, "cut short"),
    "trailing bytes": ({"x": entry(0, 8)}, bytes(9), None, "belong to no tensor"),
    "wrong size": ({"x": entry(0, 8, shape=[3])}, bytes(8), None, "takes 12 bytes, not 8"),
    "negative": ({"x": entry(-4, 0)}, b"", None, "tensor x"),
    "negative shape": ({"x": entry(0, 8, shape=[-1, -2])}, bytes(8), None, "tensor x"),
    "float shape": ({"x": entry(0, 8, shape=[2.0])}, bytes(8), None, "tensor x"),
    "unknown dtype": ({"x": entry(0, 8, "F7")}, bytes(8), None, "tensor x has dtype F7"),
    "no offsets": ({"x": {"dtype": "F32", "shape": [1]}}, bytes(4), None, "tensor x"),
    "three offsets": (
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
        bytes(4),
        None,
        "tensor x",
    ),
    "twice": (
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
        None,
        "'x' appears twice",
    ),
    # Found at once, however many names there are before it.
    "twice among many": (
        ("{" + "".join(f'"{i}":0,' for i in range(300_000)) + '"299999":0}').encode(),
        b"",
        None,
        "'299999' appears twice",
    ),
    "a number without end": (b'{"x":' + b"9" * 5000 + b"}", b"", None, "not JSON"),
    "an axis that no array has": ({"x": entry(0, 0, shape=[0, 1 << 48])}, b"", None, "no array"),
    "axes that no array has": (
        {"x": entry(0, 0, shape=[0, *[1 << 30] * 3])},
        b"",
        None,
        "no array",
    ),
    "more axes than an array has": ({"x": entry(0, 4, shape=[1] * 33)}, bytes(4), None, "no array"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(case: str, tmp_path: Path) -> None:
    header, data, length, words = BAD_HEADERS[case]
    path = write(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(FormatError, match=words):
        open_safetensors(path)


def test_files_that_are_not_there_or_cut(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WaterfillError, match="cannot read"):
        open_safetensors(tmp_path / "none.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    for size in (0, 7, 8, 100, len(data) - 1):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            open_safetensors(path)
    opened = open_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(FormatError, match="ended inside"):
        opened.read(list(opened.tensors)[-1])


def test_reads_what_was_stored(folder: Path) -> None:
    source = FolderSource(folder)
    assert isinstance(source, Source)
    assert source.name == "model"
    assert source.tensors["a"] == ("F32", (2, 3, 4))
    np.testing.assert_array_equal(source.read("a"), A)
    np.testing.assert_array_equal(source.read_slice("a", 1), A[1])
    assert source.read("b").dtype == np.float16
    with pytest.raises(IndexError):
        source.read_slice("a", 2)
    with pytest.raises(WaterfillError, match="no tensor zzz"):
        source.read("zzz")
    assert source.duplicates() == {"c": "b"}


def test_every_dtype_and_empty_tensors(tmp_path: Path) -> None:
    from waterfill.types import DTYPES

    header, data = {}, b""
    for dtype, kind in DTYPES.items():
        value = np.array([0, 1, 1], kind).tobytes()
        header[dtype] = entry(len(data), len(data) + len(value), dtype, [3])
        data += value
    header["empty"] = entry(len(data), len(data), "F32", [0, 4])
    header["scalar"] = entry(len(data), len(data) + 1, "U8", [])
    opened = open_safetensors(write(tmp_path / "x.safetensors", header, data + b"\x07"))
    for dtype, kind in DTYPES.items():
        np.testing.assert_array_equal(opened.read(dtype), np.array([0, 1, 1], kind))
    assert opened.read("empty").shape == (0, 4)
    assert opened.read("scalar") == 7


def shard(folder: Path, **files: dict[str, Any]) -> None:
    (folder / "model.safetensors").unlink()
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    table = {t: f"{name}.safetensors" for name, tensors in files.items() for t in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def test_sharded(folder: Path) -> None:
    shard(folder, m1={"a": A}, m2={"b": B})
    source = FolderSource(folder)
    assert set(source.tensors) == {"a", "b"}
    np.testing.assert_array_equal(source.read("b"), B)
    assert [f.name for f in source.files_beside] == ["config.json"]
    (folder / "m2.safetensors").unlink()
    with pytest.raises(WaterfillError, match="lacks m2"):
        FolderSource(folder)


def test_index_that_lies(folder: Path) -> None:
    shard(folder, m1={"a": A}, m2={"b": B})
    index = folder / "model.safetensors.index.json"
    for table, words in [
        ({"a": "m1.safetensors", "b": "m1.safetensors"}, "has tensor b"),
        ({"a": "../model/m1.safetensors"}, "not a safetensors file of this folder"),
        ({"a": "m1.bin"}, "not a safetensors file"),
        ({"a": 3}, "no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": table}))
        with pytest.raises(FormatError, match=words):
            FolderSource(folder)
    index.write_text("[")
    with pytest.raises(FormatError, match="not JSON"):
        FolderSource(folder)
    shutil.copy(folder / "m1.safetensors", folder / "m3.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "m1.safetensors", "x": "m3.safetensors"}}))
    with pytest.raises(FormatError, match="both m1"):
        FolderSource(folder)


def test_other_names_and_pickles(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "a" in FolderSource(folder).tensors
    shutil.copy(folder / "weights.safetensors", folder / "more.safetensors")
    with pytest.raises(WaterfillError, match="2 safetensors files"):
        FolderSource(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(WaterfillError, match=r"no \*\.safetensors"):
        FolderSource(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(WaterfillError, match=r"pickle.*convert it to safetensors"):
        FolderSource(folder)


def test_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        FolderSource(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="no JSON object"):
        FolderSource(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WaterfillError, match=r"no config\.json"):
        FolderSource(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' + "9" * 5000 + "}", "{,}"])
def test_a_configuration_that_cannot_be_read(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(FormatError, match=r"config.json is not JSON"):
        FolderSource(folder)
    assert FolderSource(folder, any_files=True).config == {}
    with pytest.raises(WaterfillError, match=r"config.json is not JSON"):
        read_config(folder)


def test_files_beside(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "LICENSE", "chat.jinja", "spiece.model"):
        (folder / name).write_text("x")
    for name in ("code.py", "model.bin", ".hidden.json", "old.pt", "x.index.json", "picture.png"):
        (folder / name).write_text("x")
    (folder / "more").mkdir()
    want = {"LICENSE", "chat.jinja", "config.json", "spiece.model", "tokenizer.json", "vocab.txt"}
    assert {f.name for f in FolderSource(folder).files_beside} == want
    trusted = FolderSource(folder, trust_remote_code=True)
    assert {f.name for f in trusted.files_beside} == {*want, "code.py"}


def test_fingerprint(folder: Path, tmp_path: Path) -> None:
    first = FolderSource(folder).fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert FolderSource(copy).fingerprint() == first
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert FolderSource(copy).fingerprint() != first


def test_names_that_lead_nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WaterfillError, match="no folder /nowhere"):
        open_source("/nowhere/at/all")
    with pytest.raises(WaterfillError, match="is a file"):
        open_source(folder / "config.json")
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WaterfillError, match="local cache"):
        open_source("someone/some-model-that-is-not-here")


def test_demo_is_a_model() -> None:
    source = open_source("demo")
    assert source.name == "demo" and source.config["architectures"]


def test_module_in_memory() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(4, 300), torch.nn.Linear(4, 300))
    module[1].weight = module[0].weight
    module[1].bias.data = module[0].bias.data.clone().bfloat16()
    module[0].register_buffer("steps", torch.tensor(3))
    source = open_source(module)
    assert isinstance(source, ModuleSource) and isinstance(source, Source)
    assert set(source.tensors) == {"0.weight", "0.bias", "0.steps", "1.bias"}
    assert source.tensors["1.bias"] == ("BF16", (300,))
    assert source.tensors["0.steps"] == ("I64", ())
    np.testing.assert_array_equal(source.read("0.weight"), module[0].weight.detach().numpy())
    bits = source.read("1.bias")
    np.testing.assert_array_equal(
        (bits.astype(np.uint32) << 16).view(np.float32), module[1].bias.detach().float().numpy()
    )
    before = source.fingerprint()
    module[0].weight.data[0, 0] += 1
    assert source.fingerprint() != before


def test_importing_brings_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, waterfill.sources, waterfill.calibrate;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
