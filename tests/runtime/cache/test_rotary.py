"""Rotary positions found by asking the model."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.runtime.cache.models import FAMILIES, decoder
from waterfill.runtime.cache.cache import KVCache
from waterfill.runtime.cache.facts import facts_of
from waterfill.types import WaterfillError

# Pairs that turn, where it is not all of a key's; None where none do, or latents are cached.
NO_TURN = (
    "GPT2Config", "OPTConfig", "GPTNeoConfig", "GPTBigCodeConfig", "BloomConfig", "MptConfig",
    "FalconConfig alibi", "XGLMConfig", "DeepseekV2Config", "DeepseekV3Config", "JambaConfig",
)  # fmt: skip
PARTLY = {"GPTNeoXConfig": 2, "PhiConfig": 4, "Qwen3NextConfig": 2}
PAIRS: dict[str, int | None] = {**dict.fromkeys(NO_TURN), **PARTLY}
OTHER_STATES = {
    "Gemma3nTextConfig": (2, 3), "Qwen3NextConfig": (0,), "JambaConfig": (0,), "Lfm2Config": (0,)
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_known(family: str) -> None:
    facts = facts_of(decoder(family))
    unknown = tuple(i for i, one in enumerate(facts) if one is None)
    # Older transformers keeps what shared layers read once more.
    assert unknown in (OTHER_STATES.get(family, ()), () if "Gemma3n" in family else None)
    for one in facts:
        if one is not None:
            pairs = None if one.rotary is None else len(one.rotary.frequencies)
            latent = "Deepseek" in family and one.heads == 1  # else keys as attention reads them
            if "Deepseek" not in family or latent:
                assert pairs == PAIRS.get(family, one.key_width // 2)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("MambaConfig", "keeps no keys and values"),
        ("OpenAIGPTConfig", "keeps no keys and values"),
        ("T5Config", "has an encoder"),
    ],
)
def test_models_without_such_a_cache_are_told(config: str, said: str) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96, "d_model": 32}
    made = getattr(transformers, config)(**small, n_embd=32, n_head=2, n_layer=1, d_ff=32)
    cls = transformers.AutoModelForCausalLM
    if made.is_encoder_decoder:
        cls = transformers.AutoModelForSeq2SeqLM
    with pytest.raises(WaterfillError, match=said):
        KVCache(cls.from_config(made))


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


def test_layers_that_turn_alike_share_it() -> None:
    rotaries = [one.rotary for one in facts_of(decoder("LlamaConfig")) if one is not None]
    assert len(rotaries) > 1
    assert len({id(one) for one in rotaries}) == 1
    assert len({id(one.columns) for one in rotaries if one is not None}) == 1
