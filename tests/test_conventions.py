"""Small checks that keep the house in order."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from waterfill.types import codec_ids, find_codec

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*(ROOT / "src").rglob("*.py"), *(ROOT / "cpp").iterdir(), *(ROOT / "bench").glob("*.py")]
)
PYTHON = [p for p in SOURCES if p.suffix == ".py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_file_over_500_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("name", codec_ids())
def test_a_codec_is_one_file_with_a_page(name: str) -> None:
    assert find_codec(name).__module__ == f"waterfill.codecs.{name}"
    assert (ROOT / "docs" / "format" / f"{name}.md").is_file()


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_runs_what_it_reads(path: Path) -> None:
    """No eval, exec, pickle or torch.load: bytes from a file are data."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in (
                "eval",
                "exec",
                "torch.load",
                "pickle.load",
                "pickle.loads",
                "yaml.load",
            )
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "marshal", "shelve", "dill"} & set(names)


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            quiet = all(isinstance(s, ast.Pass) for s in node.body)
            assert not (broad and quiet)
