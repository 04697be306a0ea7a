"""calibrate(): resuming, refusing, falling back, and whether its predictions come true."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from waterfill.calibrate import Statistics, calibrate, run  # noqa: E402
from waterfill.calibrate.names import jobs_for, place  # noqa: E402
from waterfill.calibrate.stream import build_skeleton  # noqa: E402
from waterfill.sources import FolderSource  # noqa: E402
from waterfill.types import FormatError, WaterfillError  # noqa: E402

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for name in ("llama", "mixtral"):
        tiny.tiny_model(name, folder / name)
    tiny.write_text(folder)
    return folder


def contents(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def small(source: FolderSource, folder: Path, home: Path, **options: Any) -> Statistics:
    options = {"texts": [home / "text.txt"], "tokens": 512, "window": 64, **options}
    return calibrate(source, folder, **options)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [3, 10, 16])
def test_an_interrupted_run_is_continued(
    after: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BATCH_TOKENS", 128)
    source = FolderSource(home / "mixtral")
    small(source, tmp_path / "whole", home)
    calls = []

    def stop(done: int, total: int, what: str) -> None:
        calls.append(done)
        if len(calls) == after:
            raise Stop

    with pytest.raises(Stop):
        small(source, tmp_path / "again", home, progress=stop)
    with pytest.raises(WaterfillError, match="interrupted: run it again"):
        Statistics.open(tmp_path / "again")
    later: list[int] = []
    small(source, tmp_path / "again", home, progress=lambda *a: later.append(a[0]))
    assert len(later) == 4 * 4 - (after - 1) // 4 * 4  # batches that were in are not run again
    assert contents(tmp_path / "whole") == contents(tmp_path / "again")
    before = (tmp_path / "again" / "statistics.json").stat().st_mtime_ns
    done = small(source, tmp_path / "again", home)
    assert (tmp_path / "again" / "statistics.json").stat().st_mtime_ns == before
    assert done.digest == Statistics.open(tmp_path / "whole").digest


def test_batches_add_up(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(home / "llama")
    one = small(source, tmp_path / "one", home, method="none")
    monkeypatch.setattr(run, "BATCH_TOKENS", 64)
    many = small(source, tmp_path / "many", home, method="none")
    assert one.protocol["method"] == "none"
    for name in one.infos:
        a, b = one.weighting(name), many.weighting(name)
        if a is not None and b is not None and a.second_moment is not None:
            np.testing.assert_allclose(a.second_moment, b.second_moment, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(a.row_weights.sum(), 1, rtol=1e-5)


def test_text_that_will_not_do(home: Path, tmp_path: Path) -> None:
    source = FolderSource(home / "llama")
    text = tmp_path / "t.txt"
    for words, match in [("", "is empty"), (" \n ", "is empty"), ("a" * 63, "has 63 tokens")]:
        text.write_text(words)
        with pytest.raises(WaterfillError, match=match):
            calibrate(source, tmp_path / "s", [text])
    with pytest.raises(WaterfillError, match="cannot read"):
        calibrate(source, tmp_path / "s", [tmp_path / "none.txt"])
    with pytest.raises(WaterfillError, match="takes 128 tokens"):
        calibrate(source, tmp_path / "s", [home / "text.txt"], window=129)
    with pytest.raises(WaterfillError, match="no method 'x'"):
        calibrate(source, tmp_path / "s", method="x")
    text.write_text("a" * 70)
    statistics = calibrate(source, tmp_path / "s", [text])
    assert "windows were cut to 70" in statistics.notes[""]
    assert statistics.protocol["window"] == 70 and statistics.protocol["tokens"] == 70


def test_without_tokenizer_the_model_writes_itself(home: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(home / "llama", model)
    for path in model.glob("token*"):
        path.unlink()
    source = FolderSource(model)
    with pytest.raises(WaterfillError, match=r"no tokenizer.*self"):
        small(source, tmp_path / "s", home)
    one = small(source, tmp_path / "s", home, texts="self", tokens=256)
    two = small(source, tmp_path / "t", home, texts="self", tokens=256)
    assert one.protocol == two.protocol
    assert one.protocol["texts"][0]["name"] == "self" and one.protocol["tokens"] == 256


def altered(home: Path, folder: Path, change: Any) -> FolderSource:
    shutil.copytree(home / "llama", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return FolderSource(folder)


def test_weights_that_will_not_do(home: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def poison(tensors: Any) -> None:
        tensors[name][3, 3] = np.nan

    with pytest.raises(WaterfillError, match=rf"{name} has NaN.*mend"):
        small(altered(home, tmp_path / "a", poison), tmp_path / "s", home)

    def cut(tensors: Any) -> None:
        tensors[name] = tensors[name][:40].copy()

    with pytest.raises(WaterfillError, match=rf"{name}.*\[40, 32\].*\[48, 32\]"):
        small(altered(home, tmp_path / "b", cut), tmp_path / "s", home)
    with pytest.raises(WaterfillError, match=f"no tensor for the parameter {name}"):
        small(altered(home, tmp_path / "c", lambda t: t.pop(name)), tmp_path / "s", home)

    def extra(tensors: Any) -> None:
        tensors["unrelated"] = np.ones((3, 3), np.float32)

    statistics = small(altered(home, tmp_path / "d", extra), tmp_path / "s", home)
    assert statistics.weighting("unrelated") is None
    assert "does not use it" in statistics.notes["unrelated"]


def test_models_that_cannot_be_run(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(home / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    for change, words in [
        ({"model_type": "no_such_type"}, "no_such_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantised \(gptq\)"),
    ]:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(WaterfillError, match=words):
            small(FolderSource(folder), tmp_path / "s", home)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions(dtype: str, home: Path, tmp_path: Path) -> None:
    tiny.tiny_model("llama", tmp_path / "model", dtype=dtype)
    statistics = small(FolderSource(tmp_path / "model"), tmp_path / "s", home)
    reference = small(FolderSource(home / "llama"), tmp_path / "r", home)
    name = "model.layers.1.mlp.down_proj.weight"
    one, two = statistics.weighting(name), reference.weighting(name)
    assert one is not None and two is not None
    assert statistics.infos[name].dtype != "F32"
    np.testing.assert_allclose(np.trace(one.second_moment), np.trace(two.second_moment), rtol=0.05)


def test_a_repeated_tensor_bears_the_harm_of_both(home: Path, tmp_path: Path) -> None:
    def tie(tensors: Any) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    statistics = small(altered(home, tmp_path / "m", tie), tmp_path / "s", home)
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    first, other = sorted((head, table), key=list(statistics.infos).index)
    assert statistics.infos[other].group == first and statistics.infos[first].group == ""
    assert "two roles" in statistics.notes[first]


def test_labels_find_where_tensors_went(home: Path) -> None:
    source = FolderSource(home / "mixtral")
    model = build_skeleton(source)
    shapes = {n: s for n, (_, s) in source.tensors.items()}
    jobs = jobs_for(model, shapes)
    found = place(jobs, shapes, model)
    made = {}
    for job in jobs:
        made.update(job.run([torch.from_numpy(source.read(f)) for f in job.files], model))
    experts = 0
    for (name, index), placements in found.items():
        (p,) = placements
        value = source.read(name) if index is None else source.read_slice(name, index)
        parameter = made[p.parameter] if p.index is None else made[p.parameter][p.index]
        got = parameter.numpy()[np.ix_(p.rows, p.columns)]
        np.testing.assert_array_equal(got, value[np.ix_(p.file_rows, p.file_columns)])
        experts += p.index is not None
    assert experts == 2 * 4 * 3


def test_transposed_and_interleaved_are_traced() -> None:
    from transformers.core_model_loading import Interleave, Transpose, WeightConverter

    from waterfill.calibrate.names import Job

    value = torch.arange(48.0).reshape(6, 8)
    for operations in ([Transpose(0, 1)], [Interleave(0)], [Interleave(0), Transpose(0, 1)]):
        job = Job(("f",), ("f",), "p", WeightConverter("f", "p", operations))
        model = type("Model", (), {"config": None})()
        made = job.run([value], model)["p"]
        job = Job(("f",), ("f",), "p", job.converter, {"p": tuple(made.shape)})
        ((p,),) = place([job], {"f": (6, 8)}, model).values()
        at = np.ix_(p.columns, p.rows) if p.transposed else np.ix_(p.rows, p.columns)
        got = made.numpy()[at]
        want = value.numpy()[np.ix_(p.file_rows, p.file_columns)]
        np.testing.assert_array_equal(got.T if p.transposed else got, want)
        assert p.transposed == (len(operations) == 2 or isinstance(operations[0], Transpose))


def test_no_backward_pass_is_no_disaster(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from waterfill.calibrate import passes

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            raise NotImplementedError("no derivative")

    monkeypatch.setattr(passes, "sampled_loss", lambda out, g: (Broken.apply(out.logits), None, ""))
    statistics = small(FolderSource(home / "llama"), tmp_path / "s", home)
    assert "no derivative" in statistics.notes[""] and statistics.protocol["method"] == "none"
    weighting = statistics.weighting("lm_head.weight")
    assert weighting is not None and np.allclose(weighting.row_weights, 1 / tiny.VOCABULARY)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_is_said(
    where: str, error: Exception, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    target = "torch.autograd.backward" if where == "backward" else "torch.nn.functional.linear"
    monkeypatch.setattr(target, fail)
    with pytest.raises(WaterfillError, match=r"out of memory.*--tokens.*--method none"):
        small(FolderSource(home / "llama"), tmp_path / "s", home)
    assert not (tmp_path / "s" / "statistics.json").exists()


def test_statistics_that_lie(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    small(FolderSource(home / "llama"), folder, home)
    path = folder / "statistics.json"
    good = json.loads(path.read_text())
    with pytest.raises(WaterfillError, match=r"no statistics\.json.*waterfill calibrate"):
        Statistics.open(tmp_path)

    def attempt(change: Any, words: str) -> None:
        table = json.loads(json.dumps(good))
        change(table)
        path.write_text(json.dumps(table))
        with pytest.raises(FormatError, match=words):
            statistics = Statistics.open(folder)
            for name in statistics.infos:
                statistics.weighting(name)

    def matrix(table: Any) -> Any:
        return next(e for e in table["tensors"] if e["name"].endswith("q_proj.weight"))

    attempt(lambda t: t.update(version=9), r"version 9.*waterfill calibrate")
    attempt(lambda t: t.pop("notes"), "notes")
    attempt(lambda t: matrix(t).pop("shape"), "shape")
    attempt(lambda t: matrix(t).update(shape=[31, 32]), "31 row weights")
    attempt(lambda t: matrix(t).update(shape=[32, 30]), "30 x 30")
    attempt(lambda t: matrix(t).update(dtype="F1"), "F1")
    attempt(lambda t: matrix(t).update(moment="../x.safetensors"), "no proper moment file")
    path.write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        Statistics.open(folder)


def test_both_methods_agree_on_a_tiny_model(home: Path, tmp_path: Path) -> None:
    source = FolderSource(home / "llama")
    fisher = small(source, tmp_path / "f", home)
    trial = small(source, tmp_path / "d", home, method="differences")
    generator = np.random.default_rng(0)
    ratios = []
    for name, info in fisher.infos.items():
        a, b = fisher.weighting(name), trial.weighting(name)
        if a is not None and b is not None:
            noise = generator.standard_normal(info.matrix_shape).astype(np.float32)
            ratios.append(a.distortion(noise, 0 * noise) / b.distortion(noise, 0 * noise))
    assert len(ratios) == 16
    assert 0.6 < np.exp(np.mean(np.log(ratios))) < 1.6
    assert all(1 / 4 < r < 4 for r in ratios), ratios


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_predictions_come_true_on_a_trained_model(tmp_path: Path) -> None:
    source = FolderSource(SHARED / "models" / "stories260K")
    text = [SHARED / "text" / "tinystories.txt"]
    fisher = calibrate(source, tmp_path / "f", text, tokens=2048, window=128)
    trial = calibrate(source, tmp_path / "d", text, 2048, 128, method="differences")
    generator = np.random.default_rng(0)
    ratios = {}
    for name, info in fisher.infos.items():
        a, b = fisher.weighting(name), trial.weighting(name)
        if a is not None and b is not None:
            noise = generator.standard_normal(info.matrix_shape).astype(np.float32)
            ratios[name] = a.distortion(noise, 0 * noise) / b.distortion(noise, 0 * noise)
    values = np.array(list(ratios.values()))
    assert 0.5 < np.exp(np.log(values).mean()) < 2, ratios
    assert np.all((values > 1 / 3) & (values < 3)), ratios
