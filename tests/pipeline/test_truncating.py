"""One artifact at many sizes: truncate, load at a size, and the verbs for both."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import waterfill  # noqa: E402
from tests.commands import Shell, refused, run_here  # noqa: E402
from tests.pipeline import small  # noqa: E402
from waterfill.container import FILE_NAME, Reader, describe_entry, write  # noqa: E402
from waterfill.pipeline import record_of, show  # noqa: E402
from waterfill.runtime.sizing import open_at  # noqa: E402
from waterfill.types import BudgetError, FormatError, WaterfillError  # noqa: E402


@functools.cache
def layered() -> Path:
    """`small.model` in blocks."""
    out = small.home() / "layered"
    waterfill.compress(
        small.model(), out, bits=7.0, codec={"*": "stack"}, calibration=small.statistics(), propagate=False,
    )  # fmt: skip
    return out


def least() -> int:
    with pytest.raises(BudgetError) as error:
        open_at(layered(), 10)
    return int(str(error.value).split()[-1].replace(",", ""))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Shell:
    return functools.partial(run_here, capsys)


def test_the_whole_meets_its_size_by_parts_of_blocks() -> None:
    record = record_of(layered())
    assert record.about["budget_nbytes"] - 40 <= record.nbytes <= record.about["budget_nbytes"]
    assert any(row["codec"].startswith("stack:blocks=") for row in record.ledger)


def test_twenty_sizes() -> None:
    whole = record_of(layered()).nbytes
    asked = [int(size) for size in np.linspace(least(), whole, 20)]
    nats = []
    for size in asked:
        with open_at(layered(), size) as reader:
            # A block begun takes a right factor, and a line of header and index.
            assert 0.995 * size - 160 <= reader.nbytes <= size
        nats.append(show(layered(), size)["predicted_kl_nats"])
    assert nats == sorted(nats, reverse=True) and len(set(nats)) == 20


def test_a_cut_file_is_what_is_loaded_at_its_size(tmp_path: Path) -> None:
    whole = record_of(layered())
    for share in (0.5, 0.7, 0.9):
        size = int(share * whole.nbytes)
        out = tmp_path / str(size)
        record = waterfill.truncate(layered(), out, size=size)
        small.check_ledger(out, record, small.model())
        assert record.nbytes == (out / FILE_NAME).stat().st_size <= size
        assert record.predicted["kl_nats"] > whole.predicted["kl_nats"]
        assert any(row["why"].endswith("; cut to size") for row in record.ledger)
        assert record.about["cut_from_nbytes"] == whole.nbytes
        assert {f.name for f in out.iterdir()} == {f.name for f in layered().iterdir()}
        assert f"{record.nbytes:,} bytes" in (out / "README.md").read_text()
        assert record_of(out).about == record.about
        loaded, cut = waterfill.load(layered(), size=size), waterfill.load(out)
        assert all(small.bits_of(loaded[name]) == small.bits_of(cut[name]) for name in cut)
        with waterfill.Artifact(layered(), size) as artifact:
            assert all(artifact.read(n).nbytes == cut[n].nbytes for n in artifact.names)
        with waterfill.Artifact(out) as a, waterfill.Artifact(layered(), size) as b:
            assert all(np.array_equal(a.read(name), b.read(name)) for name in a.names)


def test_cuts_of_cuts_end_where_one_cut_does(tmp_path: Path) -> None:
    size = int(0.6 * record_of(layered()).nbytes)
    waterfill.truncate(layered(), tmp_path / "once", size=size)
    waterfill.truncate(layered(), tmp_path / "half", size=int(1.2 * size))
    waterfill.truncate(tmp_path / "half", tmp_path / "twice", size=size)
    once, twice = show(tmp_path / "once"), show(tmp_path / "twice")
    assert abs(once["nbytes"] - twice["nbytes"]) < 40
    assert once["predicted_kl_nats"] == pytest.approx(twice["predicted_kl_nats"], rel=0.05)


def test_a_size_that_is_large_enough_changes_nothing(tmp_path: Path) -> None:
    waterfill.truncate(layered(), tmp_path / "all", size="1GB")
    assert (tmp_path / "all" / FILE_NAME).read_bytes() == (layered() / FILE_NAME).read_bytes()


def test_models_at_a_size() -> None:
    size = int(0.6 * record_of(layered()).nbytes)
    ids = torch.arange(24).reshape(1, -1)
    expected = waterfill.load(layered(), size=size)
    model = waterfill.load_model(layered(), size=size)
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(model.get_parameter(name).detach().float().numpy(), expected[name])
    with torch.no_grad():
        dense = model(ids).logits
        coded = waterfill.load_model(layered(), size=size, residency="coded")
        assert torch.allclose(coded(ids).logits, dense, rtol=1e-4, atol=1e-4)
    with pytest.raises(WaterfillError, match="waterfill truncate"):
        coded.save_pretrained(layered().parent / "saved")


def test_what_cannot_be_cut_says_so(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"one size alone.*stack"):
        waterfill.load(small.artifact(), size=1000)
    with pytest.raises(BudgetError, match="what cannot be left out takes"):
        waterfill.truncate(layered(), tmp_path / "out", size=100)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found_at_any_size(tmp_path: Path) -> None:
    data = bytearray((layered() / FILE_NAME).read_bytes())
    with Reader(layered()) as reader:
        largest = max(reader.entries.values(), key=lambda e: e.nbytes)
        at = reader._data_start + largest.parts["layer1"][0]
    data[at] ^= 1
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(FormatError, match="checksum"):
        waterfill.load(tmp_path, size=int(0.8 * len(data)))


def test_verbs(run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    size = str(int(0.7 * record_of(layered()).nbytes))
    done = run("truncate", layered(), "--size", size, "-o", "smaller")
    assert done.status == 0 and f"{int(size):,} allowed" in done.out and "next: " in done.out
    refused(run("truncate", layered(), "--bits", "4", "-o", "smaller"), "--force")
    again = run("truncate", layered(), "--bits", "4", "-o", "smaller", "--force", "--json").json
    assert 3.9 < again["bits_per_weight"] <= 4
    assert run("verify", "smaller").status == 0
    done = run("load", layered(), "--size", size, "--tensors")
    assert done.status == 0 and "tensors cut" in done.out and "lm_head.weight" in done.out
    loaded = run("load", layered(), "--size", size, "--json").json
    assert loaded["nbytes"] <= int(size) < loaded["whole_nbytes"]
    assert sum(row["nbytes"] for row in loaded["tensors"]) == loaded["nbytes"]
    whole = run("load", layered(), "--json").json
    assert whole["nbytes"] == whole["whole_nbytes"]
    words = ["--against", small.model(), "--text", small.text(), "--window", "64", "--json"]
    kl = [run("eval", layered(), "--size", s, *words).json["kl_nats"] for s in (size, "1MB")]
    assert kl[0] > kl[1]
    stored = json.loads((layered() / "waterfill.json").read_text())
    assert not stored["metrics"], "figures of a part are not those of the whole"
    refused(run("load", small.artifact(), "--size", "1KB"), "one size alone")


@pytest.mark.parametrize("note", [{"nats": "1"}, {"nats": [1.0]}, {"nats": 10**400}, {"why": {}}])
def test_a_note_that_is_none_is_refused(note: dict[str, object], tmp_path: Path) -> None:
    with Reader(layered()) as reader:
        described = [describe_entry(entry) for entry in reader.entries.values()]
        payloads = [reader.read(name).parts.values() for name in reader.entries]
        described[0]["note"] = note
        write(tmp_path / FILE_NAME, described, payloads, reader.about)
    for look in (show, functools.partial(waterfill.truncate, out=tmp_path / "out", ratio=1)):
        with pytest.raises(FormatError, match="its note is not as specified"):
            look(tmp_path)
