"""The reader in docs/, written from the format pages alone, and waterfill agree to the bit."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import trace
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import waterfill
from tests.coding.arrays import KINDS, make, unsigned
from tests.coding.test_huffman import GOLDEN, golden_cases
from tests.coding.test_lossless import EXAMPLE, LIES, TRUE
from tests.golden.make_artifact import ARTIFACTS, FOLDER, code, digest, save, weights
from waterfill.coding import huffman, lossless
from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.container import Reader, describe, write
from waterfill.types import (
    DTYPES,
    FLOAT_DTYPES,
    Encoded,
    Spec,
    TensorInfo,
    WaterfillError,
    Weighting,
)

DOCS = Path(__file__).parents[1] / "docs"
FILES = [DOCS / "reader.py", *sorted(DOCS.glob("reader_[!d]*.py"))]
TEXTS = (
    "raw",
    "lossless",
    "lossless:coder=rans",
    "lossless:coder=huffman",
    "integer:bits=2,group=8",
    "integer:bits=5,group=16,pack=coded",
    "integer:bits=2,group=16,outliers=0.1,solver=coordinate",
    "trellis",
    "trellis:states=1,step=0.1",
    "trellis:states=4,step=0.3",
    "trellis:states=256,step=0.02",
    "trellis:step=3.0,gains=yes",
    "trellis:step=0.001,rows=1.0",
)
Arrays = Mapping[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("reader")
    finally:
        sys.path.remove(str(DOCS))


def same(ours: Arrays, theirs: Arrays) -> None:
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        other = theirs[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape), name
        assert array.tobytes() == other.tobytes(), name


@pytest.mark.parametrize("name", ARTIFACTS)
def test_golden_artifacts_decode_to_what_they_always_did(reader: ModuleType, name: str) -> None:
    path = FOLDER / f"{name}.safetensors"
    arrays = waterfill.load(path)
    same(arrays, reader.load(path))
    assert digest(arrays) == json.loads((FOLDER / "digests.json").read_text())[name]


def test_golden_artifacts_take_the_reader_through_every_line(reader: ModuleType) -> None:
    """Else an option, a layout or a kind of model would be in the format but in no golden file."""
    tracer = trace.Trace(count=1, trace=0, ignoredirs=[sys.prefix, sys.base_prefix])
    for name in ARTIFACTS:
        tracer.runfunc(reader.load, FOLDER / f"{name}.safetensors")
    tracer.runfunc(sys.modules["reader_huffman"].huffman, b"", 0)  # no artifact has an empty one
    ran = {(Path(file).name, line) for file, line in tracer.results().counts}
    for path in FILES:
        source = path.read_text()
        missed = {
            line
            for line in function_lines(compile(source, path.name, "exec"), top=True)
            if (path.name, line) not in ran
            and "raise ValueError" not in source.split("\n")[line - 1]
        }
        assert not missed, f"{path.name}: {sorted(missed)}"


def function_lines(compiled: CodeType, top: bool = False) -> set[int]:
    """Lines with code inside functions (definitions and module level run at import)."""
    inner = [c for c in compiled.co_consts if isinstance(c, CodeType)]
    own = {line for _, _, line in compiled.co_lines() if line and line != compiled.co_firstlineno}
    is_body = not top and compiled.co_flags & 0x2  # a function, not a class
    return set().union(*map(function_lines, inner), own if is_body else set())


@given(
    items=st.lists(
        st.tuples(
            st.sampled_from(TEXTS),
            st.sampled_from(sorted(FLOAT_DTYPES)),
            st.lists(st.integers(0, 9), max_size=3).map(tuple),
            st.booleans(),
            st.floats(1e-3, 30),
        ),
        max_size=5,
    ),
    seed=st.integers(0, 2**32 - 1),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fresh_artifacts(
    reader: ModuleType,
    tmp_path: Path,
    items: list[tuple[str, str, tuple[int, ...], bool, float]],
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    coded = []
    for number, (text, dtype, shape, turned, scale) in enumerate(items):
        turned = turned and len(shape) > 1 and 0 not in shape
        info = TensorInfo(f"{number} {text}", shape, dtype, transposed=turned)
        m, n = info.matrix_shape
        inputs = random.normal(size=(n + 3, n)).astype(np.float32)
        weighting = Weighting(inputs.T @ inputs, random.lognormal(0, 2, m).astype(np.float32))
        coded.append(code(text, info, weights(info, random, scale), weighting))
    path = tmp_path / "model.safetensors"
    save(path, coded)
    same(waterfill.load(tmp_path), reader.load(tmp_path))


@given(
    rows=st.integers(1, 40), cols=st.integers(1, 40), spread=st.integers(0, 30), seed=st.integers()
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fresh_integers(reader: ModuleType, rows: int, cols: int, spread: int, seed: int) -> None:
    random = np.random.default_rng(abs(seed))
    values = random.standard_t(2, (rows, cols)) * 2.0 ** random.uniform(-2, spread, cols)
    whole = values.clip(-(2**31), 2**31 - 1).astype(np.int64)
    coding = sys.modules["reader_coding"]
    assert np.array_equal(coding.integers(encode_ints(whole), rows, cols), whole)


@pytest.fixture(scope="module")
def huffman_reader(reader: ModuleType) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        return importlib.import_module("reader_huffman")


@pytest.mark.parametrize("case", list(golden_cases()), ids=lambda case: case[0])
def test_golden_huffman_streams(huffman_reader: ModuleType, case: Any) -> None:
    name, symbols = case
    data = (GOLDEN / f"{name}.bin").read_bytes()
    assert np.array_equal(huffman_reader.huffman(data, symbols.size), symbols)
    for broken in (data[:-1], data + b"\0", b"\1\1" + data[2:]):
        with pytest.raises(ValueError):
            huffman_reader.huffman(broken, symbols.size)


@given(symbols=st.lists(st.integers(0, 255), max_size=300))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fresh_huffman_streams(huffman_reader: ModuleType, symbols: list[int]) -> None:
    whole = np.array([*symbols, 3, 4] if symbols else [], np.uint8)
    assert np.array_equal(huffman_reader.huffman(huffman.encode(whole), whole.size), whole)


@pytest.fixture(scope="module")
def lossless_reader(reader: ModuleType) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        return importlib.import_module("reader_lossless")


def read_words(lossless_reader: ModuleType, data: bytes, n: int, dtype: str) -> bytes:
    words = lossless_reader.words(data, n, DTYPES[dtype].itemsize, dtype)
    return words.astype(unsigned(dtype)).tobytes()


@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    kind=st.sampled_from(sorted(KINDS)),
    n=st.one_of(st.integers(0, 60), st.integers(60, 900)),
    coder=st.sampled_from(lossless.CODERS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fresh_lossless_streams(
    lossless_reader: ModuleType, dtype: str, kind: str, n: int, coder: str, seed: int
) -> None:
    source = make(kind, dtype, n, seed)
    data = lossless.encode(source, dtype, coder)
    assert read_words(lossless_reader, data, n, dtype) == source.tobytes()


@pytest.mark.parametrize("name", TRUE)
def test_lossless_streams_by_hand(lossless_reader: ModuleType, name: str) -> None:
    out = np.empty(EXAMPLE.size, "<u2")
    lossless.decode(TRUE[name], out, "BF16")
    assert read_words(lossless_reader, TRUE[name], EXAMPLE.size, "BF16") == out.tobytes()


# The reader is short: it makes room for as many escapes as it is told there are.
UNBOUNDED = ("more escapes than bytes", "escapes beyond all bounds")


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie not in UNBOUNDED])
def test_lossless_streams_that_lie(lossless_reader: ModuleType, lie: str) -> None:
    with pytest.raises((ValueError, IndexError, zlib.error)):
        read_words(lossless_reader, LIES[lie], EXAMPLE.size, "BF16")


def test_any_flipped_bit_is_refused_by_both(reader: ModuleType, tmp_path: Path) -> None:
    data = (FOLDER / "shared.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises((ValueError, KeyError, IndexError, TypeError)):
            reader.load(path)
        with pytest.raises(WaterfillError), Reader(path) as opened:
            list(opened.verify())


@pytest.mark.parametrize(
    "codec",
    [
        ["raw", 2, {}],
        ["raw", 0, {}],
        ["trellis", 1, {}],
        ["unheard_of", 1, {}],
        ["raw", 1, {"option": 1}],
    ],
)
def test_unknown_codecs_versions_and_options_are_refused(
    reader: ModuleType, tmp_path: Path, codec: list[Any]
) -> None:
    encoded = Encoded(Spec("raw"), TensorInfo("x", (2,), "U8"), {"bytes": b"\1\2"})
    path = tmp_path / "model.safetensors"
    write(path, [describe(encoded, {}) | {"codec": codec}], [encoded.parts.values()], {})
    with pytest.raises((ValueError, TypeError)):
        reader.load(path)
    if codec[1] != 0:
        with pytest.raises(WaterfillError):
            waterfill.load(path)


def test_the_largest_integer_has_a_symbol_of_its_own(reader: ModuleType) -> None:
    values = 2**31 - 1 - np.arange(20).reshape(4, 5) % 3
    coded = encode_ints(values)
    assert np.array_equal(sys.modules["reader_coding"].integers(coded, 4, 5), values)
    assert np.array_equal(decode_ints(coded, 4, 5), values)


def test_the_first_slice_keeps_its_index() -> None:
    info = TensorInfo("experts[0]", (1,), "U8", index=0)
    assert describe(Encoded(Spec("raw"), info, {"bytes": b"\0"}), {})["index"] == 0


def test_reader_is_independent_and_short() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        allowed = {"json", "math", "sys", "zlib", "pathlib", "numpy"}
        assert imported <= allowed | {other.stem for other in FILES}
    assert len(FILES[0].read_text().splitlines()) <= 120


def test_reader_runs_by_itself() -> None:
    path = FOLDER / "shared.safetensors"
    result = subprocess.run(
        [sys.executable, str(FILES[0]), str(path)], capture_output=True, text=True, check=True
    )
    assert "experts (3, 8, 12) float32" in result.stdout
    assert not result.stderr
