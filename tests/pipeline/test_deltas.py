"""Patches between folders: what they restore, chains of them, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import waterfill
from tests import checkpoints
from waterfill.cli import main
from waterfill.container import PATCH, Reader, write
from waterfill.pipeline import diff_to, diffing, patch, patching
from waterfill.runtime import patch as patch_file
from waterfill.sources import resolve
from waterfill.types import FormatError, WaterfillError

INDEX = "model.safetensors.index.json"


def folder(path: Path, seed: int, shards: int = 1, tensors: int = 5) -> Path:
    """A model of a few tensors that drifts a little from seed to seed."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    state: dict[str, Any] = {}
    for number in range(tensors):
        bits = rng.normal(0, 0.02, (40, 50)).astype(np.float16).view(np.uint16)
        for later in range(1, seed + 1):
            moved = np.random.default_rng(100 * later + number).random((40, 50)) < 0.04
            bits = bits + moved.astype(np.uint16)
        state[f"layers.{number}.weight"] = bits.view(np.float16)
    names = sorted(state)
    if shards == 1:
        safetensors.numpy.save_file(state, path / "model.safetensors", {"format": "pt"})
    else:
        homes = {
            n: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors"
            for i, n in enumerate(names)
        }
        for home in sorted(set(homes.values())):
            safetensors.numpy.save_file(
                {n: state[n] for n in names if homes[n] == home}, path / home
            )
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    (path / "config.json").write_text(json.dumps({"model_type": "none", "step": seed}))
    (path / "tokenizer.json").write_text("{}" * 200)
    (path / "README.md").write_text(f"step {seed}\n")
    return path


def files(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(path.iterdir())}


@pytest.fixture
def steps(tmp_path: Path) -> list[Path]:
    return [folder(tmp_path / f"step{i}", i) for i in range(4)]


def patches(steps: list[Path]) -> list[Path]:
    made = [steps[0].parent / f"{i}.patch" for i in range(len(steps) - 1)]
    for one, (a, b) in zip(made, pairwise(steps), strict=True):
        diff_to(a, b, one)
    return made


def test_a_folder_becomes_the_other_byte_for_byte(steps: list[Path], tmp_path: Path) -> None:
    result = diff_to(steps[0], steps[1], tmp_path / "p")
    assert result["nbytes"] == (tmp_path / "p").stat().st_size < result["model_nbytes"] / 3
    assert (tmp_path / "p").read_bytes() == waterfill.diff(steps[0], steps[1])
    made = patch(steps[0], [tmp_path / "p"], tmp_path / "again")
    assert files(tmp_path / "again") == files(steps[1]) and made["result"] == result["result"]
    with Reader(tmp_path / "p", (PATCH,)) as reader:
        carried = [n for n, e in reader.entries.items() if e.info.kind == "file"]
    assert carried == [patch_file.FILE + n for n in ("README.md", "config.json")]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_files_are_cut_as_the_new_model_cuts_them(before: int, after: int, tmp_path: Path) -> None:
    old = folder(tmp_path / "old", 0, before)
    new = folder(tmp_path / "new", 1, after, tensors=7)
    diff_to(old, new, tmp_path / "p")
    patch(old, [tmp_path / "p"], tmp_path / "again")
    assert files(tmp_path / "again") == files(new)
    diff_to(new, old, tmp_path / "back")
    patch(new, [tmp_path / "back"], tmp_path / "first")
    assert files(tmp_path / "first") == files(old)
    assert main(["show", str(tmp_path / "back")]) == 0


