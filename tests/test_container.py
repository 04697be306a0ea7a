"""The vault refuses whatever is not exactly what was written."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from waterfill import container
from waterfill.container import Reader, describe, file_nbytes, write
from waterfill.types import Encoded, FormatError, Spec, TensorInfo, WaterfillError


def make(path: Path, count: int = 5, seed: int = 0) -> dict[str, bytes]:
    random = np.random.default_rng(seed)
    encoded = [
        Encoded(
            Spec("raw", {}),
            TensorInfo(f'layer.{i}."odd" näme', (3, i + 1), "U8"),
            {"bytes": random.bytes(3 * (i + 1)), "second": b""},
            {"k": i},
        )
        for i in range(count)
    ]
    described = [describe(e, {"why": "because"}) for e in encoded]
    about = {"waterfill": "0"}
    nbytes = write(path, described, [e.parts.values() for e in encoded], about)
    assert nbytes == path.stat().st_size == file_nbytes(described, about)
    return {e.info.name: e.parts["bytes"] for e in encoded}


def test_round_trip_and_safetensors_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    written = make(path)
    with Reader(tmp_path) as reader:
        assert {n: reader.read(n).parts["bytes"] for n in reader.entries} == written
        assert reader.read('layer.2."odd" näme').extra == {"k": 2}
        assert (
            reader.overhead_nbytes + sum(e.nbytes for e in reader.entries.values()) == reader.nbytes
        )
        assert list(reader.verify()) == list(written)
    plain = load_file(path)
    assert {
        n.removesuffix("//bytes"): a.tobytes() for n, a in plain.items() if n.endswith("//bytes")
    } == written


@given(st.binary(max_size=60), st.integers(0, 3))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_come_back(tmp_path: Path, data: bytes, parts: int) -> None:
    path = tmp_path / "model.safetensors"
    encoded = Encoded(
        Spec("raw"), TensorInfo("t", (len(data),), "U8"), {f"p{i}": data for i in range(parts)}
    )
    write(path, [describe(encoded, {})], [encoded.parts.values()], {})
    with Reader(path) as reader:
        assert reader.read("t").parts == encoded.parts


def test_400_flipped_bits_none_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make(path, count=12)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    random = np.random.default_rng(7)
    places = [*random.integers(0, header, 200), *random.integers(header, len(good), 200)]
    accepted = []
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << int(random.integers(8))
        path.write_bytes(bad)
        try:
            with Reader(path) as reader:
                for _ in reader.verify():
                    pass
            accepted.append(place)
        except FormatError:
            pass
    assert accepted == []


@pytest.mark.parametrize("keep", [0, 4, 8, 60, 0.5, 0.99])
def test_truncated(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    good = path.read_bytes()
    path.write_bytes(good[: int(keep * len(good)) if isinstance(keep, float) else keep])
    with pytest.raises(FormatError):
        Reader(path)


def test_appended_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FormatError, match="header says"):
        Reader(path)


@pytest.mark.parametrize("version", ["2", "9" * 5000])
def test_a_future_version_says_upgrade(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    monkeypatch.setattr(container, "VERSION", version)
    make(path)
    monkeypatch.undo()
    with pytest.raises(FormatError, match="upgrade waterfill"):
        Reader(path)


@pytest.mark.parametrize("shape", [(0, 1 << 48), (0, *[1 << 30] * 3), (1,) * 33])
def test_a_shape_that_no_reader_takes_is_not_written(shape: tuple[int, ...]) -> None:
    with pytest.raises(WaterfillError, match="t: no file here can hold the shape"):
        describe(Encoded(Spec("raw"), TensorInfo("t", shape, "U8"), {}), {})


def test_other_files_are_refused_with_a_word(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    with pytest.raises(FormatError, match="no such file"):
        Reader(path)
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(FormatError, match="not one written by waterfill"):
        Reader(path)
    path.write_bytes(b"\x80\x04\x95" + b"pickle" * 20)
    with pytest.raises(FormatError, match="not a safetensors file"):
        Reader(path)


@pytest.mark.parametrize(
    "document",
    [[], {"about": {}}, {"about": {}, "tensors": {}}, {"about": {}, "tensors": [{"name": "x"}]},
     {"about": {}, "tensors": [{"name": "x", "codec": 3, "dtype": "F32", "shape": [1], "kind": "", "parts": {}}]},
     {"about": {}, "tensors": [{"name": "x", "codec": ["raw", 1, {}], "dtype": "F99", "shape": [1], "kind": "", "parts": {}}]},
     {"about": {}, "tensors": [{"name": "x", "codec": ["raw", 1, {}], "dtype": "F32", "shape": [-1], "kind": "", "parts": {}}]},
     {"about": {}, "tensors": [{"name": "x", "codec": ["raw", 1, {}], "dtype": "F32", "shape": [0, 2**40, 2**40], "kind": "", "parts": {}}]},
     {"about": {}, "tensors": [{"name": "x", "codec": ["raw", 1, {}], "dtype": "F32", "shape": [1] * 33, "kind": "", "parts": {}}]}],
)  # fmt: skip
def test_an_index_that_lies_with_a_right_checksum(tmp_path: Path, document: object) -> None:
    path = tmp_path / "model.safetensors"
    index = zlib.compress(json.dumps(document).encode())
    entries = {
        "__metadata__": {"format": "waterfill", "version": "1", "crc": f"{zlib.crc32(index):08x}"},
        container.INDEX: {"dtype": "U8", "shape": [len(index)], "data_offsets": [0, len(index)]},
    }
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + index)
    with pytest.raises(FormatError):
        Reader(path)


def test_an_index_that_would_inflate_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "MAX_INDEX_NBYTES", 1000)
    path = tmp_path / "model.safetensors"
    make(path, count=40)
    with pytest.raises(FormatError, match="longer than it may be"):
        Reader(path)
