"""Ways to spend a budget, on a real file."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import waterfill  # noqa: E402
from tests import commands  # noqa: E402
from tests.pipeline import small  # noqa: E402
from waterfill.calibrate.influence import influence  # noqa: E402
from waterfill.pipeline import evolving, price_statistics  # noqa: E402
from waterfill.plan.allocation import allocators, find_allocator  # noqa: E402
from waterfill.sources import open_source  # noqa: E402
from waterfill.types import SpecError  # noqa: E402

CLOSED = [name for name in allocators() if not find_allocator(name).starts_from]
BITS = {"integer": 7.0, "trellis": 4.5}  # of a model so small that headers are a third of it


def compress(out: Path, codec: str = "trellis", **options: Any) -> Any:
    options = {
        "bits": BITS[codec],
        "calibration": small.statistics(),
        "propagate": False,
        **options,
    }
    return waterfill.compress(small.model(), out, codec={"*": codec}, **options)


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Searches end after so many generations, whatever the clock says."""

    def limit(count: int) -> None:
        bounded = partial(evolving.evolve, generations=count)
        monkeypatch.setattr(sys.modules["waterfill.pipeline.compress"], "evolve", bounded)

    return limit


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("codec", ["integer", "trellis"])
def test_within_the_budget_and_on_record(name: str, codec: str, tmp_path: Path) -> None:
    record = compress(tmp_path / "out", codec, allocate=name)
    budget = record.about["budget_nbytes"]
    assert record.nbytes == (tmp_path / "out" / "model.safetensors").stat().st_size <= budget
    if codec == "trellis":
        assert budget - record.nbytes <= max(64, budget / 1000)  # the slack is spent
    assert record.about["allocate"] == name
    small.check_ledger(tmp_path / "out", record, small.model())


def test_an_artifact_as_a_plan_keeps_its_allocation(tmp_path: Path) -> None:
    first = compress(tmp_path / "out", "integer", allocate="zd")
    again = waterfill.compress(
        small.model(), tmp_path / "again", plan=tmp_path / "out", calibration=small.statistics(),
        propagate=False,
    )  # fmt: skip
    assert again.about["allocate"] == "zd" and again.nbytes == first.nbytes


@pytest.mark.parametrize("name", CLOSED)
def test_planned_without_encoding(name: str, run: commands.Shell, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    stats = str(small.statistics())
    run("plan", stats, "--bits", "7", "--codec", "*=integer", "--allocate", name, "-o", str(file))
    table = json.loads(file.read_text())
    assert table["allocate"] == name
    assert sum(row["nbytes"] for row in table["choices"]) <= table["budget_nbytes"]
    bits = {row["codec"] for row in table["choices"] if row["codec"].startswith("integer")}
    assert bits and (len(bits) == 1 or name != "uniform")


def test_what_cannot_be(run: commands.Shell, tmp_path: Path) -> None:
    stats, out = small.statistics(), tmp_path / "out"
    done = run("plan", stats, "--bits", "5", "--allocate", "evolutionary")
    commands.refused(done, "waterfill compress --allocate evolutionary")
    commands.usage(run("plan", stats, "--bits", "5", "--allocate", "best"), "hull", "uniform")
    commands.usage(run("compress", "m", "-o", out, "--plan", "p", "--allocate", "lim"), "leave")
    commands.usage(run("compress", "m", "-o", out, "--lossless", "--allocate", "lim"), "--allocate")
    done = run("compress", "m", "-o", out, "--bits", "3", "--minutes", "3", "--allocate", "lim")
    commands.usage(done, "evolutionary")
    for text in ("0", "x", "nan"):
        done = run("compress", "m", "-o", out, "--bits", "3", "--minutes", text)
        commands.usage(done, "minutes")
    with pytest.raises(SpecError, match="an allocation of its own"):
        waterfill.compress(small.model(), out, plan=small.artifact(), allocate="uniform")
    with pytest.raises(SpecError, match="allocate has no meaning"):
        waterfill.compress(small.model(), out, lossless=True, allocate="uniform")
    with pytest.raises(SpecError, match="no allocator is called 'best'"):
        compress(out, allocate="best")
    assert not out.exists()


def test_influence_is_of_the_block_a_tensor_is_in() -> None:
    statistics = price_statistics(small.statistics()).statistics
    found = influence(open_source(small.model()), statistics.sample)
    block = {name for name in statistics.infos if ".layers.0." in name}
    assert block == found.keys() and len(set(found.values())) == 1
    model = waterfill.load_model(small.artifact())
    with torch.no_grad():
        model.load_state_dict(
            {n: torch.from_numpy(a) for n, a in small.arrays_of(small.model()).items()}
        )
        ids = torch.from_numpy(statistics.sample)
        states = {}
        model.model.layers[0].register_forward_hook(
            lambda _, given, out: states.update(x=given[0], y=out)
        )
        model(ids)
    cosine = torch.nn.functional.cosine_similarity(states["x"], states["y"], dim=-1)
    assert found.popitem()[1] == pytest.approx(float((1 - cosine).mean()), rel=1e-4)


def kl(record: Any) -> float:
    return float(record.predicted["kl_nats_calibration"])


@pytest.mark.parametrize("codec", ["integer", "trellis"])
def test_evolution_is_never_worse_and_goes_on_where_it_stopped(
    codec: str, generations: Any, tmp_path: Path
) -> None:
    hull = compress(tmp_path / "hull", codec)
    generations(4)
    record = compress(tmp_path / "whole", codec, allocate="evolutionary")
    assert record.about["allocate"] == "evolutionary"
    assert record.nbytes <= record.about["budget_nbytes"]
    assert kl(record) <= kl(hull)
    small.check_ledger(tmp_path / "whole", record, small.model())

    def interrupt(stage: str, done: int, total: int) -> None:
        state = tmp_path / "parts.work" / "search.json"
        if (
            stage == "evolving"
            and state.exists()
            and json.loads(state.read_text())["generation"] == 2
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "parts", codec, allocate="evolutionary", progress=interrupt)
    assert not (tmp_path / "parts").exists()
    compress(tmp_path / "parts", codec, allocate="evolutionary")
    small.same_files(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts.work").exists()


def test_no_time_is_the_file_it_starts_from(tmp_path: Path) -> None:
    compress(tmp_path / "hull")
    record = compress(tmp_path / "none", allocate="evolutionary", minutes=1e-9)
    assert "no better file" in record.about["warnings"][0]
    small.same_files(tmp_path / "hull", tmp_path / "none")


def test_evolution_judges_by_text_it_has_not_seen(
    generations: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A search that is led astray gives the file that it began with."""
    generations(3)
    hull = compress(tmp_path / "hull")
    honest = evolving.Tried.harms
    monkeypatch.setattr(evolving.Tried, "harms", lambda *given: [-x for x in honest(*given)])
    record = compress(tmp_path / "out", allocate="evolutionary")
    assert kl(record) == kl(hull)
    small.same_files(tmp_path / "hull", tmp_path / "out")
