"""Plans written to disk and compressed by: kept to, byte for byte, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import waterfill
from tests.pipeline import small
from waterfill.pipeline import plan_json, price_statistics, show
from waterfill.registry import parse_spec
from waterfill.types import BudgetError, WaterfillError

RULES: dict[str, Any] = {"keep": ["*q_proj*"], "codec": {"*mlp*": "integer"}}
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def write_plan(folder: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """A plan of the small model at ten bits, perhaps changed by hand."""
    made = plan_json(price_statistics(small.statistics(), **RULES), bits=10)
    if change is not None:
        change(made)
    (folder / "plan.json").write_text(json.dumps(made))
    return folder / "plan.json"


def row_of(plan: dict[str, Any], name: str) -> Any:
    return next(r for r in plan["choices"] if r["name"] == name)


def by_plan(tmp_path: Path, plan: Path, out: str = "out", **options: Any) -> Any:
    return waterfill.compress(small.model(), tmp_path / out, plan=plan, **options)


def test_choices_are_kept_to(tmp_path: Path) -> None:
    # A little room: sizes in a plan are estimates, and a tensor gives way where they were too kind.
    plan = write_plan(tmp_path, lambda made: made.update(budget_nbytes=made["budget_nbytes"] + 300))
    record = by_plan(tmp_path, plan)
    table = json.loads(plan.read_text())
    assert record.nbytes <= record.about["budget_nbytes"] == table["budget_nbytes"]
    rows = {r["name"]: r for r in record.ledger[:-1]}
    assert list(rows) == [r["name"] for r in table["choices"]]
    for row in table["choices"]:
        assert rows[row["name"]]["codec"] == row["codec"]
        assert rows[row["name"]]["why"] == row["why"]
    assert rows[Q]["why"] == "kept exact by --keep"


def test_an_artifact_is_a_plan_and_gives_the_same_bytes(tmp_path: Path) -> None:
    options = {"size": 14_000, "calibration": small.statistics(), **RULES}
    waterfill.compress(small.model(), tmp_path / "first", **options)
    by_plan(tmp_path, tmp_path / "first", "second", calibration=small.statistics())
    small.same_files(tmp_path / "first", tmp_path / "second")
    plan = write_plan(tmp_path)
    by_plan(tmp_path, plan, "third")
    by_plan(tmp_path, tmp_path / "third", "fourth", calibration=small.statistics())
    by_plan(tmp_path, plan, "fifth")
    small.same_files(tmp_path / "third", tmp_path / "fourth")
    small.same_files(tmp_path / "third", tmp_path / "fifth")


def test_a_plan_changed_by_hand(tmp_path: Path) -> None:
    def change(plan: dict[str, Any]) -> None:
        row_of(plan, UP)["codec"] = "integer:bits=2,group=8"

    record = by_plan(tmp_path, write_plan(tmp_path, change))
    assert {r["name"]: r["codec"] for r in record.ledger}[UP] == "integer:bits=2,group=8"


def test_a_little_over_budget_moves_the_fewest(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    need = by_plan(tmp_path, plan).nbytes
    table = json.loads(plan.read_text())
    plan.write_text(json.dumps({**table, "budget_nbytes": need - 40}))
    record = by_plan(tmp_path, plan, force=True)
    assert record.nbytes <= need - 40
    planned = {r["name"]: r["codec"] for r in table["choices"]}
    moved = [r for r in record.ledger[:-1] if r["codec"] != planned[r["name"]]]
    assert 1 <= len(moved) <= 2
    for row in moved:
        assert parse_spec(row["codec"]).id == parse_spec(planned[row["name"]]).id
    plan.write_text(json.dumps({**table, "budget_nbytes": int(0.9 * need)}))
    with pytest.raises(BudgetError, match="choices of the plan take"):
        by_plan(tmp_path, plan, force=True)
    assert show(tmp_path / "out")["nbytes"] == record.nbytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p["choices"].pop(3), "says nothing of "),
        (lambda p: row_of(p, Q).update(name="zzz"), f"says nothing of {Q}"),
        (lambda p: p["choices"].append({**p["choices"][0], "name": "zzz"}), "has no zzz"),
        (lambda p: row_of(p, UP).update(codec="nonsense"), "known: .*integer"),
        (lambda p: row_of(p, UP).pop("codec"), "lacks or garbles 'codec'"),
        (
            lambda p: row_of(p, "model.norm.weight").update(codec="integer"),
            "cannot take model.norm",
        ),
        (lambda p: p.pop("choices"), "holds no plan; `waterfill plan"),
        (lambda p: p.update(version=2), "version 2"),
        (lambda p: p.update(budget_nbytes=0), "positive"),
        (lambda p: p.update(statistics="/no/such"), "gone; plan again, or .*--calibrate"),
        (lambda p: p.update(statistics_digest="0"), "other statistics now"),
        (lambda p: p.update(keep=["zzz"]), "zzz"),
    ],
)
def test_plans_that_do_not_fit(change: Any, words: str, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, change)
    with pytest.raises(WaterfillError, match=words):
        by_plan(tmp_path, plan)
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_model(tmp_path: Path) -> None:
    other = small.make_model(tmp_path / "other", seed=1)
    with pytest.raises(WaterfillError, match="calibrate again"):
        waterfill.compress(other, tmp_path / "out", plan=write_plan(tmp_path))


@pytest.mark.parametrize("options", [{"bits": 3}, {"keep": ["*norm*"]}, {"codec": {"*": "raw"}}])
def test_nothing_is_named_beside_a_plan(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WaterfillError, match="of its own"):
        by_plan(tmp_path, write_plan(tmp_path), **options)


def test_a_plan_is_not_replaced_by_its_product(tmp_path: Path) -> None:
    shutil.copytree(small.artifact(), tmp_path / "out")
    with pytest.raises(WaterfillError, match="in use"):
        by_plan(tmp_path, tmp_path / "out", calibration=small.statistics(), force=True)
