"""`waterfill serve` as the openai client meets it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("fastapi_openai_compat")
openai = pytest.importorskip("openai")

from tests import running  # noqa: E402
from tests.commands import Shell, refused, usage  # noqa: E402
from tests.pipeline import small  # noqa: E402
from waterfill.runtime.generation import Sampling, open_writer  # noqa: E402
from waterfill.runtime.requests import plain_message, sampling_of  # noqa: E402
from waterfill.runtime.serving import Service, listen  # noqa: E402
from waterfill.types import WaterfillError  # noqa: E402

NAME = "talker-out"
HELLO = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 12}


@contextlib.contextmanager
def served(*words: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, on a free port, and its address."""
    command = [sys.executable, "-m", "waterfill", "serve", "--port", "0", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()  # comes when it is ready
            assert line, process.communicate()
            yield process, line.split(";")[0].split(" at ")[1]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with served(running.talker()) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: tuple[Any, str]) -> Iterator[Any]:
    with openai.OpenAI(base_url=server[1], api_key="none", max_retries=0, timeout=60) as made:
        yield made


def written(prompt: str, tokens: int = 12) -> str:
    """What the model itself writes, greedily."""
    writer = open_writer(running.talker())
    return "".join(writer.write(writer.encode(prompt), Sampling(tokens, temperature=0)))


def test_models(client: Any) -> None:
    assert [(m.id, m.owned_by) for m in client.models.list()] == [(NAME, "waterfill")]


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(messages=HELLO, **GREEDY)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert choice.message.content == written("[u]Hello\n[a]")
    assert answer.usage.prompt_tokens == 12 and answer.usage.completion_tokens == 12
    assert answer.model == NAME and answer.object == "chat.completion"


def test_chat_streamed(client: Any) -> None:
    stream = client.chat.completions.create(
        messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert len(pieces) > 3 and "".join(pieces) == written("[u]Hello\n[a]")
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12 and len({c.id for c in chunks}) == 1


def test_completions(client: Any) -> None:
    whole = written("The river")
    answer = client.completions.create(prompt="The river", **GREEDY)
    assert answer.choices[0].text == whole and answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 21
    chunks = list(client.completions.create(prompt="The river", stream=True, **GREEDY))
    assert "".join(c.choices[0].text for c in chunks) == whole and len(chunks) > 3
    assert chunks[-1].choices[0].finish_reason == "length"
    cut = whole[3:5]
    answer = client.completions.create(prompt="The river", stop=["zzz", cut], **GREEDY)
    assert answer.choices[0].text == whole[: whole.index(cut)]
    assert answer.choices[0].finish_reason == "stop"


def test_what_is_refused(client: Any) -> None:
    chat = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5' here, only 'talker-out'"):
        chat(messages=HELLO, model="gpt-5")
    with pytest.raises(openai.BadRequestError, match="takes 128 tokens at once; the prompt has"):
        chat(messages=[{"role": "user", "content": "x" * 200}], model=NAME)
    with pytest.raises(openai.BadRequestError, match="takes 128 tokens at once"):
        client.completions.create(prompt="x" * 120, **GREEDY)
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(prompt="", **GREEDY)
    with pytest.raises(openai.BadRequestError, match="cannot do n=2"):
        chat(messages=HELLO, n=2, **GREEDY)
    with pytest.raises(openai.BadRequestError, match="no such role: judge"):
        chat(messages=[{"role": "judge", "content": "x"}], **GREEDY)
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.post("/chat/completions", body={"model": NAME}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="one text"):
        client.post("/completions", body={"model": NAME, "prompt": 3}, cast_to=object)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(input="x", model=NAME)
    assert client.models.list(), "it is still there"


def test_requests_wait_for_their_turn(client: Any) -> None:
    """Eight at once, one of which is left early: each gets what it would get alone."""
    alone = client.chat.completions.create(messages=HELLO, **GREEDY).choices[0].message.content
    started = threading.Barrier(8)

    def one(number: int) -> str:
        started.wait()
        if number == 0:
            stream = client.chat.completions.create(messages=HELLO, stream=True, **GREEDY)
            next(iter(stream))
            stream.close()
            return str(alone)
        answer = client.chat.completions.create(messages=HELLO, **GREEDY)
        return str(answer.choices[0].message.content)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == [alone] * 8


def test_an_interrupt_stops_it(server: tuple[subprocess.Popen[str], str], client: Any) -> None:
    """Comes last of those that use the server: it stops in the middle of an answer, quietly."""
    process, _ = server
    long = GREEDY | {"max_tokens": 100}
    stream = client.completions.create(prompt="The river", stream=True, **long)
    next(iter(stream))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_model_without_a_template(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers completions; and what other machines can reach is warned of."""
    opened: dict[str, Any] = {}

    def serve(writer: Any, name: str, sock: Any) -> None:
        opened.update(writer=writer, name=name)
        raise KeyboardInterrupt

    monkeypatch.setattr("waterfill.runtime.serving.serve", serve)
    done = run("serve", small.artifact(), "--host", "0.0.0.0", "--port", "0")
    assert done.status == 0 and done.out.startswith("artifact at http://0.0.0.0:")
    warning, template = done.err.splitlines()
    assert warning.startswith("waterfill: warning: 0.0.0.0 can be reached from other machines")
    assert "/v1/completions only" in template
    service = Service(**opened)
    with pytest.raises(WaterfillError, match="no chat template"):
        asyncio.run(service.chat("artifact", HELLO, {}))
    body = {"model": "artifact", "prompt": "The", "max_tokens": 3}
    answer = asyncio.run(service.complete(body))
    assert isinstance(answer, dict) and answer["usage"]["completion_tokens"] <= 3


def test_what_cannot_be_served(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run("serve", "nowhere", "--port", "0"), "nowhere")
    usage(run("serve", "OUT", "--port", "70000"), "70000")
    usage(run("serve", "OUT", "--port", "http"), "http")
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        refused(run("serve", running.talker(), "--port", port), "cannot listen at 127.0.0.1", port)
    refused(run("serve", running.talker(), "--host", "999.1.1.1"), "cannot listen at 999.1.1.1")
    monkeypatch.setitem(sys.modules, "fastapi_openai_compat", None)
    refused(run("serve", running.talker()), "pip install 'waterfill[serve]'")


# Requests


def test_wishes() -> None:
    body = {"model": "m", "messages": [], "stream": False, "n": 1, "tools": None, "user": "x"}
    assert sampling_of(body) == Sampling()
    body = {"max_tokens": 5, "max_completion_tokens": 7, "temperature": 0.5, "top_p": 1, "seed": 3}
    assert sampling_of({**body, "stop": "\n"}) == Sampling(7, 0.5, 1, 3, ("\n",))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": "hot"}, "temperature must be a number from 0 to 100"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1 << 64}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"logprobs": True}, "cannot do logprobs=true"),
        ({"tools": [{"type": "function"}]}, "cannot do tools="),
        ({"response_format": {"type": "json_object"}}, "cannot do response_format="),
    ],
)
def test_wishes_that_cannot_be_met(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(WaterfillError, match=said):
        sampling_of(wish)


def test_messages_in_parts() -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    assert plain_message({"role": "user", "content": parts}) == HELLO[0]
    for content in ([{"type": "image_url", "image_url": {}}], None, 3):
        with pytest.raises(WaterfillError, match="content that is text"):
            plain_message({"role": "user", "content": content})
