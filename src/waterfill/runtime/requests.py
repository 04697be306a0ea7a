"""What a request in OpenAI's form asks of a model, and which of it cannot be had."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from waterfill.runtime.generation import Message, Sampling
from waterfill.types import WaterfillError

# Wishes that cannot be met -> what asks for nothing there. Refused, not overlooked.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tools": ([],),
}


def sampling_of(body: Mapping[str, Any]) -> Sampling:
    """What a request wants; WaterfillError if that cannot be had.

    Parameters
    ----------
    body : of a request, as OpenAI's reference describes it
    """
    for name, nothing in _NOTHING.items():
        wanted = body.get(name)
        if wanted is not None and wanted not in nothing:
            raise WaterfillError(f"this server cannot do {name}={json.dumps(wanted)}")
    tokens = body.get("max_completion_tokens")
    tokens = body.get("max_tokens") if tokens is None else tokens
    stop = body.get("stop") or []
    return Sampling(
        tokens=_number("max_tokens", tokens, 1, 1 << 31, whole=True),
        temperature=_number("temperature", body.get("temperature"), 0, 100),
        top_p=_number("top_p", body.get("top_p"), 1e-9, 1),
        seed=_number("seed", body.get("seed"), -(1 << 63), (1 << 63) - 1, whole=True),
        stop=tuple(_texts("stop", [stop] if isinstance(stop, str) else stop)),
    )


def _number(name: str, value: Any, least: float, most: float, whole: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
    if value is not None and not fits:
        kind = "a whole number" if whole else "a number"
        raise WaterfillError(f"{name} must be {kind} from {least:g} to {most:g}")
    return value


def _texts(name: str, values: Any) -> Iterator[str]:
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise WaterfillError(f"{name} must be a text, or a list of texts")
    yield from values


def plain_message(message: Mapping[str, Any]) -> Message:
    """A message whose content is one text; WaterfillError if it has more than that."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise WaterfillError("a message must have a role and a content that is text")
    return {"role": role, "content": content}
