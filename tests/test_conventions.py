"""Small checks that keep the house in order."""

from __future__ import annotations

import ast
import importlib
import tokenize
from pathlib import Path

import pytest

from waterfill.registry import codec_ids, find_codec

ROOT = Path(__file__).parents[1]
PYTHON = sorted((ROOT / "src").rglob("*.py"))
SOURCES = [
    *PYTHON,
    *sorted((ROOT / "bench").rglob("*.py")),
    *sorted(p for p in (ROOT / "cpp").rglob("*") if p.suffix in (".h", ".hpp", ".cpp")),
]
CODECS = sorted(
    p.stem for p in (ROOT / "src/waterfill/codecs").glob("*.py") if not p.stem.startswith("_")
)
LONGEST = 500
LONGEST_CODEC = 250
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_too_long(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= LONGEST, f"{lines} lines: split it"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nothing_runs_code_from_files(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                raise AssertionError(f"line {node.lineno}: {name}()")
            case ast.Import(names=names):
                found = {alias.name.partition(".")[0] for alias in names} & FORBIDDEN_MODULES
                assert not found, f"line {node.lineno}: import {found}"
            case ast.ImportFrom(module=str(module)):
                top = module.partition(".")[0]
                assert top not in FORBIDDEN_MODULES, f"line {node.lineno}: from {module}"
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                raise AssertionError(f"line {node.lineno}: torch.load")
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                raise AssertionError("allow_pickle=True")
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                raise AssertionError("code of a model is run only if the user says so")
            case ast.keyword(arg="shell", value=ast.Constant(value=True)):
                raise AssertionError("shell=True")


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            quiet = all(isinstance(s, ast.Pass) for s in node.body)
            assert not (broad and quiet), f"line {node.lineno}"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree) or not tree.body, "no docstring"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nothing_is_left_for_later(path: Path) -> None:
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                marks = [m for m in ("TODO", "FIXME", "XXX") if m in token.string]
                assert not marks, f"line {token.start[0]}: {token.string}"


def test_the_gallery_is_what_is_registered() -> None:
    assert CODECS and set(CODECS) <= set(codec_ids())


@pytest.mark.parametrize("name", CODECS)
def test_file_name_is_codec_id(name: str) -> None:
    module = importlib.import_module(f"waterfill.codecs.{name}")
    codec = find_codec(name)
    assert codec.id == name and codec.__module__ == module.__name__
    assert codec.version >= 1 and codec.__doc__


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_has_its_page_and_golden_bytes(name: str) -> None:
    page = ROOT / "docs" / "format" / f"{name}.md"
    assert page.is_file() and len(page.read_text("utf-8")) > 300, f"write {name_of(page)}"
    assert (ROOT / "tests" / "golden" / "codecs" / f"{name}.json").is_file()


@pytest.mark.parametrize("name", CODECS)
def test_no_codec_is_long(name: str) -> None:
    path = ROOT / "src" / "waterfill" / "codecs" / f"{name}.py"
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST_CODEC


def test_golden_folders_are_not_empty() -> None:
    for folder in ("codecs", "artifact", "rans", "huffman", "delta"):
        assert len(list((ROOT / "tests" / "golden" / folder).iterdir())) >= 4
