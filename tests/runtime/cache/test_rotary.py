"""Rotary positions found by asking the model."""

from __future__ import annotations

import pytest
import torch

from tests.runtime.cache.models import FAMILIES, decoder
from waterfill.runtime.cache.facts import facts_of

ROTARY = {"GPT2Config": None, "OPTConfig": None, "GPTNeoXConfig": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_known(family: str) -> None:
    model = decoder(family)
    facts = facts_of(model)
    assert len(facts) == 2
    for one in facts:
        assert one is not None
        pairs = None if one.rotary is None else len(one.rotary.frequencies)
        assert pairs == ROTARY.get(family, one.key_width // 2)


def test_turning_is_what_the_model_does() -> None:
    model = decoder()
    rotary = facts_of(model)[0].rotary  # type: ignore[union-attr]
    assert rotary is not None
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(2, 2, 7, 16)
    at = torch.tensor([[0, 1, 5, 99, 300, 301, 511], [7, 8, 9, 10, 11, 12, 13]])
    cos, sin = model.model.rotary_emb(x, at)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    turned = rotary.turn(x, at)
    torch.testing.assert_close(turned, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotary.turn(turned, at, backwards=True), x, atol=1e-5, rtol=1e-5)


def test_a_model_in_bfloat16_is_known_too() -> None:
    rotary = facts_of(decoder(dtype=torch.bfloat16))[1].rotary  # type: ignore[union-attr]
    exact = facts_of(decoder())[1].rotary  # type: ignore[union-attr]
    assert rotary is not None and exact is not None
    torch.testing.assert_close(rotary.frequencies, exact.frequencies, rtol=1e-6, atol=1e-9)
