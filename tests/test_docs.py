"""The worked examples of docs/ are what the code does."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import waterfill
from tests.coding.cache_arrays import write_example
from tests.golden.make_codecs import all_cases
from waterfill import registry
from waterfill.cli import VERBS, build_parser
from waterfill.coding import delta, gaussian, huffman
from waterfill.coding.cachegen_file import Reader as StoredCache
from waterfill.coding.cachegen_layer import read_layers
from waterfill.coding.cachegen_symbols import bank
from waterfill.coding.delta_numpy import Words
from waterfill.coding.gaps import geometric
from waterfill.coding.scales import encode_grid
from waterfill.coding.sections import join, split
from waterfill.coding.trellis import CODES
from waterfill.container import Reader, describe, write
from waterfill.registry import codec_ids, find_codec, parse_spec
from waterfill.runtime.files import original_files, original_texts
from waterfill.testing import check_codec
from waterfill.types import Encoded, TensorInfo, Weighting, from_float32

DOCS = Path(__file__).parents[1] / "docs"
FORMAT = DOCS / "format"
CODECS = (DOCS / "codecs.md").read_text()


def blocks(name: str) -> list[bytes]:
    """The bytes in hex at the start of the lines of each code block of a format page."""
    page = (FORMAT / f"{name}.md").read_text()
    found = []
    for block in re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        lines = [
            re.match(r"([0-9a-f]{2}( (?=[0-9a-f]{2}\b)|$|(?= )))*", x) for x in block.split("\n")
        ]
        found.append(bytes.fromhex(" ".join(m[0] for m in lines if m)))
    return found


def hexed(name: str, data: bytes) -> bool:
    """Whether a format page has these bytes as one of its examples."""
    return data in blocks(name)


def coded(
    text: str, values: Any, dtype: str, weighting: Weighting | None = None
) -> tuple[dict[str, bytes], Any]:
    array = np.array(values, np.float32)
    info = TensorInfo("w", array.shape, dtype)
    chosen = parse_spec(text)
    parts, extra = chosen.encode(from_float32(array, dtype), info, weighting or Weighting())
    return parts, info.matrix(chosen.decode(parts, extra, info))


def lossless_example() -> bytes:
    page = (FORMAT / "lossless.md").read_text()
    words = re.search(r"16 values between 1 and 4: words `([^`]*)`", page)
    assert words
    bits = np.array([int(word, 16) for word in words[1].split()], np.uint16)
    info = TensorInfo("w", bits.shape, "BF16")
    return find_codec("lossless")().encode(bits, info, Weighting())[0]["stream"]


def integer_example(pack: str) -> tuple[dict[str, bytes], Any]:
    rows = [[-4, -2, 0, 1, 3, 1, 0, 2, 3, -4], [0, 0, 8, -16, 8, 0, 0, 4, 0.5, -2]]
    return coded(f"integer:bits=3,group=8,solver=nearest,pack={pack}", rows, "F32")


def trellis_example() -> tuple[bytes, Any]:
    values = [[0.9, -0.1, 4.0], [0.4, 0.3, -7.0], [-1.5, 0.2, 2.5], [0.2, 0.0, 9.0]]
    weighting = Weighting(
        np.array([1, 16, 1 / 16], np.float32), np.array([1, 1, 1, 16], np.float32)
    )
    parts, y = coded(
        "trellis:states=4,step=0.125,rows=1.0,gains=yes,damping=0.0", values, "F32", weighting
    )
    return parts["codes"], y


def test_raw() -> None:
    parts, _ = coded("raw", [1.0, -2.0], "BF16")
    assert hexed("raw", parts["bytes"])


def test_lossless() -> None:
    assert hexed("lossless", lossless_example())


def test_integer() -> None:
    parts, values = integer_example("packed")
    assert hexed("integer", parts["scales"]) and hexed("integer", parts["codes"])
    assert hexed("integer", integer_example("coded")[0]["codes"])
    assert values.tolist() == [[-4, -2, 0, 1, 3, 1, 0, 2, 3, -4], [0, 0, 8, -16, 8, 0, 0, 4, 0.5, -2]]  # fmt: skip


def test_cache(tmp_path: Path) -> None:
    path = tmp_path / "example.kv"
    write_example(path)
    data = path.read_bytes()
    assert hexed("cache", data)
    with StoredCache(path) as stored:
        assert hexed("cache", b"".join(stored.read(part) for part in stored.numbers))
    page = (FORMAT / "cache.md").read_text()
    [(_, *pair)] = read_layers(path)
    for row in (0, 1):
        cells = [" ".join(f"{x:g}" for x in (x[0, 0, 1 + row] / 0.99995).round(3)) for x in pair]
        assert f"| {row} | {cells[0]} | {cells[1]} |" in page
    for model, counts in zip((46, 79, 83, 86), bank()[0][[46, 79, 83, 86]], strict=True):
        assert counts.sum() == 4096 and str(model) in page
    assert f"The bank has {len(bank()[0])} models" in page


def test_trellis() -> None:
    data, values = trellis_example()
    assert hexed("trellis", data)
    page = (FORMAT / "trellis.md").read_text()
    for row in values:
        assert "| " + " ".join(str(v).removesuffix(".0") for v in row) + " |" in page


def test_paths() -> None:
    data, _ = trellis_example()
    assert hexed("paths", split(data, 4)[-1])
    page = (FORMAT / "paths.md").read_text()
    for level, grid in ((0, 0), (9, 0), (9, 1), (13, 0), (13, 1)):
        table = gaussian.frequencies(2, 7, level, level)[grid]
        row = f"| {level}, {grid} | {2 * level + grid} | "
        assert row + " ".join(map(str, table[:14])) + " |" in page
    for states, (feedback, source) in {1: (0, 0), **CODES}.items():
        assert f"| {states} | {feedback} | {source} |\n" in page


def test_the_table_of_a_path_is_what_the_machine_does() -> None:
    """Row by row: machine, context, level and value of each index, and the state of the lane."""
    values = trellis_example()[1]
    page = (FORMAT / "paths.md").read_text()
    rows = re.findall(
        r"^\| (\d) \| (\d) \| (\d) \| (\d+) \| (-?\d) \| (-?\d) \| (\S+) \| `(\w+)` \| `(\w+)` \| `(\w+)`",
        page,
        re.M,
    )
    assert len(rows) == 12
    states, (feedback, source) = [0, 0, 0], CODES[4]
    assert [row[7] for row in rows[1:]] == [row[9] for row in rows[:-1]]
    for row, column, *numbers in rows:
        state = states[int(column)]
        at, context, k, level = map(int, numbers[:4])
        grid = state & 1
        assert (at, context) == (state, 2 * (0, 9, 9, 13)[int(row)] + grid)
        assert level == 2 * k - grid * np.sign(k)
        assert numbers[4] == str(values[int(row), int(column)]).removesuffix(".0")
        states[int(column)] = state >> 1 ^ feedback * grid ^ source * (k & 1)


def test_sections_and_scales() -> None:
    assert hexed("sections", join([b"\xaa\xbb", b"", b"\xcc\xdd\xee"]))
    assert hexed("sections", encode_grid(np.full(4, -1, np.int32)))


def test_huffman() -> None:
    page = (FORMAT / "huffman.md").read_text()
    listed = re.search(r"^Twelve symbols: ([\d ]+)$", page, re.M)
    assert listed
    symbols = np.array(listed[1].split(), np.uint8)
    stream = huffman.encode(symbols)
    assert hexed("huffman", stream)
    assert np.array_equal(huffman.decode(stream, 12), symbols)
    lengths = huffman.code_lengths(np.bincount(symbols, minlength=256))
    codes = re.findall(r"^\| (\d+) \| (\d) \| `([01]+)` \|$", page, re.M)
    assert {int(byte): int(length) for byte, length, _ in codes} == {
        int(byte): int(lengths[byte]) for byte in np.flatnonzero(lengths)
    }
    code = {int(byte): bits for byte, _, bits in codes}
    assert " ".join(code[int(s)] for s in symbols) + ", then padding" in page


def test_delta() -> None:
    old = np.array([0x3F80, 0x3C24] * 20, np.uint16)
    new = old.copy()
    new[[5, 9, 11, 17, 23, 31, 33]] += 1
    new[[19, 25, 39]] -= 1
    new[20] += 20
    assert hexed("delta", delta.encode(old, new, "BF16"))
    page = (FORMAT / "delta.md").read_text()
    assert " ".join(map(str, geometric(np.array([37]), 6)[0])) in page
    for dtype in ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"):
        words = Words.of(dtype)
        assert f"| {dtype} | {words.shift} | {words.mask:x} | {words.offset} |" in page


def test_container(tmp_path: Path) -> None:
    """The example is a whole file; what a zlib makes of the index may differ from it."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(max(blocks("container"), key=len))
    assert waterfill.load(path)["w"].tolist() == [1, -2]
    with Reader(path) as reader:
        entry, about = reader.entries["w"], reader.about
    info = TensorInfo("w", (2,), "BF16")
    parts = {"bytes": bytes.fromhex("803f00c0")}
    described = describe(Encoded(parse_spec("raw").spec, info, parts), {"why": "small"})
    write(path, [described], [parts.values()], {"waterfill": "0.1.0"})
    with Reader(path) as reader:
        assert (reader.entries["w"], reader.about) == (entry, about)


