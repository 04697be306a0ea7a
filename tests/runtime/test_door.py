"""Both doors into transformers, three residencies, every architecture."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import waterfill  # noqa: E402
from tests import tiny  # noqa: E402
from tests.pipeline import small  # noqa: E402
from tests.runtime import artifacts  # noqa: E402
from tests.runtime.artifacts import artifact, distance, logits  # noqa: E402
from waterfill.runtime.artifact import WEIGHTS_KEY, WEIGHTS_WORDS  # noqa: E402
from waterfill.types import BudgetError, FormatError, WaterfillError  # noqa: E402

RESIDENCIES = ("dense", "packed", "coded")
# Largest error over largest logit of these tiny models, whose layers double what comes in: packed rounds
# activations to 8 bits; coded differs from dense by the order of sums alone.
BOUNDS = {"dense": 0.0, "coded": 1e-5, "packed": 0.15}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No wish of whoever runs the tests."""
    for name in ("RESIDENCY", "MEMORY"):
        monkeypatch.delenv(f"WATERFILL_{name}", raising=False)
    with small.quiet():
        yield


def auto(folder: Path, residency: str = "", **options: Any) -> Any:
    """By transformers' own door."""
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    with pytest.MonkeyPatch.context() as patch:
        if residency:
            patch.setenv("WATERFILL_RESIDENCY", residency)
        return cls.from_pretrained(folder, **options)


def ours(folder: Path, residency: str, **options: Any) -> Any:
    """By waterfill's door."""
    return waterfill.load_model(folder, residency=residency or None, **options)


DOORS: dict[str, Callable[..., Any]] = {"ours": ours, "auto": auto}


def kept(model: Any) -> list[Any]:
    """Modules whose weight is not dense."""
    return [module for module in model.modules() if hasattr(module, "held")]


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    folder = artifact(name)
    plain = artifacts.load_plain(artifacts.plain(name))
    want = {tokens: logits(plain, tokens) for tokens in (12, 24)}
    for residency in RESIDENCIES:
        for door in DOORS.values():
            model = door(folder, residency)
            assert isinstance(model, type(plain)) and type(model).__name__ == type(plain).__name__
            assert not model.training and model.dtype == plain.dtype
            assert bool(kept(model)) == (residency != "dense")
            for tokens, expected in want.items():
                error = distance(logits(model, tokens), expected)
                assert error <= BOUNDS[residency], (residency, tokens)
            if residency == "dense":
                same_tensors(model, plain)


