"""Errors of one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from waterfill.evaluate import compare, layer_errors, layer_kl, strided_windows
from waterfill.types import WaterfillError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def rows() -> Any:
    return strided_windows(np.random.default_rng(0).integers(0, 61, 100), 32, 16)


def names_of(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_output_errors_equal_their_definition(
    llama: Any, disturbed: Callable[..., Any], rows: Any
) -> None:
    other = disturbed(llama, 0.1)
    inputs = []
    module = llama.get_submodule(NAME.removesuffix(".weight"))
    hook = module.register_forward_hook(lambda m, x, y: inputs.append(x[0].detach()))
    with torch.no_grad():
        for tokens in torch.from_numpy(rows.tokens):
            llama(tokens[None])
    hook.remove()
    x = torch.cat(inputs).reshape(-1, 48)
    w, q = module.weight.detach(), other.get_parameter(NAME).detach()
    error = (x @ (w - q).T).square().sum(-1).mean().item()
    (got,) = layer_errors(llama, other, rows, [NAME])
    assert got["name"] == NAME
    assert got["measured_output_error"] == pytest.approx(error, rel=1e-4)
    power = (x @ w.T).square().sum(-1).mean().item()
    assert got["relative_output_error"] == pytest.approx(error / power, rel=1e-4)


def test_layers_that_are_not_linear_are_left_out(
    llama: Any, disturbed: Callable[..., Any], rows: Any
) -> None:
    got = layer_errors(llama, disturbed(llama, 0.1), rows, names_of(llama))
    assert len(got) == 2 * 7 + 1
    assert not any("norm" in r["name"] or "embed" in r["name"] for r in got)
    assert all(0.005 < r["relative_output_error"] < 0.02 for r in got)
    assert not llama.get_submodule("lm_head")._forward_hooks


def test_transposed_layers_and_biases(disturbed: Callable[..., Any], rows: Any) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.h[0].mlp.c_fc.bias)
    name = "transformer.h.0.mlp.c_fc.weight"
    (got,) = layer_errors(model, disturbed(model, 0.1, ".weight"), rows, [name])
    assert got["relative_output_error"] == pytest.approx(0.01, rel=0.3)
    short = name.removeprefix("transformer.")  # as checkpoints of the trunk alone have it
    weights = {short: disturbed(model, 0.1).get_parameter(name).detach()}
    assert layer_errors(model, weights, rows, [short])[0]["relative_output_error"] > 0
    assert layer_kl(model, weights, rows, [short])[0]["measured_nats"] > 0


def test_one_tensor_at_a_time_equals_the_model_with_that_tensor(
    llama: Any, disturbed: Callable[..., Any], rows: Any
) -> None:
    other = disturbed(llama, 0.1)
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    got = layer_kl(llama, other, rows, names_of(llama), limit=5, window_limit=None)
    assert len(got) == 5
    for row in got:
        alone = compare(llama, disturbed_alone(llama, other, row["name"]), rows)
        assert row["measured_nats"] == pytest.approx(alone["kl_nats"], rel=1e-5)
        assert row["tokens"] == alone["tokens"]
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


def disturbed_alone(original: Any, compressed: Any, name: str) -> Any:
    model = type(original)(original.config)
    model.load_state_dict(original.state_dict())
    model.get_parameter(name).data.copy_(compressed.get_parameter(name).data)
    return model


def test_decoded_arrays_and_slices_serve_as_the_compressed_model(
    llama: Any, disturbed: Callable[..., Any], rows: Any
) -> None:
    q = disturbed(llama, 0.1).get_parameter(NAME).detach().numpy()
    slices = {f"{NAME}[3]": q[3], NAME: q}
    whole, part = layer_kl(llama, slices, rows, [NAME, f"{NAME}[3]"])
    assert 0 < part["measured_nats"] < whole["measured_nats"]

    class Lazy(dict[str, Any]):  # decodes when asked, as the pipeline's does
        def __contains__(self, name: object) -> bool:
            return name == NAME

        def __missing__(self, name: str) -> Any:
            return torch.from_numpy(q).bfloat16()

    (lazy,) = layer_kl(llama, Lazy(), rows, [NAME])
    assert lazy["measured_nats"] == pytest.approx(whole["measured_nats"], rel=0.1)
    with pytest.raises(WaterfillError, match="pass decoded arrays"):
        layer_kl(llama, {}, rows, [NAME])
    with pytest.raises(WaterfillError, match="no tensor"):
        layer_errors(llama, {}, rows, ["model.nothing.weight"])
    (absent,) = layer_kl(llama, {}, rows, ["model.nothing.weight"])
    assert absent["measured_nats"] is None and "not a tensor" in absent["note"]
    with pytest.raises(WaterfillError, match="originally"):
        layer_kl(llama, {NAME: q[:, :5]}, rows, [NAME])