def test_files() -> None:
    (about,) = re.findall(
        r"^    (\{.*(?:\n    .*)*)$", (FORMAT / "files.md").read_text(), re.MULTILINE
    )
    about = json.loads(about.replace("\n    ", ""))
    (file,) = original_files(about, {"c": ("U8", (1,))})
    assert (file.name, file.header[:6]) == ("2.safetensors", b'{"c": ')
    assert original_texts(about) == {"config.json": b"{}"}


@pytest.mark.parametrize("case", [c for c in all_cases() if c.get("example")], ids=lambda c: c["codec"][0])  # fmt: skip
def test_bytes_of_a_golden_example_stand_in_the_page_of_its_codec(case: dict[str, Any]) -> None:
    for name, part in case["parts"].items():
        assert hexed(case["codec"][0], bytes.fromhex(part)), f"{name}: {part}"


def test_every_codec_and_version_has_a_page() -> None:
    for name in codec_ids():
        page = (FORMAT / f"{name}.md").read_text()
        cls = find_codec(name)
        assert f"# Codec `{name}`\n\nVersion {cls.version}." in page
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            default = str(field.default).lower().removesuffix(".0")
            row = rf"^\| `{field.name}` \| .* \| `?{default}`? \|"
            assert re.search(row, page, re.MULTILINE), f"{name}.md does not list {field.name}"


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example of codecs.md as an installed package with its entry point."""
    blocks = re.findall(r"^ *```(python|toml)\n(.*?)^ *```", CODECS, re.MULTILINE | re.DOTALL)
    (_, example), (_, trial), (_, entry) = blocks
    package = tmp_path / "your_package"
    package.mkdir()
    (package / "sign.py").write_text(example)
    (package / "trial.py").write_text(f"from your_package.sign import Sign\n{trial}")
    group, line = (text.strip() for text in entry.strip().split("\n"))
    assert group == '[project.entry-points."waterfill.codecs"]'
    info = tmp_path / "your_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: your-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[waterfill.codecs]\n" + line.replace('"', "") + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    registry._REGISTRY.pop("sign", None)
    for name in [n for n in sys.modules if n.startswith("your_package")]:
        del sys.modules[name]


@pytest.mark.usefixtures("own_package")
def test_the_example_codec_is_found_by_its_entry_point_and_passes_every_check() -> None:
    assert "sign" in codec_ids()
    assert str(parse_spec("sign:shrink=0.9")) == "sign:shrink=0.9"
    importlib.import_module("your_package.trial")
    check_codec(find_codec("sign")())


@pytest.mark.usefixtures("own_package")
def test_the_example_codec_goes_through_a_file(tmp_path: Path) -> None:
    values = np.array([[1, -1, 1], [-2, 2, 2]], np.float32)
    info = TensorInfo("w", (2, 3), "F32")
    chosen = parse_spec("sign")
    parts, extra = chosen.encode(values, info, Weighting())
    encoded = Encoded(chosen.spec, info, parts, extra)
    write(tmp_path / "model.safetensors", [describe(encoded, {})], [parts.values()], {})
    assert np.array_equal(waterfill.load(tmp_path)["w"], values)


def test_every_folder_of_the_tour_is_there() -> None:
    tour = (DOCS / "tour.md").read_text()
    assert len(tour.splitlines()) <= 60
    rooms = set(re.findall(r"`(\w+)/`", tour))
    package = Path(waterfill.__file__).parent
    folders = {p.name for p in package.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders <= rooms
    for module, name in re.findall(r"`(waterfill[\w.]*)\.(\w+)`", tour):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        *(f"docs/{name}.md" for name in ("lossless", "delta", "serving", "planning", "stack")),
    ],
)
def test_examples_name_what_there_is(page: str) -> None:
    """Each command parses, each block of Python does, and what it asks of the package is there."""
    text = (DOCS.parent / page).read_text()
    commands = re.findall(r"^(?:\.venv/bin/)?waterfill .*$", text, re.MULTILINE)
    assert commands
    for command in commands:
        args = build_parser(VERBS).parse_args(shlex.split(command, comments=True)[1:])
        assert not args.verb.misuse(args), command
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        compile(example, page, "exec")
        for line in re.findall(r"^from (waterfill\S*) import (.*)$", example, re.MULTILINE):
            home = importlib.import_module(line[0])
            assert all(hasattr(home, name.strip()) for name in line[1].split(",")), line
        for module, name in re.findall(r"\b((?:waterfill\.)?lossless|waterfill)\.(\w+)", example):
            home = waterfill if module == "waterfill" else waterfill.lossless
            assert hasattr(home, name), f"{module}.{name}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), *FORMAT.glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page.read_text()):
            assert not link or link.startswith("http") or (page.parent / link).exists(), (
                page,
                link,
            )
