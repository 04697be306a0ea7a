"""Methods by sizes: real cells, kept one by one, gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import waterfill
from tests.pipeline import small
from waterfill import compare_methods
from waterfill.pipeline import methods
from waterfill.types import BudgetError, SpecError, WaterfillError

OPTIONS: dict[str, Any] = {"window": 32, "tokens": 64}


def compared(out: Path, names: list[str], sizes: list[str]) -> dict[str, Any]:
    return compare_methods(
        small.model(), out, methods=names, sizes=sizes, text=[small.text()],
        calibration=small.statistics(), **OPTIONS,
    )  # fmt: skip


def test_every_cell_is_a_file_of_its_size_and_its_harm(tmp_path: Path) -> None:
    out = tmp_path / "compared"
    result = compared(out, ["integer", "trellis"], ["6", "7", "30%"])
    assert json.loads((out / "comparison.json").read_text()) == result
    assert [(c["method"], c["asked"]) for c in result["cells"]] == [
        (method, size) for method in ("integer", "trellis") for size in ("6", "7", "30%")
    ]
    for cell in result["cells"]:
        assert 0 < cell["nbytes"] <= cell["budget_nbytes"]
        assert cell["kl_nats"] > 0 and sum(cell["chosen"].values()) == pytest.approx(1, abs=1e-3)
        assert cell["method"] in cell["chosen"]
    by = {(c["method"], c["asked"]): c["kl_nats"] for c in result["cells"]}
    assert by["trellis", "7"] < by["trellis", "6"]
    for best in result["best"]:
        assert best["kl_nats"] == min(v for (_, asked), v in by.items() if asked == best["asked"])
    assert result["best"][0]["options"] == ["--bits", "6"]
    assert result["best"][2]["options"] == ["--ratio", "30%"]
    assert not list(out.rglob("*.safetensors")), "artifacts are removed"


def test_a_comparison_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "compared"
    made: list[Any] = []
    whole = methods.compress

    def stopped(*args: Any, **options: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(options["codec"])
        return whole(*args, **options)

    monkeypatch.setattr(methods, "compress", stopped)
    with pytest.raises(KeyboardInterrupt):
        compared(out, ["integer", "raw"], ["6", "7"])
    assert len(made) == 2
    monkeypatch.setattr(methods, "compress", whole)
    kept = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    result = compared(out, ["integer", "trellis"], ["6", "7"])
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert len(result["cells"]) == 4 == len(list((out / "cells").iterdir()))


def test_a_size_that_a_method_cannot_reach_is_a_cell_that_says_so(tmp_path: Path) -> None:
    result = compared(tmp_path / "compared", ["raw"], ["6"])
    (cell,) = result["cells"]
    assert "too small" in cell["error"] and "kl_nats" not in cell
    assert result["best"] == []


def test_the_same_choices_make_the_same_file_whoever_named_the_codec(tmp_path: Path) -> None:
    for name, codec in (("free", {}), ("named", {"*": "trellis"})):
        waterfill.compress(
            small.model(), tmp_path / name, bits=6, codec=codec, calibration=small.statistics(), propagate=False,
        )  # fmt: skip
    small.same_files(tmp_path / "free", tmp_path / "named")


def test_methods_as_they_are_written() -> None:
    method = methods.parse_method("integer:bits=3,solver=nearest@uniform+pv")
    assert method.codec == "integer:bits=3,solver=nearest"
    assert method.options == {"allocate": "uniform", "tune": "pv"}
    assert methods.parse_method("auto").options == {}
    for wrong in ("", "nothing", "integer:bits=1", "@hull", "integer@hul", "integer+nothing"):
        with pytest.raises(SpecError):
            methods.parse_method(wrong)
    every = methods.every_method()
    assert "auto" in every and "trellis" in every and "raw" not in every


def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    out = tmp_path / "compared"
    for names, sizes, error in (
        (["nothing"], ["3"], SpecError),
        (["integer"], ["half"], BudgetError),
        (["integer"], ["3", "0"], BudgetError),
    ):
        with pytest.raises(error):
            compared(out, names, sizes)
    common: dict[str, Any] = {"methods": ["integer"], "calibration": small.statistics()}
    with pytest.raises(SpecError, match="int8"):
        compare_methods(small.model(), out, activations="int3", **common)
    with pytest.raises(FileNotFoundError):
        compare_methods(small.model(), out, text=[tmp_path / "no.txt"], **common)
    assert not out.exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WaterfillError, match="other things"):
        compared(tmp_path, ["integer"], ["6"])
    with pytest.raises(WaterfillError, match="is a file"):
        compared(tmp_path / "notes.txt", ["integer"], ["6"])
    out = tmp_path / "compared"
    compared(out, ["integer"], ["8"])
    table = json.loads((out / "comparison.json").read_text())
    (out / "comparison.json").write_text(json.dumps({**table, "fingerprint": "other"}))
    with pytest.raises(WaterfillError, match="another model"):
        compared(out, ["integer"], ["8"])
    shutil.rmtree(out)
