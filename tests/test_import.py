"""`import waterfill` is quick and loads nothing heavy; what decodes does so without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import waterfill

HEAVY = ("torch", "transformers", "tokenizers", "huggingface_hub", "rich", "jinja2", "numpy")
BOUND_MS = 100.0


def python(code: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that turns warnings into errors."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST"))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, words)],
        capture_output=True, text=True, check=True, timeout=60, env=environment,
    )  # fmt: skip


def loaded(code: str, *words: str | Path) -> set[str]:
    """Which heavy packages a fresh interpreter has after some code."""
    ask = f"import json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    return set(json.loads(python(f"{code}\n{ask}", *words).stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    assert loaded("import waterfill") == set()


def test_the_grammar_loads_nothing_heavy() -> None:
    code = "import waterfill.cli as c\nc.build_parser(c.VERBS)"
    assert loaded(code) <= {"numpy"}


@pytest.mark.parametrize(
    "words",
    [
        ["show", "golden"],
        ["verify", "golden"],
        ["report", "golden", "-o", "page.html"],
        ["codecs"],
        ["--help"],
    ],
)
def test_verbs_that_need_no_model_load_no_torch(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    golden = Path(__file__).parent / "golden" / "artifact" / "trellis.safetensors"
    words = [str(golden) if w == "golden" else w for w in words]
    code = (
        "import sys\nfrom waterfill.cli import main\n"
        "try:\n    assert main(sys.argv[1:]) == 0\nexcept SystemExit as stop:\n    assert not stop.code"
    )
    assert loaded(code, *words) <= {"numpy", "jinja2"}


def test_import_is_quick(record_property: pytest.RecordProperty) -> None:
    def best(code: str) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            python(code)
            times.append(time.perf_counter() - start)
        return 1000 * min(times)

    took = best("import waterfill") - best("pass")
    record_property("import_ms", round(took, 1))
    assert took < BOUND_MS, f"{took:.1f} ms over a bare interpreter, best of 7"


def test_all_is_what_dir_shows() -> None:
    assert sorted(waterfill.__all__) == sorted(dir(waterfill))
    assert len(set(waterfill.__all__)) == len(waterfill.__all__)


@pytest.mark.parametrize("name", waterfill.__all__)
def test_public_names_resolve(name: str) -> None:
    if name in ("compare", "compress", "load_model"):
        pytest.importorskip("transformers")
    found = getattr(waterfill, name)
    assert isinstance(found, str) or found.__doc__


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="compres"):
        waterfill.compres  # noqa: B018


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "tokenizers", "safetensors"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import hashlib, waterfill
"""


@pytest.mark.parametrize("name", ["trellis", "integer", "lossless", "raw"])
def test_load_without_torch(name: str) -> None:
    golden = Path(__file__).parent / "golden" / "artifact" / f"{name}.safetensors"
    code = (
        f"{BLOCKED}\nfor name, array in waterfill.load(sys.argv[1]).items():\n"
        "    print(name, array.shape, array.dtype, hashlib.sha256(array.tobytes()).hexdigest())"
    )
    want = waterfill.load(golden)
    lines = python(code, golden).stdout.splitlines()
    assert want and len(lines) == len(want)
    import hashlib

    for line, (tensor, array) in zip(lines, want.items(), strict=True):
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        assert line == f"{tensor} {array.shape} {array.dtype} {digest}"


def test_load_without_the_native_core() -> None:
    golden = Path(__file__).parent / "golden" / "artifact" / "trellis.safetensors"
    code = (
        "import sys, waterfill\nsys.modules['waterfill._core'] = None\n"
        "print(sum(a.nbytes for a in waterfill.load(sys.argv[1]).values()))"
    )
    want = sum(a.nbytes for a in waterfill.load(golden).values())
    assert int(python(code, golden).stdout) == want


def test_patches_without_torch() -> None:
    code = (
        f"{BLOCKED}\nimport numpy as np\nold, new = np.zeros(99, 'f2'), np.ones(99, 'f2')\n"
        "state = {'w': old.copy()}\n"
        "waterfill.apply_(state, waterfill.diff({'w': old}, {'w': new}))\n"
        "print(state['w'].sum())"
    )
    assert python(code).stdout == "99.0\n"


def test_what_needs_torch_says_so_without_it() -> None:
    code = (
        f"{BLOCKED}\ntry:\n    waterfill.load_model(sys.argv[1])\n"
        "except waterfill.WaterfillError as error:\n    print(error)"
    )
    assert "pip install 'waterfill[hf]'" in python(code, "anywhere").stdout
