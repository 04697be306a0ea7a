"""A model from a lossless artifact is the original, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import waterfill  # noqa: E402
from tests import tiny  # noqa: E402
from tests.pipeline import small  # noqa: E402
from waterfill.runtime.torch_model import model_class, quiet_transformers  # noqa: E402
from waterfill.types import WaterfillError  # noqa: E402

MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"


def original(folder: Path) -> Any:
    with quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(folder)
        return model_class(config).from_pretrained(folder).eval()


def check_same(a: Any, b: Any) -> None:
    """The same class, tensors and logits, to the last bit."""
    assert type(a) is type(b) and a.dtype == b.dtype
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert small.bits_of(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) == (
            small.bits_of(right[name].contiguous().reshape(-1).view(torch.uint8).numpy())
        ), name
    ids = torch.arange(24)[None] % 200
    inputs = {"input_ids": ids}
    if a.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        assert torch.equal(a(**inputs).logits, b(**inputs).logits)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "bfloat16"), ("qwen3", "float16"), ("gpt2", "float32"), ("mixtral", "bfloat16"),
        ("gpt_oss", "bfloat16"), ("t5", "float32"), ("bert", "bfloat16"), ("mamba", "float32"),
    ],
)  # fmt: skip
def test_the_same_model(name: str, dtype: str, tmp_path: Path) -> None:
    with small.quiet():
        tiny.tiny_model(name, tmp_path / "model", dtype=dtype)
    waterfill.compress(tmp_path / "model", tmp_path / "out", lossless=True)
    check_same(original(tmp_path / "model"), waterfill.load_model(tmp_path / "out"))


@pytest.mark.parametrize("name", ["stories260K", "english-7m"])
def test_a_trained_model(name: str, tmp_path: Path) -> None:
    if not (MODELS / name).is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    waterfill.compress(MODELS / name, tmp_path / "out", lossless=True)
    check_same(original(MODELS / name), waterfill.load_model(tmp_path / "out"))
    waterfill.decompress(tmp_path / "out", tmp_path / "back")
    for file in (MODELS / name).iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def quantised(folder: Path, **entry: Any) -> Path:
    shutil.copytree(small.model(), folder)
    small.change_config(folder, quantization_config=entry)
    return folder


def test_a_quantised_original_is_loaded_as_such(tmp_path: Path) -> None:
    model = quantised(tmp_path / "model", quant_method="of my own", bits=4)
    waterfill.compress(model, tmp_path / "out", lossless=True)
    ours = waterfill.load_model(tmp_path / "out")  # transformers passes over what it never heard of
    check_same(original(model), ours)
    assert dict(ours.config.quantization_config) == {"quant_method": "of my own", "bits": 4}
    waterfill.decompress(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_a_loader_that_is_missing_is_named(tmp_path: Path) -> None:
    model = quantised(tmp_path / "model", quant_method="gptq", bits=4)
    try:
        original(model)
    except ImportError:
        waterfill.compress(model, tmp_path / "out", lossless=True)
        with pytest.raises(WaterfillError, match=r"quantised \(gptq\).*waterfill decompress"):
            waterfill.load_model(tmp_path / "out")
    else:
        pytest.skip("this installation has what GPTQ needs")


def test_a_lossy_artifact_keeps_no_quantisation_entry(tmp_path: Path) -> None:
    waterfill.decompress(small.artifact(), tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
