"""Rounded activations against their definition, where they are applied, and where they are refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from waterfill.evaluate import Activations, compare
from waterfill.types import SpecError, WaterfillError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WINDOWS = np.random.default_rng(0).integers(0, 61, (3, 32))


def test_int8_rounds_to_steps_of_the_largest() -> None:
    x = torch.tensor([[127.0, 0.4, -1.6, 2.5], [0.0, 0.0, 0.0, 0.0], [-1.27, 0.004, 0.006, 0.1]])
    rounded = Activations("int8").round(x)
    assert rounded[:2].tolist() == [[127, 0, -2, 2], [0, 0, 0, 0]]
    assert rounded[2].tolist() == pytest.approx([-1.27, 0, 0.01, 0.1])
    whole = Activations("int8", "tensor").round(x)
    assert whole.tolist() == [[127, 0, -2, 2], [0, 0, 0, 0], [-1, 0, 0, 0]]


@pytest.mark.parametrize(("form", "top", "mantissa"), [("e4m3", 448, 3), ("e5m2", 57344, 2)])
def test_floats_keep_so_many_bits_of_each_number(form: str, top: float, mantissa: int) -> None:
    x = torch.tensor([[top, *range(1, 17)]])  # a scale of one
    got = Activations(form).round(x)[0].tolist()
    spacing = [2 ** max(0, int(np.log2(v)) - mantissa) for v in range(1, 17)]
    assert got == [top, *(np.rint(v / s) * s for v, s in zip(range(1, 17), spacing, strict=True))]


@pytest.mark.parametrize("form", ["int8", "e4m3", "e5m2"])
@pytest.mark.parametrize("scale", ["token", "tensor"])
def test_rounding_twice_is_rounding_once_and_no_dtype_changes(form: str, scale: str) -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    once = Activations(form, scale).round(x)
    assert once.dtype == x.dtype and not torch.equal(once, x)
    assert torch.allclose(Activations(form, scale).round(once).float(), once.float(), rtol=2**-7)
    assert torch.isnan(Activations(form, scale).round(x * float("nan"))).all()


def test_what_is_measured_is_a_model_whose_layers_round_their_inputs(llama: Any) -> None:
    """All but the head, and the original is left alone even where it is the same model."""
    other = copy.deepcopy(llama)
    rounding = Activations("e4m3")
    for name, module in other.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.forward = lambda x, run=module.forward: run(rounding.round(x))
    expected, got = (
        compare(llama, other, WINDOWS),
        compare(llama, llama, WINDOWS, activations="e4m3"),
    )
    assert got["kl_nats"] > 0
    for key in ("kl_nats", "perplexity", "perplexity_original", "top1_agreement"):
        assert got[key] == expected[key]
    said = got["protocol"].pop("activations")
    assert said.startswith("e4m3") and "14 linear layers" in said and "per token" in said
    assert got["protocol"] == expected["protocol"]
    assert compare(llama, llama, WINDOWS)["kl_nats"] == 0  # no hook is left


def test_finer_numbers_do_less_harm(llama: Any) -> None:
    harms = [
        compare(llama, llama, WINDOWS, activations=form)["kl_nats"]
        for form in ("int8", "e4m3", "e5m2")
    ]
    assert harms == sorted(harms)


def test_models_whose_inputs_cannot_all_be_rounded_are_refused(llama: Any) -> None:
    config = transformers.MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    experts = transformers.MixtralForCausalLM(config).eval()
    with pytest.raises(WaterfillError, match="holds many matrices"):
        compare(experts, experts, WINDOWS, activations="int8")
    llama.model.layers = torch.nn.ModuleList()
    with pytest.raises(WaterfillError, match="no linear layers"):
        compare(llama, llama, WINDOWS, activations="int8")


@pytest.mark.parametrize("text", ["int4", "int8:row", ""])
def test_forms_that_are_none(text: str) -> None:
    with pytest.raises(SpecError, match="activations are int8, e4m3, e5m2"):
        Activations.parse(text)
