"""Facts of a model's cache: kept, and learned again once the model is another."""

from __future__ import annotations

import copy

import torch

from tests.runtime.cache.models import decoder
from waterfill.runtime.cache.facts import facts_of


def test_facts_are_kept_until_the_model_changes() -> None:
    model = copy.deepcopy(decoder())
    once = facts_of(model)
    assert facts_of(model) is once
    model.to(torch.bfloat16)
    other = facts_of(model)
    assert {one.dtype for one in other if one is not None} == {torch.bfloat16}
    assert facts_of(model) is other
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert facts_of(model) is not other
