"""A tiny model that talks: a chat template of its own, an artifact made once a session."""

from __future__ import annotations

import functools
from pathlib import Path

import waterfill
from tests import tiny
from tests.pipeline import small

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + m['role']) }}{% endif %}"
    "[{{ m['role'][0] }}]{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@functools.cache
def talker() -> Path:
    """An exact artifact of a Llama of 128 positions, one token a byte, with TEMPLATE."""
    folder = small.home() / "talker"
    with small.quiet():
        tiny.tiny_model("llama", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    out = small.home() / "talker-out"
    waterfill.compress(folder, out, lossless=True)
    return out


@functools.cache
def mute() -> Path:
    """An exact artifact of a model that cannot continue a text."""
    folder = small.home() / "mute"
    with small.quiet():
        tiny.tiny_model("bert", folder)
    out = small.home() / "mute-out"
    waterfill.compress(folder, out, lossless=True)
    return out