def same_tensors(a: Any, b: Any) -> None:
    """Equal names, dtypes and values."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_half_precision(name: str, dtype: str) -> None:
    plain = artifacts.load_plain(artifacts.plain(name, dtype))
    wide = artifacts.load_plain(artifacts.plain(name, dtype)).float()
    for residency in RESIDENCIES:
        model = waterfill.load_model(artifact(name, dtype), residency=residency)
        assert model.dtype == plain.dtype
        bound = 0.0 if residency == "dense" else 0.15  # sums of another order, rounded to bfloat16
        for tokens in (12, 24):
            assert distance(logits(model, tokens), logits(plain, tokens)) <= bound
    model = waterfill.load_model(artifact(name, dtype), residency="coded", dtype="float32")
    assert model.dtype == torch.float32
    assert distance(logits(model), logits(wide)) <= 1e-5


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("door", DOORS)
def test_tied_weights_are_one(door: str, residency: str) -> None:
    model = DOORS[door](artifact("qwen3", pick=artifacts.integers), residency)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if residency == "dense":
        assert table.weight is head.weight
    else:
        assert table.held is head.held
        counted = sum(buffer.nbytes for buffer in table.held.buffers.values())
        assert counted < model.get_memory_footprint() < 4 * model.num_parameters() + 9 * counted


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_base_model(residency: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATERFILL_RESIDENCY", residency)
    for name in ("llama", "gpt2", "bert"):
        got = transformers.AutoModel.from_pretrained(artifact(name))
        want = transformers.AutoModel.from_pretrained(artifacts.plain(name))
        assert isinstance(got, type(want)) and type(got).__name__ == type(want).__name__
        assert distance(logits(got), logits(want)) <= BOUNDS[residency]


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_generation(residency: str) -> None:
    folder = artifact("llama")
    model = auto(folder, residency)
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}
    got = model.generate(ids, **options)
    again = waterfill.load_model(folder, residency=residency).generate(ids, **options)
    assert torch.equal(got, again) and got.shape[1] > 4
    if residency != "packed":
        assert torch.equal(
            got, artifacts.load_plain(artifacts.plain("llama")).generate(ids, **options)
        )


def test_a_pipeline(capfd: pytest.CaptureFixture[str]) -> None:
    folder = artifact("llama")
    pipe = transformers.pipeline("text-generation", str(folder))
    out = pipe("The river", max_new_tokens=4, do_sample=False)
    assert out[0]["generated_text"].startswith("The river")
    said = capfd.readouterr().err
    assert "MISSING" not in said and "UNEXPECTED" not in said and "quantization" not in said


def test_generation_config_and_options(tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("llama"), tmp_path / "out")
    (folder / "generation_config.json").write_text(
        json.dumps({"max_new_tokens": 3, "bos_token_id": 9})
    )
    for residency in ("dense", "packed"):
        model, report = auto(
            folder, residency, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(report.values()), report
        assert (
            model.generation_config.max_new_tokens == 3
            and model.generation_config.bos_token_id == 9
        )
        assert model.config._attn_implementation == "eager"
        assert model.name_or_path == str(folder)
        assert waterfill.load_model(folder).generation_config.bos_token_id == 9
    assert auto(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert auto(folder, "coded", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_dense_model_is_a_plain_one(tmp_path: Path) -> None:
    model = auto(artifact("mixtral"))
    assert not hasattr(model.config, "quantization_config") and not getattr(
        model, "is_quantized", False
    )
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and config.get(WEIGHTS_KEY) is None
    again = artifacts.load_plain(tmp_path / "plain")
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("residency", ["packed", "coded"])
@pytest.mark.parametrize("door", DOORS)
def test_saving_gives_the_artifact_again(door: str, residency: str, tmp_path: Path) -> None:
    folder = artifact("llama")
    model = DOORS[door](folder, residency)
    assert model.hf_quantizer.is_serializable() and not model.hf_quantizer.is_trainable
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "again/config.json").read_text())[WEIGHTS_KEY] == WEIGHTS_WORDS
    for opened in (auto(tmp_path / "again"), waterfill.load_model(tmp_path / "again")):
        assert opened.config.quantization_config.residency == residency
        assert torch.equal(logits(opened), logits(model))
    model.save_pretrained(tmp_path / "again")  # over itself
    with pytest.raises(WaterfillError, match="hf upload"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(WaterfillError, match=r"model\.norm\.weight is not as it was loaded.*dense"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_saving_looks_whether_the_file_is_still_the_one(tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("llama"), tmp_path / "out")
    model = waterfill.load_model(folder, residency="coded")
    shutil.copyfile(artifact("qwen2") / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(WaterfillError, match="is not the file that this model was loaded from"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_model_that_rescales_its_weights(residency: str, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("rwkv"), tmp_path / "out")
    plain = shutil.copytree(artifacts.plain("rwkv"), tmp_path / "plain")
    for each in (folder, plain):
        small.change_config(each, rescale_every=1)
    want = logits(artifacts.load_plain(plain))
    assert distance(logits(waterfill.load_model(folder, residency=residency)), want) <= 0.05


@pytest.mark.parametrize("residency", ["packed", "coded"])
def test_a_model_goes_with_its_last_user(residency: str) -> None:
    gc.collect()
    gc.disable()  # a cycle would keep gigabytes until the next collection, whenever that is
    try:
        model = waterfill.load_model(artifact("llama"), residency=residency)
        kept = weakref.ref(model.model.layers[0].mlp.down_proj.held)
        assert kept() is not None
        del model
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("residency", ["packed", "coded"])
def test_a_call_without_no_grad(residency: str) -> None:
    model = waterfill.load_model(artifact("llama"), residency=residency)
    ids = torch.arange(12)[None] * 7 % 250
    assert torch.equal(model(ids)[0], logits(model))


@pytest.mark.parametrize("residency", ["packed", "coded"])
def test_copies(residency: str) -> None:
    model = waterfill.load_model(artifact("qwen3"), residency=residency)
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        assert other.get_input_embeddings().held is other.get_output_embeddings().held
        assert other.get_input_embeddings().held is not model.get_input_embeddings().held
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.get_output_embeddings().weight.dtype == torch.bfloat16
    assert distance(logits(half).float(), want) < 0.2


def test_a_sharded_original(tmp_path: Path) -> None:
    with small.quiet():
        model = tiny.tiny_model("llama", tmp_path / "one")
        model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    out = artifacts.make(tmp_path / "many", tmp_path / "out", artifacts.lossless)
    for residency in ("dense", "coded"):
        assert distance(logits(auto(out, residency)), logits(model)) <= BOUNDS[residency]


def test_a_lossless_artifact_stays_as_it_is_coded() -> None:
    folder = artifact("llama", "bfloat16", artifacts.lossless)
    model = waterfill.load_model(folder, residency="coded")
    plain = artifacts.load_plain(artifacts.plain("llama", "bfloat16", artifacts.lossless))
    assert model.get_memory_footprint() < 0.85 * plain.get_memory_footprint()
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("door", DOORS)
def test_how_to_choose(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(artifact("llama"), tmp_path / "out")

    def way(**entry: str) -> str:
        small_entry = json.loads((artifact("llama") / "config.json").read_text())[
            "quantization_config"
        ]
        small.change_config(folder, quantization_config=small_entry | entry)
        model = DOORS[door](folder, "")
        return model.config.quantization_config.residency if kept(model) else "dense"

    assert way() == "dense"
    assert way(residency="packed") == "packed"
    monkeypatch.setenv("WATERFILL_RESIDENCY", "coded")
    assert way(residency="packed") == "coded"
    monkeypatch.setenv("WATERFILL_MEMORY", "1GB")
    with pytest.raises(WaterfillError, match="not both"):
        way()
    monkeypatch.delenv("WATERFILL_RESIDENCY")
    assert way(residency="coded") is None  # a memory chooses, not a residency
    monkeypatch.setenv("WATERFILL_MEMORY", "1KB")
    with pytest.raises(BudgetError, match="at least"):
        way()


def test_wrong_words() -> None:
    folder = artifact("llama")
    with pytest.raises(WaterfillError, match="residency is dense, packed, coded; not 'tight'"):
        waterfill.load_model(folder, residency="tight")
    with pytest.raises(WaterfillError, match="not both"):
        waterfill.load_model(folder, residency="dense", memory="1GB")
    with pytest.raises(WaterfillError, match="not a device"):
        waterfill.load_model(folder, device="toaster")
    with pytest.raises(BudgetError, match="one size alone"):
        waterfill.load_model(folder, size="1KB")
    assert waterfill.load_model(folder, size="1GB").device.type == "cpu"


def test_a_quantised_original_stays_with_its_loader(tmp_path: Path) -> None:
    model = shutil.copytree(small.model(), tmp_path / "model")
    small.change_config(model, quantization_config={"quant_method": "of my own", "bits": 4})
    out = artifacts.make(model, tmp_path / "out")
    assert auto(out).config.quantization_config == {"quant_method": "of my own", "bits": 4}
    for door in DOORS.values():
        with pytest.raises(WaterfillError, match='residency="dense" alone'):
            door(out, "packed")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("llama"), tmp_path / "out")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for residency in RESIDENCIES:
        for door in DOORS.values():
            with pytest.raises(FormatError, match="fails its checksum"):
                door(folder, residency)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_file_cut_while_it_is_read(
    residency: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(artifact("llama"), tmp_path / "out")
    opened = waterfill.runtime.torch_model.open_at

    def cut(path: Path, size: Any = None) -> Any:
        reader = opened(path, size)
        os.truncate(reader.path, reader.nbytes // 3)
        return reader

    monkeypatch.setattr("waterfill.runtime.torch_model.open_at", cut)
    with pytest.raises(FormatError, match="ends before its header says"):
        waterfill.load_model(folder, residency=residency)


def test_a_loaded_model_needs_no_file(tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("llama"), tmp_path / "out")
    models = [waterfill.load_model(folder, residency=residency) for residency in RESIDENCIES]
    before = [logits(model) for model in models]
    os.truncate(folder / "model.safetensors", 100)
    assert all(torch.equal(logits(m), b) for m, b in zip(models, before, strict=True))


def fresh(code: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own; a model's logits are summed by ``total``."""
    prelude = (
        "import sys, torch\n"
        "def total(model):\n"
        "    with torch.no_grad():\n"
        "        return repr(float(model(torch.arange(12)[None] * 7 % 250).logits.double().sum()))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + code, *map(str, words)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


LOAD = (
    "from transformers import AutoModelForCausalLM\n"
    "print('loaded', total(AutoModelForCausalLM.from_pretrained(sys.argv[1])))\n"
)


def test_without_the_import_nothing_is_loaded() -> None:
    pipeline = "import transformers\ntransformers.pipeline('text-generation', sys.argv[1])"
    done = fresh(
        f"try:\n    {pipeline.replace(chr(10), chr(10) + '    ')}\n"
        f"except ValueError as error:\n    print('refused', error)\n{LOAD}",
        artifact("llama"),
    )
    assert done.returncode != 0 and "loaded" not in done.stdout
    assert "refused" in done.stdout and WEIGHTS_WORDS in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and last.endswith(WEIGHTS_WORDS)
    assert "MISSING" not in done.stderr


@pytest.mark.parametrize("first", ["waterfill", "transformers.quantizers.auto"])
def test_with_the_import_in_any_order(first: str) -> None:
    trace = (
        "import transformers.quantizers.auto as methods\n"
        "kinds = [type(finder).__module__ for finder in sys.meta_path]\n"
        "kinds += [type(methods.__loader__).__module__, type(methods.__spec__.loader).__module__]\n"
        "assert not any('announcing' in kind for kind in kinds), kinds\n"
    )
    done = fresh(f"import {first}, waterfill\n{LOAD}{trace}", artifact("llama"))
    assert done.returncode == 0, done.stderr
    expected = float(logits(artifacts.load_plain(artifacts.plain("llama"))).double().sum())
    assert float(done.stdout.split()[1]) == pytest.approx(expected, rel=1e-6, abs=1e-4)
    assert all(word not in done.stderr for word in ("MISSING", "UNEXPECTED", "arn"))


def test_an_artifact_from_before_the_key_loads(tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("llama"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    del config[WEIGHTS_KEY]
    (folder / "config.json").write_text(json.dumps(config))
    for residency in RESIDENCIES:
        assert torch.equal(
            logits(auto(folder, residency)), logits(auto(artifact("llama"), residency))
        )


def test_a_configuration_without_a_dtype(tmp_path: Path) -> None:
    with small.quiet():
        tiny.tiny_model("llama", tmp_path / "model", dtype="bfloat16")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    (tmp_path / "model/config.json").write_text(
        json.dumps(config | {WEIGHTS_KEY: "model.safetensors"})
    )
    waterfill.compress(tmp_path / "model", tmp_path / "out", lossless=True)
    for door in DOORS.values():
        assert door(tmp_path / "out", "").dtype == torch.bfloat16
    waterfill.decompress(tmp_path / "out", tmp_path / "back")
    assert (
        json.loads((tmp_path / "back/config.json").read_text())[WEIGHTS_KEY] == "model.safetensors"
    )
    assert WEIGHTS_WORDS in (tmp_path / "out/config.json").read_text()
    assert "import waterfill" in (tmp_path / "out/README.md").read_text()
