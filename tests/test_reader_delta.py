"""The reader of patches in docs/, written from the format page alone, and waterfill agree to the bit."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import waterfill
from tests.coding.test_delta import CASES, GOLDEN, held
from tests.runtime.test_apply import states
from waterfill.coding import delta

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("reader_delta")
    finally:
        sys.path.remove(str(DOCS))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_golden_deltas(reader: ModuleType, case: Any) -> None:
    name, dtype, old, new = case
    data = (GOLDEN / f"{name}.bin").read_bytes()
    assert reader.decode(data, old, dtype).tobytes() == new.tobytes()


def test_several_blocks_and_clustered_changes(reader: ModuleType) -> None:
    old = np.resize(np.array([0x3F80, 0x3C01, 0xBB02], np.uint16), reader.BLOCK + 500)
    new = old.copy()
    new[1000:1400] += 1
    new[-40:] ^= 0x8000
    data = delta.encode(held(old, "BF16"), held(new, "BF16"), "BF16")
    assert reader.decode(data, old, "BF16").tobytes() == new.tobytes()


def test_a_whole_patch(reader: ModuleType) -> None:
    old, new = states()
    old["x"], new["x"] = np.arange(4000, dtype=np.uint64), np.arange(4000, dtype=np.uint64)
    new["x"] ^= np.random.default_rng(0).integers(0, 4, 4000).astype(np.uint64) << np.uint64(50)
    new["tied"] = new["new"].copy()
    names = {"float16": "F16", "float32": "F32", "float64": "F64", "bool": "BOOL", "int8": "I8"}
    names |= {"int64": "I64", "uint16": "U16", "uint64": "U64"}
    stored = {name: (names[array.dtype.name], array) for name, array in old.items()}
    got = reader.apply(waterfill.diff(old, new), stored)
    assert got.keys() == new.keys()
    for name, (dtype, array) in got.items():
        assert dtype == names[new[name].dtype.name] and array.shape == new[name].shape
        assert array.tobytes() == new[name].tobytes(), name


def test_the_reader_needs_numpy_alone() -> None:
    source = (DOCS / "reader_delta.py").read_text()
    roots = {
        alias.name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert roots == {"json", "math", "zlib", "numpy"} and "waterfill." not in source
