"""Text piece by piece: the same as transformers decodes at once, timed, and stopped on request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests import running  # noqa: E402
from tests.pipeline import small  # noqa: E402
from waterfill.runtime.conversation import Conversation  # noqa: E402
from waterfill.runtime.footprint import peak_nbytes, weights_nbytes  # noqa: E402
from waterfill.runtime.generation import (  # noqa: E402
    MOST_TOKENS,
    Sampling,
    Timings,
    Writer,
    _Listener,
    open_writer,
)
from waterfill.types import WaterfillError  # noqa: E402

GREEDY = Sampling(tokens=20, temperature=0)


@pytest.fixture(scope="module")
def writer() -> Writer:
    return open_writer(running.talker())


def at_once(writer: Writer, prompt: str, tokens: int) -> str:
    """What transformers itself continues, greedily."""
    inputs = writer.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = writer.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    return str(writer.tokenizer.decode(out, skip_special_tokens=True))


def test_the_pieces_are_the_text(writer: Writer) -> None:
    text = writer.write(writer.encode("The river"), GREEDY)
    pieces = list(text)
    assert "The river" + "".join(pieces) == at_once(writer, "The river", 20)
    assert len(pieces) > 1 and text.finish == "length"
    took = text.timings
    assert (took.prompt_tokens, took.tokens) == (9, 20)
    assert took.prefill_seconds > 0 and took.decode_seconds > 0
    assert took.decode_tokens_per_second == pytest.approx(19 / took.decode_seconds)
    assert took.prefill_tokens_per_second == pytest.approx(9 / took.prefill_seconds)


def test_one_token_has_no_rate() -> None:
    assert Timings(3, 1, 0.1, 0.0).decode_tokens_per_second is None


def test_a_seed_repeats_the_draws(writer: Writer) -> None:
    def draw(seed: int | None) -> str:
        return "".join(writer.write(writer.encode("The"), Sampling(40, 1.5, 1.0, seed)))

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        (Sampling(), {}),
        (Sampling(temperature=0), {"do_sample": False}),
        (Sampling(temperature=0, top_p=0.5), {"do_sample": False}),
        (Sampling(top_p=0.5), {"do_sample": True, "temperature": 1.0, "top_p": 0.5}),
        (Sampling(temperature=2), {"do_sample": True, "temperature": 2, "top_p": 1.0}),
    ],
)
def test_sampling_as_transformers_names_it(sampling: Sampling, options: dict[str, Any]) -> None:
    got = sampling.options()
    assert got == options
    # Of an int transformers says that it is no positive float.
    assert not any(type(value) is int for value in got.values())


def test_an_end_token_stops(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = writer.encode("The river")
    whole = writer.write(prompt, GREEDY)
    list(whole)
    third = whole.ids[2]
    monkeypatch.setattr(writer.model.generation_config, "eos_token_id", [258, third])
    text = writer.write(prompt, GREEDY)
    list(text)
    assert text.ids == whole.ids[: whole.ids.index(third) + 1] and text.finish == "stop"
    only = writer.write(prompt, Sampling(tokens=text.timings.tokens, temperature=0))
    list(only)
    assert only.finish == "stop", "the last token allowed was an end token"


def test_leaving_the_loop_stops_the_model(writer: Writer) -> None:
    before = threading.active_count()
    text = writer.write(writer.encode("The"), Sampling(tokens=100, temperature=0))
    stream = iter(text)
    next(stream)
    stream.close()
    assert text.timings.tokens < 100 and text.finish == ""
    assert threading.active_count() == before


def test_an_error_of_the_model_reaches_the_reader(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(writer.model, "generate", broken)
    with pytest.raises(RuntimeError, match="no memory left"):
        list(writer.write(writer.encode("The"), GREEDY))


def test_prompts_that_cannot_be(writer: Writer) -> None:
    with pytest.raises(WaterfillError, match="the prompt is empty"):
        writer.encode("")
    with pytest.raises(WaterfillError, match=r"takes 128 .* has 3 and 126 more"):
        writer.write(writer.encode("The"), Sampling(tokens=126))
    with pytest.raises(WaterfillError, match="leaves no room"):
        writer.write(writer.encode("x" * 128))
    mute = open_writer(running.mute())
    with pytest.raises(WaterfillError, match="BertForMaskedLM cannot"):
        mute.write(mute.encode("The"))
    assert writer.write(writer.encode("The")).tokens == min(MOST_TOKENS, 125)


# Decoding of pieces


class Words:
    """A tokenizer that drops the space at the start of a text, as sentencepiece does."""

    vocabulary = (" a", " b", "c", "\ufffd", "é")

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        text = "".join(self.vocabulary[i] for i in ids)
        # The bytes of one character in two tokens.
        return text.replace("\ufffdé", "é").removeprefix(" ")


def said(*tokens: int, prompt: tuple[int, ...] = (0,)) -> list[str]:
    listener = _Listener(Words())
    listener.put(torch.tensor([prompt]))
    for token in tokens:
        listener.put(torch.tensor([token]))
    listener.end()
    pieces: list[str] = []
    while not listener.pieces.empty():
        piece = listener.pieces.get()
        assert isinstance(piece, str)
        pieces.append(piece)
    return pieces


def test_words_keep_their_space() -> None:
    assert said(1, 0, 2, 1) == [" b", " a", "c", " b"]
    assert said(1, prompt=(0, 1, 2) * 9) == [" b"]


def test_a_character_waits_for_its_bytes() -> None:
    assert said(1, 3, 4, 0) == [" b", "é", " a"]
    assert said(1, 3) == [" b", "\ufffd"], "at the end, what there is"


# Conversations


def test_a_conversation_is_written_as_the_template_says(writer: Writer) -> None:
    talk = Conversation(writer, GREEDY, "Be brief.")
    prompt = "[s]Be brief.\n[u]Hello\n[a]"
    first = "".join(talk.ask("Hello"))
    assert prompt + first == at_once(writer, prompt, 20)
    prompt += first + "\n[u]More\n[a]"
    assert prompt + "".join(talk.ask("More")) == at_once(writer, prompt, 20)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    talk.reset()
    assert "".join(talk.ask("Hello")) == first


def test_the_oldest_exchanges_go_when_the_context_is_full(writer: Writer) -> None:
    talk = Conversation(writer, Sampling(tokens=5, temperature=0), "Be brief.")
    list(talk.ask("First, " * 3))
    list(talk.ask("Second"))
    assert talk.forgotten == 0
    list(talk.ask("Third, " * 8))
    assert talk.forgotten == 2 and talk.messages[0]["content"] == "Second"
    kept = list(talk.messages)
    with pytest.raises(WaterfillError, match=r"takes 128 tokens at once, and the message has \d+"):
        list(talk.ask("x" * 128))
    assert talk.messages == kept


def test_what_was_left_early_is_kept(writer: Writer) -> None:
    talk = Conversation(writer, GREEDY)
    stream = talk.ask("Hello")
    piece = next(stream)
    stream.close()
    assert [m["content"] for m in talk.messages] == ["Hello", piece]


def test_a_template_that_refuses(writer: Writer) -> None:
    with pytest.raises(WaterfillError, match="no such role: judge"):
        writer.encode_chat([{"role": "judge", "content": "x"}])


def test_no_template_is_made_up() -> None:
    plain = open_writer(small.artifact())
    assert not plain.has_template
    with pytest.raises(WaterfillError, match="no chat template"):
        plain.encode_chat([{"role": "user", "content": "x"}])
    with pytest.raises(WaterfillError, match="no place for a system message"):
        Conversation(plain, system="Be brief.")
    talk = Conversation(plain, GREEDY)
    first = "".join(talk.ask("The river"))
    second = "".join(talk.ask("And the sea"))
    prompt = f"The river{first}And the sea"
    assert prompt + second == at_once(plain, prompt, 20)


# Memory


def test_weights_are_counted_once() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    twice = torch.nn.ModuleList([layer, torch.nn.Linear(8, 4, bias=False)])
    twice[1].weight = layer.weight
    twice.register_buffer("scales", torch.zeros(3, dtype=torch.float16))
    assert weights_nbytes(twice) == 4 * 32 + 6


@pytest.fixture
def block() -> Iterator[Any]:
    yield torch.ones(2 << 20, dtype=torch.float32)


def test_the_peak_covers_what_is_there(block: Any) -> None:
    assert peak_nbytes() > weights_nbytes(torch.nn.Module()) + block.nbytes
