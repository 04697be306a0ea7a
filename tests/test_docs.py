"""The worked examples of docs/ are what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

import waterfill
from waterfill.coding.scales import encode_grid
from waterfill.coding.sections import join
from waterfill.container import Reader, describe, write
from waterfill.types import (
    Encoded,
    TensorInfo,
    Weighting,
    codec_ids,
    find_codec,
    from_float32,
    parse_spec,
)

DOCS = Path(__file__).parents[1] / "docs"
FORMAT = DOCS / "format"


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
    return coded("lossless", [1.0, -1.5, 1.0, 1.25], "BF16")[0]["planes"]


def integer_example(pack: str) -> tuple[dict[str, bytes], Any]:
    rows = [[-4, -2, 0, 1, 3, 1, 0, 2, 3, -4], [0, 0, 8, -16, 8, 0, 0, 4, 0.5, -2]]
    return coded(f"integer:bits=3,group=8,solver=nearest,pack={pack}", rows, "F32")


def trellis_example() -> tuple[bytes, Any]:
    values = [[0.9, -0.1, 4.0], [0.4, 0.3, -7.0], [-1.5, 0.2, 2.5], [0.2, 0.0, 9.0]]
    weighting = Weighting(
        np.array([1, 16, 1 / 16], np.float32), np.array([1, 1, 1, 16], np.float32)
    )
    parts, y = coded("trellis:step=0.125,rows=1.0,gains=yes,damping=0.0", values, "F32", weighting)
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


def test_trellis() -> None:
    data, values = trellis_example()
    assert hexed("trellis", data)
    page = (FORMAT / "trellis.md").read_text()
    for row in values:
        assert "| " + " ".join(str(v).removesuffix(".0") for v in row) + " |" in page


def test_sections_and_scales() -> None:
    assert hexed("sections", join([b"\xaa\xbb", b"", b"\xcc\xdd\xee"]))
    assert hexed("sections", encode_grid(np.full(4, -1, np.int32)))


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


def test_every_codec_and_version_has_a_page() -> None:
    for name in codec_ids():
        page = (FORMAT / f"{name}.md").read_text()
        cls = find_codec(name)
        assert f"# Codec `{name}`\n\nVersion {cls.version}." in page
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            default = str(field.default).lower().removesuffix(".0")
            row = rf"^\| `{field.name}` \| .* \| `?{default}`? \|"
            assert re.search(row, page, re.MULTILINE), f"{name}.md does not list {field.name}"
