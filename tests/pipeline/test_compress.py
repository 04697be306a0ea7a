"""compress -> decompress, on every architecture; budgets; what the user fixes by hand."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402

import waterfill  # noqa: E402
from tests import tiny  # noqa: E402
from tests.pipeline import small  # noqa: E402
from waterfill.container import Reader  # noqa: E402
from waterfill.pipeline import calibrate_to, plan_json, price_statistics, show  # noqa: E402
from waterfill.sources import FolderSource  # noqa: E402
from waterfill.types import BudgetError, SpecError, WaterfillError  # noqa: E402

FREE = ("gpt2",)  # every codec is tried on these


def compress(out: Path, **options: Any) -> Any:
    options.setdefault("calibration", small.statistics())
    return waterfill.compress(small.model(), out, **options)


def within(nbytes: int, budget: int) -> bool:
    return nbytes <= budget and budget - nbytes <= max(64, budget / 1000)


def outputs(model: Any) -> Any:
    ids = torch.arange(24).reshape(1, -1)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**inputs).logits


def quick_codecs(source: FolderSource) -> dict[str, str]:
    """Few settings to price, and one tensor with a continuous one to fill the budget with."""
    matrices = {n: math.prod(s) for n, (_, s) in source.tensors.items() if len(s) == 2}
    return {"*": "integer", max(matrices, key=matrices.__getitem__): "trellis"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in tiny.ARCHITECTURES),
        *((name, "bfloat16") for name in ("llama", "mixtral")),
        ("qwen2", "float16"),
    ],
)
def test_there_and_back(name: str, dtype: str, tmp_path: Path) -> None:
    with small.quiet():
        tiny.tiny_model(name, tmp_path / "model", dtype=dtype)
    source = FolderSource(tmp_path / "model")
    record = waterfill.compress(
        tmp_path / "model",
        tmp_path / "out",
        bits=6,
        calibration=[tiny.write_text(tmp_path)],
        tokens=small.TOKENS,
        codec={} if name in FREE and dtype == "float32" else quick_codecs(source),
    )
    assert within(record.nbytes, record.about["budget_nbytes"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "text.txt"]
    small.check_ledger(tmp_path / "out", record, tmp_path / "model")
    assert record.predicted["kl_nats"] > 0
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "waterfill"

    waterfill.decompress(tmp_path / "out", tmp_path / "plain")
    plain = FolderSource(tmp_path / "plain")
    assert plain.tensors == source.tensors
    arrays = waterfill.load(tmp_path / "out")
    stored = safetensors.torch.load_file(tmp_path / "plain" / "model.safetensors")
    assert arrays.keys() == source.tensors.keys() == stored.keys()
    for key, array in arrays.items():
        want = stored[key].float() if stored[key].dtype == torch.bfloat16 else stored[key]
        assert array.shape == want.shape
        assert small.bits_of(array) == small.bits_of(want.numpy()), key

    cls = getattr(transformers, source.config["architectures"][0])
    with small.quiet():
        want = outputs(cls.from_pretrained(tmp_path / "plain").eval())
    got = outputs(waterfill.load_model(tmp_path / "out"))
    assert got.dtype == want.dtype and torch.equal(got, want)
    assert torch.isfinite(got).all()


def test_close_to_the_original(tmp_path: Path) -> None:
    coarse = compress(tmp_path / "coarse", bits=4.5)
    fine = compress(tmp_path / "fine", bits=9)
    assert fine.predicted["kl_nats"] < coarse.predicted["kl_nats"] / 10
    want = small.arrays_of(small.model())
    got = waterfill.load(tmp_path / "fine")
    for name, array in want.items():
        assert np.abs(got[name] - array).max() < 0.2 * np.abs(array).max(), name


# Budgets


@pytest.mark.parametrize("bits", [3.5, 5, 8])
def test_bits(bits: float, tmp_path: Path) -> None:
    record = compress(tmp_path / "out", bits=bits)
    assert record.bits_per_weight <= bits
    assert within(record.nbytes, int(record.about["params"] * bits / 8))


@pytest.mark.parametrize("size", [7001, "7.5KB", "9KiB"])
def test_size(size: int | str, tmp_path: Path) -> None:
    record = compress(tmp_path / "out", size=size)
    assert within(record.nbytes, {"7.5KB": 7500, "9KiB": 9216}.get(size, 7001))


@pytest.mark.parametrize("ratio", ["20%", 0.25])
def test_ratio(ratio: float | str, tmp_path: Path) -> None:
    record = compress(tmp_path / "out", ratio=ratio)
    share = 0.2 if ratio == "20%" else 0.25
    assert within(record.nbytes, int(record.about["original_nbytes"] * share))


def test_too_small_says_the_smallest_possible(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smallest") as caught:
        compress(tmp_path / "out", size=1000)
    assert not (tmp_path / "out").exists()
    stated = int(re.findall(r"about ([\d,]+)", str(caught.value))[0].replace(",", ""))
    record = compress(tmp_path / "out", size=stated)
    assert 0.9 * stated < record.nbytes <= stated


def test_more_than_needed_is_lossless(tmp_path: Path) -> None:
    record = compress(tmp_path / "out", bits=40)
    assert record.about["lossless"] and record.predicted["kl_nats"] == 0
    assert record.nbytes < record.about["budget_nbytes"]
    got = waterfill.load(tmp_path / "out")
    for name, array in small.arrays_of(small.model()).items():
        assert small.bits_of(got[name]) == small.bits_of(array), name


@pytest.mark.parametrize("options", [{}, {"bits": 3, "size": "1MB"}, {"size": 0}, {"bits": -1}])
def test_one_proper_size(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        compress(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


# What the user fixes by hand


def codecs_of(record: Any) -> dict[str, str]:
    return {r["name"]: r["codec"] for r in record.ledger}


def test_keep(tmp_path: Path) -> None:
    record = compress(tmp_path / "out", bits=20, keep=["*q_proj*", "lm_head.*"])
    codecs = codecs_of(record)
    kept = [n for n in codecs if "q_proj" in n or n == "lm_head.weight"]
    assert len(kept) == 2
    got, want = waterfill.load(tmp_path / "out"), small.arrays_of(small.model())
    for name in kept:
        assert codecs[name] in ("raw", "lossless")
        assert small.bits_of(got[name]) == small.bits_of(want[name])
    assert any("--keep" in r["why"] for r in record.ledger)


def test_codec(tmp_path: Path) -> None:
    rules = {"*mlp*": "integer", "*up_proj*": "integer:bits=5,group=8", "*v_proj*": "lossless"}
    codecs = codecs_of(compress(tmp_path / "out", bits=7, codec=rules))
    assert codecs["model.layers.0.mlp.up_proj.weight"].startswith("integer:bits=5")
    assert codecs["model.layers.0.mlp.down_proj.weight"].startswith("integer")
    assert codecs["model.layers.0.self_attn.v_proj.weight"] == "lossless"
    assert codecs["model.norm.weight"] in ("raw", "lossless")


def test_codecs_without_continuous_settings(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smallest this") as caught:
        compress(tmp_path / "out", bits=5, codec={"*": "integer"})
    stated = int(re.findall(r"about ([\d,]+)", str(caught.value))[0].replace(",", ""))
    for size in (stated, int(0.992 * stated)):  # what is stated has a margin of one percent
        record = compress(tmp_path / "out", size=size, codec={"*": "integer"}, force=True)
        assert 0.97 * stated < record.nbytes <= size
    for bits in (6, 7):
        record = compress(tmp_path / "out", bits=bits, codec={"*": "integer"}, force=True)
        assert record.bits_per_weight <= bits
        assert record.bits_per_weight > bits - 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": ["*nonsense*"]}, "nonsense.*there are lm_head.weight"),
        ({"keep": ["*atn.q_proj*"]}, r"mean model\.layers\.\*\.self_attn\.q_proj\.weight"),
        ({"codec": {"lm_haed": "integer"}}, r"mean lm_head\.weight"),
        ({"codec": {"model.layer.0.mlp.*": "integer"}}, r"mean model\.layers\.\*\.mlp"),
        ({"codec": {"*nonsense*": "integer"}}, "nonsense"),
        ({"codec": {"*": "nonsense"}}, "known: "),
        ({"codec": {"*": "integer:bits=99"}}, "bits is 2 to 8"),
        ({"codec": {"*": "integer:bats=4"}}, "it has|has: bits"),
        ({"codec": {"*norm*": "integer:bits=4"}}, "can take none"),
    ],
)
def test_rules_that_fit_nothing(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        raise AssertionError("work began before the rules were checked")

    with pytest.raises(SpecError, match=words):
        compress(tmp_path / "out", bits=5, progress=progress, **options)
    assert not list(tmp_path.iterdir())


def test_a_codec_that_fits_no_budget(tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        compress(tmp_path / "out", bits=4, codec={"*": "integer:bits=8"})
    assert not (tmp_path / "out").exists()


# Statistics


def test_statistics_are_reused(tmp_path: Path) -> None:
    stages = set()
    compress(tmp_path / "out", bits=4.5, progress=lambda stage, done, total: stages.add(stage))
    assert stages == {"pricing", "encoding", "measuring"}
    small.same_files(tmp_path / "out", small.artifact())


def test_statistics_of_another_model(tmp_path: Path) -> None:
    other = small.make_model(tmp_path / "other", seed=1)
    with pytest.raises(WaterfillError, match="calibrate again"):
        waterfill.compress(other, tmp_path / "out", bits=5, calibration=small.statistics())
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_statistics_open_wherever_they_lie(tmp_path: Path) -> None:
    shutil.copytree(small.statistics(), tmp_path / "moved")
    for file in (tmp_path / "moved").glob("prices-*"):
        file.unlink()
    compress(tmp_path / "out", bits=4.5, calibration=tmp_path / "moved")
    small.same_files(tmp_path / "out", small.artifact())


def test_plan_agrees_with_compress() -> None:
    planned = plan_json(price_statistics(small.statistics()), bits=4.5)
    shown = show(small.artifact())
    assert planned["budget_nbytes"] >= shown["nbytes"]
    assert [r["name"] for r in planned["choices"]] == [r["name"] for r in shown["ledger"][:-1]]
    assert planned["predicted_nats"] == pytest.approx(shown["predicted_kl_nats"], rel=0.3)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    shutil.copytree(small.statistics(), tmp_path / "stats")
    for file in (tmp_path / "stats").glob("prices-*"):
        file.unlink()
    before = sorted(p for p in tmp_path.rglob("*"))
    plan_json(price_statistics(tmp_path / "stats", write=False), bits=5)
    assert sorted(p for p in tmp_path.rglob("*")) == before


# The same again


def test_the_same_command_twice(tmp_path: Path) -> None:
    for out in ("a", "b"):
        waterfill.compress(
            small.model(), tmp_path / out, bits=5, calibration=[small.text()], tokens=small.TOKENS,
            codec={"*": "integer", small.BIG: "trellis"},
        )  # fmt: skip
    small.same_files(tmp_path / "a", tmp_path / "b")


def test_python_functions_and_models_in_memory(tmp_path: Path) -> None:
    with small.quiet():
        model = transformers.LlamaForCausalLM.from_pretrained(small.model()).eval()
    record = waterfill.compress(
        model, tmp_path / "out", bits=5, calibration="self", tokens=128,
        codec={"*": "integer", small.BIG: "trellis"},
    )  # fmt: skip
    assert within(record.nbytes, record.about["budget_nbytes"])
    assert outputs(waterfill.load_model(tmp_path / "out")).shape == outputs(model).shape


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    folder = small.make_model(tmp_path / "model")
    tensors = dict(small.arrays_of(folder))
    tensors["lm_head.weight"] = tensors[small.BIG]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    small.change_config(folder, tie_word_embeddings=True)
    calibrate_to(folder, tmp_path / "stats", [small.text()], tokens=small.TOKENS)
    record = waterfill.compress(folder, tmp_path / "out", bits=6, calibration=tmp_path / "stats")
    small.check_ledger(tmp_path / "out", record, folder)
    repeated = [r for r in record.ledger if r["codec"].startswith("same as")]
    assert len(repeated) == 1 and repeated[0]["nbytes"] == 0
    assert within(record.nbytes, record.about["budget_nbytes"])
    arrays = waterfill.load(tmp_path / "out")
    assert small.bits_of(arrays["lm_head.weight"]) == small.bits_of(arrays[small.BIG])
    waterfill.decompress(tmp_path / "out", tmp_path / "plain")
    assert FolderSource(tmp_path / "plain").tensors == FolderSource(folder).tensors
    with Reader(tmp_path / "out") as reader:
        assert sum(bool(e.info.group) for e in reader.entries.values()) == 1


def test_sharded_checkpoints(tmp_path: Path) -> None:
    with small.quiet():
        model = transformers.LlamaForCausalLM.from_pretrained(small.model())
        model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tiny.tiny_tokenizer(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    record = waterfill.compress(
        tmp_path / "model", tmp_path / "out", bits=5, calibration=[small.text()],
        tokens=small.TOKENS, codec={"*": "integer", small.BIG: "trellis"},
    )  # fmt: skip
    small.check_ledger(tmp_path / "out", record, tmp_path / "model")
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_decompress_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waterfill.runtime.plain.SHARD_NBYTES", 20_000)
    waterfill.decompress(small.artifact(), tmp_path / "plain")
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 1
    with small.quiet():
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(outputs(model), outputs(waterfill.load_model(small.artifact())))


def test_the_artifact_folder() -> None:
    names = {f.name for f in small.artifact().iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "bits per weight" in (small.artifact() / "README.md").read_text()
