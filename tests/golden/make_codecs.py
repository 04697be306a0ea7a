"""Add golden cases to the files of codecs, one file a codec. Cases that are there are never touched.

::

    python tests/golden/make_codecs.py sign sign:shrink=0.9
    python tests/golden/make_codecs.py --example sign --values "1 -2 3; 4 5 -6" --dtype F32

An example is a small case whose bytes stand in the codec's page, docs/format/ID.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from waterfill.registry import Codec, parse_spec
from waterfill.types import Array, TensorInfo, Weighting, from_float32

FOLDER = Path(__file__).parent / "codecs"


def cases(name: str) -> list[dict[str, Any]]:
    """What is kept of a codec; nothing where there is no file."""
    path = FOLDER / f"{name}.json"
    return list(json.loads(path.read_text())["cases"]) if path.exists() else []


def all_cases() -> Iterator[dict[str, Any]]:
    """Of every codec."""
    for path in sorted(FOLDER.glob("*.json")):
        yield from cases(path.stem)


def add(case: dict[str, Any]) -> None:
    """Append a case to its codec's file."""
    path = FOLDER / f"{case['codec'][0]}.json"
    path.write_text(json.dumps({"cases": [*cases(path.stem), case]}, indent=1) + "\n")


def case_of(chosen: Codec, bits: Array, info: TensorInfo, weighting: Weighting) -> dict[str, Any]:
    """A tensor as a codec writes it now, and what that decodes to."""
    parts, extra = chosen.encode(bits, info, weighting)
    return {
        "codec": chosen.spec.to_json(),
        "shape": list(info.shape),
        "dtype": info.dtype,
        "extra": extra,
        "parts": {k: v.hex() for k, v in parts.items()},
        "decoded": chosen.decode(parts, extra, info).tobytes().hex(),
    }


def usual_case(text: str) -> dict[str, Any]:
    """A random matrix of awkward shape, weighted as calibration would."""
    random = np.random.default_rng(2026)
    info = TensorInfo("golden", (40, 36), "BF16", "linear")
    bits = from_float32(random.normal(0, 0.02, info.shape).astype(np.float32), "BF16")
    inputs = random.normal(size=(200, 36)) * np.linspace(0.2, 3, 36)
    moment = (inputs.T @ inputs / 200).astype(np.float32)
    weighting = Weighting(moment, np.linspace(0.1, 10, 40).astype(np.float32))
    return case_of(parse_spec(text), bits, info, weighting)


def example_case(text: str, values: str, dtype: str) -> dict[str, Any]:
    """The matrix given, without a weighting."""
    rows = np.array([[float(v) for v in row.split()] for row in values.split(";")], np.float32)
    info = TensorInfo("example", rows.shape, dtype, "linear")
    case = case_of(parse_spec(text), from_float32(rows, dtype), info, Weighting())
    return {**case, "example": True}


def main() -> None:
    """Add what was asked for, as far as it is new."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--example", metavar="SPEC")
    parser.add_argument("--values", help="rows of numbers, apart by semicolons")
    parser.add_argument("--dtype", default="F32")
    args = parser.parse_args()
    new = [usual_case(text) for text in args.specs]
    if args.example:
        new.append(example_case(args.example, args.values, args.dtype))
    for case in new:
        same = [
            old
            for old in cases(case["codec"][0])
            if old["codec"] == case["codec"] and old.get("example") == case.get("example")
        ]
        if not same:
            add(case)


if __name__ == "__main__":
    main()
