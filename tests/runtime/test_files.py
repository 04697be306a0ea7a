"""What a file says of the files it came from may lie; nothing is written where it must not be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import waterfill
from tests import checkpoints
from waterfill.container import FILE_NAME, Reader, describe, write
from waterfill.types import FormatError

A, B = {"a": ("F32", (2, 3)), "b": ("I8", ())}, {"c": ("BF16", (4,))}
HEADER = json.dumps({"c": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    checkpoints.write_file(folder / "model" / "1.safetensors", A, metadata={"format": "pt"})
    checkpoints.write_file(folder / "model" / "2.safetensors", B, indent=1)
    (folder / "model" / "config.json").write_text("{ }")
    waterfill.compress(folder / "model", folder / "out", lossless=True)
    return folder / "out"


def rewritten(source: Path, folder: Path, about: Any) -> Path:
    """The same tensors in a file that says other things of where they come from."""
    folder.mkdir()
    with Reader(source) as reader:
        encoded = [reader.read(name) for name in reader.entries]
    payloads = [e.parts.values() for e in encoded]
    write(folder / FILE_NAME, [describe(e, {}) for e in encoded], payloads, about)
    return folder


def test_what_is_remembered(out: Path) -> None:
    with Reader(out) as reader:
        first, second = reader.about["files"]
        assert first == {"name": "1.safetensors", "tensors": 2, "metadata": {"format": "pt"}}
        assert second.keys() == {"name", "tensors", "header"}
        assert reader.about["texts"] == {"config.json": "{ }"}


def _file(number: int = 0, **entries: Any) -> Callable[[Any], None]:
    return lambda about: about["files"][number].update(entries)


def _texts(value: Any) -> Callable[[Any], None]:
    return lambda about: about.update(texts=value)


NAMES = [
    "../1.safetensors", "/etc/1.safetensors", "a/1.safetensors", "a\\1.safetensors", "",
    ".safetensors", ".1.safetensors", "1.bin", "1.safetensors\0", "..", "x" * 250 + ".safetensors",
    "\ud800.safetensors", "2.safetensors", 5, None,
]  # fmt: skip
LIES: dict[str, Callable[[Any], None]] = {
    **{f"name {name!r}": _file(name=name) for name in NAMES},
    "fewer tensors": _file(tensors=1),
    "more tensors": _file(tensors=3),
    "many tensors": _file(1, tensors=10**30),
    "a count that is a truth": _file(1, tensors=True),
    "negative": _file(tensors=-1),
    "not a count": _file(tensors="2"),
    "metadata is a list": _file(metadata=["pt"]),
    "metadata of numbers": _file(metadata={"a": 1}),
    "metadata of half a pair": _file(1, header="\ud800" + HEADER),
    "header and metadata": _file(header=HEADER),
    "another's header": lambda about: about["files"][0].update(header=HEADER, metadata=None),
    "header is a number": _file(1, header=7),
    "header is no JSON": _file(1, header=HEADER[1:]),
    "header of another dtype": _file(1, header=HEADER.replace("BF16", "F16")),
    "header of another shape": _file(1, header=HEADER.replace("[4]", "[2, 2]")),
    "header of another name": _file(1, header=HEADER.replace('"c"', '"d"')),
    "header with a hole": _file(1, header=HEADER.replace("[0, 8]", "[8, 16]")),
    "header of other metadata": _file(1, header='{"__metadata__": [],' + HEADER[1:]),
    "deep header": _file(1, header="[" * 100_000),
    "unknown key": _file(mode="0777"),
    "not a list": lambda about: about.update(files={"name": "1.safetensors"}),
    "a missing file": lambda about: about["files"].pop(),
    "a list of names": lambda about: about.update(files=["1.safetensors"]),
    "texts are a list": _texts(["config.json"]),
    "text is a number": _texts({"config.json": 1}),
    "text is half a pair": _texts({"config.json": "\ud800"}),
    "text elsewhere": _texts({"../config.json": "{}"}),
    "text that runs": _texts({"setup.py": "1"}),
    "text that is hidden": _texts({".bashrc.json": "1"}),
    "text over weights": _texts({"1.safetensors": "1"}),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie: str, out: Path, tmp_path: Path) -> None:
    with Reader(out) as reader:
        about: Any = copy.deepcopy(dict(reader.about))
    LIES[lie](about)
    folder = rewritten(out, tmp_path / "in", about)
    with pytest.raises(FormatError):
        waterfill.decompress(folder, tmp_path / "plain")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert len(waterfill.load(folder)) == 3  # arrays need none of this


@pytest.mark.parametrize("about", [{"texts": {"config.json": "{}"}}, {"files": []}, [1], None])
def test_a_file_that_says_nothing_becomes_a_plain_folder(
    about: Any, out: Path, tmp_path: Path
) -> None:
    folder = rewritten(out, tmp_path / "in", about)
    waterfill.decompress(folder, tmp_path / "plain")
    assert [p.name for p in (tmp_path / "plain").iterdir()] == [FILE_NAME]


def test_the_longest_name(out: Path, tmp_path: Path) -> None:
    with Reader(out) as reader:
        about: Any = copy.deepcopy(dict(reader.about))
    name = about["files"][0]["name"] = "x" * 243 + ".safetensors"
    waterfill.decompress(rewritten(out, tmp_path / "in", about), tmp_path / "plain")
    assert (tmp_path / "plain" / name).is_file()
    about["files"][0]["name"] = "C:x.safetensors"
    with pytest.raises(FormatError, match="no name"):
        waterfill.decompress(rewritten(out, tmp_path / "drive", about), tmp_path / "none")


def test_what_was_put_beside_an_artifact_does_not_replace_a_file(out: Path, tmp_path: Path) -> None:
    with Reader(out) as reader:
        folder = rewritten(out, tmp_path / "in", dict(reader.about))
    (folder / "1.safetensors").write_text("something else")
    (folder / "config.json").write_text("something else")
    waterfill.decompress(folder, tmp_path / "plain")
    assert checkpoints.snapshot(tmp_path / "plain") == checkpoints.snapshot(out.parent / "model")
