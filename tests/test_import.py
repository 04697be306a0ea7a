"""The front door opens quickly, and numpy alone is enough to read a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import waterfill

GOLDEN = Path(__file__).parent / "golden" / "artifact" / "trellis.safetensors"


def python(code: str) -> str:
    """Run code in a fresh interpreter; its stdout."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, waterfill; print(*{'torch', 'transformers', 'rich', 'jinja2', 'numpy'} & set(sys.modules))"
    assert python(code).split() == []


def test_import_is_quick() -> None:
    # The best of several: this asks what the import costs, not what else the machine is doing.
    code = "import time; t = time.perf_counter(); import waterfill; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(5)) < 0.1


def test_what_is_public_is_what_shows() -> None:
    assert sorted(waterfill.__all__) == sorted(dir(waterfill))
    for name in waterfill.__all__:
        assert getattr(waterfill, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(waterfill, "nonsense")


def test_a_file_opens_where_torch_cannot_be_imported() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'rich', 'jinja2', 'tokenizers'): sys.modules[name] = None\n"
        f"import waterfill; print(len(waterfill.load({str(GOLDEN)!r})))"
    )
    assert int(python(code)) > 0


def test_a_file_opens_without_the_native_core() -> None:
    code = (
        "import sys\n"
        "sys.modules['waterfill._core'] = None\n"
        f"import waterfill; print(len(waterfill.load({str(GOLDEN)!r})))"
    )
    assert int(python(code)) > 0