def test_chains(steps: list[Path], tmp_path: Path) -> None:
    chain = patches(steps)
    patch(steps[0], chain, tmp_path / "end")
    assert files(tmp_path / "end") == files(steps[3])
    for broken in (chain[1:], [chain[0], chain[2]], chain[::-1], [*chain, chain[0]]):
        with pytest.raises(WaterfillError, match=r"is for \w{8}"):
            patch(steps[0], broken, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_chain_in_which_tensors_come_and_go(tmp_path: Path) -> None:
    sizes = (5, 8, 3, 6)
    steps = [folder(tmp_path / f"s{i}", i, 1, n) for i, n in enumerate(sizes)]
    patch(steps[0], patches(steps), tmp_path / "end")
    assert files(tmp_path / "end") == files(steps[3])


def test_repeated_tensors_are_coded_once(tmp_path: Path) -> None:
    states = []
    for value in (0, 1):
        w = np.arange(5000, dtype=np.uint16) + np.uint16(value)
        states.append({"a": w, "b": w.copy(), "c": np.ones(3, np.float32)})
        (tmp_path / f"{value}").mkdir()
        safetensors.numpy.save_file(states[-1], tmp_path / f"{value}" / "model.safetensors")
        (tmp_path / f"{value}" / "config.json").write_text("{}")
    diff_to(tmp_path / "0", tmp_path / "1", tmp_path / "p")
    with Reader(tmp_path / "p", (PATCH,)) as reader:
        assert [e.info.group for e in reader.entries.values()] == ["", "a"]
    patch(tmp_path / "0", [tmp_path / "p"], tmp_path / "end")
    assert files(tmp_path / "end") == files(tmp_path / "1")


def test_a_chain_in_which_tensors_repeat_each_other_by_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is asked for once at each step, however they refer to each other."""
    states: list[dict[str, Any]] = []
    for step in range(24):
        w = np.arange(400, dtype=np.uint16) + np.uint16(step)
        states.append({"a": w, "b": w.copy()} if step else {"a": w, "b": w + np.uint16(9)})
    chain = [tmp_path / f"{i}.patch" for i in range(len(states) - 1)]
    for number, (one, (x, y)) in enumerate(zip(chain, pairwise(states), strict=True)):
        one.write_bytes(waterfill.diff(x, dict(sorted(y.items(), reverse=bool(number % 2)))))
    base = tmp_path / "base"
    base.mkdir()
    safetensors.numpy.save_file(states[0], base / "model.safetensors")
    (base / "config.json").write_text("{}")
    restore, calls = patch_file.Patch.restore, [0]

    def counted(*words: Any) -> Any:
        calls[0] += 1
        return restore(*words)

    monkeypatch.setattr(patch_file.Patch, "restore", counted)
    patch(base, chain, tmp_path / "end")
    end = safetensors.numpy.load_file(tmp_path / "end" / "model.safetensors")
    assert {n: t.tolist() for n, t in end.items()} == {n: t.tolist() for n, t in states[-1].items()}
    assert calls[0] < 4 * len(chain)


def test_what_is_new_is_bounded_by_the_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros over and over: what a small patch may not promise, a larger one holds as it is."""
    monkeypatch.setattr(patch_file, "most_nbytes", lambda coded: 20000 + 4 * coded)
    monkeypatch.setattr(diffing, "most_nbytes", patch_file.most_nbytes)
    new = {f"n{i}": np.zeros(4000, np.uint8) for i in range(20)} | {"z": np.zeros(90000, np.uint8)}
    data = waterfill.diff({"z": np.ones(90000, np.uint8)}, new)
    with Reader(data, (PATCH,)) as reader:
        kinds = [e.info.group or e.spec.id for n, e in reader.entries.items() if n != "z"]
    assert kinds[0] == "lossless" and kinds[1:5] == ["n0"] * 4 and "raw" in kinds
    state = waterfill.apply_({"z": np.ones(90000, np.uint8)}, data)
    assert all(not t.any() for t in state.values()) and state.keys() == new.keys()
    monkeypatch.setattr(patch_file, "most_nbytes", lambda coded: 20000 + 3 * coded)
    with pytest.raises(FormatError, match="promises 80000 bytes"):
        waterfill.apply_({"z": np.ones(90000, np.uint8)}, data)


def test_a_patch_of_states_applies_to_folders_too(steps: list[Path], tmp_path: Path) -> None:
    old, new = (safetensors.numpy.load_file(s / "model.safetensors") for s in steps[:2])
    new["extra"] = np.ones((2, 2), np.int32)
    (tmp_path / "p").write_bytes(waterfill.diff(old, new))
    patch(steps[0], [tmp_path / "p"], tmp_path / "again")
    again = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert {n: t.tobytes() for n, t in again.items()} == {n: t.tobytes() for n, t in new.items()}
    beside = files(steps[0])
    del beside["model.safetensors"]
    assert beside.items() <= files(tmp_path / "again").items()
    state = dict(old)
    diff_to(steps[0], steps[1], tmp_path / "q")
    waterfill.apply_(state, tmp_path / "q")


def test_another_base_is_refused_before_any_work(
    steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = patches(steps)
    monkeypatch.setattr(patching._Chain, "write", None)
    with pytest.raises(WaterfillError, match=r"0.patch: this patch is for \w{8}, you gave \w{8}"):
        patch(steps[2], [chain[0]], tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


def test_a_file_beside_that_differs_is_said(steps: list[Path], tmp_path: Path) -> None:
    diff_to(steps[0], steps[1], tmp_path / "p")
    (steps[0] / "tokenizer.json").write_text("[]")
    with pytest.raises(WaterfillError, match=r"tokenizer.json beside this base"):
        patch(steps[0], [tmp_path / "p"], tmp_path / "none")
    (steps[0] / "tokenizer.json").unlink()
    with pytest.raises(WaterfillError, match=r"tokenizer.json beside this base"):
        patch(steps[0], [tmp_path / "p"], tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


def test_a_failure_leaves_nothing(
    steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diff_to(steps[0], steps[1], tmp_path / "p")
    patch(steps[0], [tmp_path / "p"], tmp_path / "old")
    before = files(tmp_path / "old")
    restore, calls = patch_file.Patch.restore, [0]

    def failing(*words: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return restore(*words)

    monkeypatch.setattr(patch_file.Patch, "restore", failing)
    with pytest.raises(KeyboardInterrupt):
        patch(steps[0], [tmp_path / "p"], tmp_path / "old", force=True)
    assert files(tmp_path / "old") == before
    assert {p.name for p in tmp_path.iterdir()} == {"p", "old", *(s.name for s in steps)}

    def unreadable(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(resolve(str(steps[0]))), "read", unreadable)
    with pytest.raises(WaterfillError, match="Input/output"):
        diff_to(steps[0], steps[1], tmp_path / "q")
    assert not (tmp_path / "q").exists()

    def read_only(*_: Any, prefix: str, dir: Path) -> Any:
        raise PermissionError(13, "Permission denied", str((dir / f"{prefix}x7f3").absolute()))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WaterfillError, match=r"^cannot write q: Permission denied"):
        diff_to(steps[0], steps[1], "q")


def test_a_file_that_changes_meanwhile(steps: list[Path], tmp_path: Path) -> None:
    for changing in steps[:2]:

        def change(*_: object, file: Path = changing / "model.safetensors") -> None:
            file.write_bytes(file.read_bytes()[:-2] + b"\1\2")

        with pytest.raises(WaterfillError, match="changed while it was being read"):
            diff_to(steps[0], steps[1], tmp_path / "p", progress=change)
        assert not (tmp_path / "p").exists()


def test_only_a_patch_is_replaced(steps: list[Path], tmp_path: Path) -> None:
    for used in (steps[1] / "model.safetensors", steps[0] / "config.json"):
        before = used.read_bytes()
        with pytest.raises(WaterfillError, match="is not a patch"):
            diff_to(steps[0], steps[1], used, force=True)
        assert used.read_bytes() == before
    (tmp_path / "p").touch()
    for _ in range(2):
        with pytest.raises(WaterfillError, match="exists"):
            diff_to(steps[0], steps[1], tmp_path / "p")
        diff_to(steps[0], steps[1], tmp_path / "p", force=True)


def relabelled(
    path: Path,
    change: Callable[[dict[str, Any]], object],
    change_tensors: Callable[[list[dict[str, Any]]], object] = lambda tensors: None,
) -> None:
    """Rewrite a patch with another `about` or other entries."""
    with Reader(path, (PATCH,)) as reader:
        about = json.loads(json.dumps(reader.about))
        payloads = [list(reader.read(name).parts.values()) for name in reader.entries]
        header = json.loads(path.read_bytes()[8 : reader._data_start])
        described = json.loads(zlib.decompress(reader._index_bytes(header)))["tensors"]
    change(about)
    change_tensors(described)
    write(path, described, payloads, about, PATCH)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a weights file elsewhere": lambda a: a["files"][0].update(name="../model.safetensors"),
    "a hidden weights file": lambda a: a["files"][0].update(name=".model.safetensors"),
    "a weights file of another kind": lambda a: a["files"][0].update(name="model.bin"),
    "the same file twice": lambda a: a["files"].append(a["files"][0]),
    "no files": lambda a: a.update(files=[]),
    "files of another kind": lambda a: a.update(files=7),
    "a file without a header": lambda a: a["files"][0].pop("header"),
    "a header that is no JSON": lambda a: a["files"][0].update(header="{"),
    "a header without tensors": lambda a: a["files"][0].update(header="{}"),
    "a header that moves tensors": lambda a: a["files"][0].update(
        header=a["files"][0]["header"].replace('"shape":[40,50]', '"shape":[50,40]')
    ),
    "a header with a hole": lambda a: a["files"][0].update(
        header=a["files"][0]["header"].replace("[0,4000]", "[0,4002]")
    ),
    "a file beside elsewhere": lambda a: a["beside"].update({"../x.json": [0, ""]}),
    "code beside": lambda a: a["beside"].update({"modeling.py": [0, ""]}),
    "weights beside": lambda a: a["beside"].update({"x.safetensors": [0, ""]}),
    "a file beside of another kind": lambda a: a["beside"].update({"config.json": 3}),
    "a weights file with a drive": lambda a: a["files"][0].update(name="C:model.safetensors"),
    "a file beside that no system can name": lambda a: a["beside"].update({"\ud800.json": [0, ""]}),
    "code beside that looks like a license": lambda a: a["beside"].update({"LICENSE.py": [0, ""]}),
    "a list beside": lambda a: a.update(beside=["config.json"]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_patch_that_lies_is_refused(what: str, steps: list[Path], tmp_path: Path) -> None:
    diff_to(steps[0], steps[1], tmp_path / "p")
    relabelled(tmp_path / "p", HOSTILE[what])
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises((FormatError, WaterfillError)):
        patch(steps[0], [tmp_path / "p"], tmp_path / "made")
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("noted", ["much", [1], {}, None, True, 1e300, -1, float("nan")])
def test_what_a_patch_notes_is_shown_only_where_it_can_be(
    noted: Any, steps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diff_to(steps[0], steps[1], tmp_path / "p")
    name = "w\n\x1b[31m\ud800"
    relabelled(
        tmp_path / "p",
        lambda about: about.update(removed=[name + " gone"]),
        lambda tensors: tensors[0].update(note={"changed": noted}, name=name),
    )
    assert main(["show", str(tmp_path / "p")]) == 0
    said = capsys.readouterr().out
    first = said.splitlines()[1].split()
    assert first[:2] == ["w\\n\\x1b[31m\\ud800", "delta"] and len(first) == 3
    assert "\\ud800 gone" in said
    assert main(["patch", str(steps[0]), str(tmp_path / "p"), "-o", str(tmp_path / "none")]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_the_command_line(
    steps: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        try:
            status = main(list(words))
        except SystemExit as stop:
            status = int(stop.code or 0)
        return (status, *capsys.readouterr())

    assert run("diff", "step0", "step1", "-o", "p")[0] == 0
    assert run("diff", "step1", "step2", "-o", "q", "--json")[0] == 0
    assert run("patch", "step0", "p", "q", "-o", "end")[0] == 0
    assert files(tmp_path / "end") == files(steps[2])
    status, out, _ = run("show", "p")
    assert status == 0 and "delta" in out and "config.json" in out and "%" in out
    shown = json.loads(run("show", "p", "--json")[1])
    assert sum(row["nbytes"] for row in shown["ledger"]) == shown["nbytes"]
    assert "every checksum holds" in run("verify", "p")[1]
    for words, said in (
        (("diff", "step0", "step1", "-o", "p"), "p exists"),
        (("diff", "step0", "step1", "-o", "step2"), "is a folder; a patch is one file"),
        (("diff", "step0", "nowhere", "-o", "r"), "no folder nowhere"),
        (("patch", "step1", "p", "-o", "r"), "already the model it makes"),
        (("patch", "step0", "q", "-o", "r"), "this patch is for"),
        (("patch", "step0", "p", "-o", "end"), "end exists"),
        (("patch", "step0", "step1", "-o", "r"), "not one written by waterfill"),
        (("patch", "step0", "nothing", "-o", "r"), "expected a waterfill patch"),
        (("patch", "step0", "p", "-o", "step0", "--force"), "in use"),
        (("decompress", "p", "-o", "r"), "a patch, not a model: apply it with waterfill patch"),
    ):
        status, out, err = run(*words)
        assert (status, out) == (1, "") and said in err and err.count("\n") == 1, (words, err)
    assert run("patch", "step0", "-o", "r")[0] == 2 and run("diff", "step0", "-o", "r")[0] == 2
    assert run("diff", "step0", "step1", "-o", "p", "--force")[0] == 0
    before = files(steps[0])
    status, _, err = run("diff", "step0", "step1", "-o", "step0/model.safetensors", "--force")
    assert status == 1 and "is not a patch" in err and files(steps[0]) == before
    shutil.rmtree("end")


def test_a_model_and_a_patch_are_told_apart(steps: list[Path], tmp_path: Path) -> None:
    diff_to(steps[0], steps[1], tmp_path / "p")
    with pytest.raises(FormatError, match="a patch, not a model"):
        waterfill.load(tmp_path / "p")
    golden = Path(__file__).parents[1] / "golden" / "artifact" / "raw.safetensors"
    with pytest.raises(FormatError, match="a compressed model, not a patch"):
        waterfill.apply_({}, golden)
    assert safetensors.safe_open(tmp_path / "p", "np").keys()  # a valid file all the same


def test_what_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Of each model one tensor, and what their coding takes."""
    shape, count = (2048, 2048), 4
    nbytes = 2 * shape[0] * shape[1]
    infos = {f"t{n}": ("BF16", shape) for n in range(count)}
    for step in range(2):
        data = {}
        for number, name in enumerate(infos):
            bits = np.frombuffer(checkpoints.weights(shape), np.uint16) + 0
            bits[number::20] ^= step
            data[name] = bits.tobytes()
        checkpoints.write_file(tmp_path / str(step) / "model.safetensors", infos, data)

    def peak(act: Callable[..., Any], *words: Any, **options: Any) -> float:
        tracemalloc.start()
        act(*words, **options)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most / nbytes

    fine = tmp_path / "0"
    waterfill.diff({}, {})  # what is imported at first use counts as well
    assert peak(diff_to, fine, tmp_path / "1", tmp_path / "p") < 2.5
    assert peak(patch, fine, [tmp_path / "p"], tmp_path / "made") < 2.5
    assert files(tmp_path / "made") == files(tmp_path / "1")
    assert peak(waterfill.compress, fine, tmp_path / "out", lossless=True) < 2.9
    assert peak(waterfill.decompress, tmp_path / "out", tmp_path / "back") < 2.5


def test_files_of_no_model(tmp_path: Path) -> None:
    """No config.json, several files, no index: what compress --lossless takes."""
    infos = {"vae": {"a": ("BF16", (64, 64))}, "unet": {"b": ("F32", (4, 4)), "c": ("U8", (0,))}}
    for step in range(2):
        for name, tensors in infos.items():
            data = checkpoints.random_bytes(tensors, seed=step)
            checkpoints.write_file(tmp_path / str(step) / f"{name}.safetensors", tensors, data)
    diff_to(tmp_path / "0", tmp_path / "1", tmp_path / "p")
    patch(tmp_path / "0", [tmp_path / "p"], tmp_path / "made")
    patch(tmp_path / "0", [tmp_path / "p"], tmp_path / "made", force=True)
    assert files(tmp_path / "made") == files(tmp_path / "1")


def test_a_fine_tune_of_the_demo(tmp_path: Path) -> None:
    """Real optimiser steps in float32, saved in bf16, sent as a patch to a module in bf16."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from waterfill.runtime.torch_model import load_original

    master = load_original(resolve("demo").path, False).train()
    worker = load_original(resolve("demo").path, False).bfloat16()
    optimizer = torch.optim.AdamW(master.parameters(), lr=1e-5)
    tokens = torch.arange(128).reshape(2, 64)
    for _ in range(2):
        before = {n: t.bfloat16().clone() for n, t in master.state_dict().items()}
        master(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = {n: t.bfloat16() for n, t in master.state_dict().items()}
        sent = waterfill.diff(before, after)
        waterfill.apply_(worker, sent)
        for name, tensor in worker.state_dict().items():
            assert torch.equal(tensor.view(torch.int16), after[name].view(torch.int16)), name
        assert 20 * len(sent) < sum(t.nbytes for t in after.values())


@pytest.mark.parametrize("shards", [1, 3])
def test_artifacts_stand_for_what_they_were_made_of(tmp_path: Path, shards: int) -> None:
    old, new = (folder(tmp_path / f"step{i}", i, shards) for i in range(2))
    exact = [tmp_path / f"{one.name}.exact" for one in (old, new)]
    for one, out in zip((old, new), exact, strict=True):
        waterfill.compress(one, out, lossless=True)
    diff_to(old, new, tmp_path / "plain")
    diff_to(*exact, tmp_path / "coded")
    patch(exact[0], [tmp_path / "coded"], tmp_path / "made")
    patch(exact[0], [tmp_path / "plain"], tmp_path / "again")
    assert files(tmp_path / "made") == files(tmp_path / "again") == files(new)


def test_folders_of_weights_alone_will_do(steps: list[Path], tmp_path: Path) -> None:
    for step in steps[:2]:
        for file in step.iterdir():
            if file.suffix != ".safetensors":
                file.unlink()
    diff_to(*steps[:2], tmp_path / "p")
    patch(steps[0], [tmp_path / "p"], tmp_path / "made")
    assert files(tmp_path / "made") == files(steps[1])
