"""The verbs that let a model write: text as it comes, what is said at the end, clumsy use."""

from __future__ import annotations

import io
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests import running  # noqa: E402
from tests.commands import Shell, refused, usage  # noqa: E402
from tests.pipeline import small  # noqa: E402
from waterfill.runtime.generation import open_writer  # noqa: E402

PROMPT = ["--prompt", "The river"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


# generate


def test_generate(run: Shell) -> None:
    done = run("generate", running.talker(), *PROMPT, "--tokens", "12")
    assert done.status == 0 and done.out.startswith("The river") and done.out.endswith("\n")
    (line,) = done.err.splitlines()
    assert line.startswith("prompt of 9 tokens at ") and "then 12 tokens at " in line
    assert "MB in memory" in line and "process at most" in line


def test_generate_as_json(run: Shell) -> None:
    done = run("generate", running.talker(), *PROMPT, "--tokens", "12", "--json")
    assert (done.status, done.err) == (0, "")
    result = done.json
    assert result["text"] + "\n" == run("generate", running.talker(), *PROMPT, "--tokens", "12").out
    assert (result["prompt_tokens"], result["tokens"], result["finish"]) == (9, 12, "length")
    assert result["tokens_per_second"] > 0 and result["prefill_tokens_per_second"] > 0
    held = sum(p.nbytes for p in open_writer(running.talker()).model.parameters())
    assert held <= result["weights_nbytes"] < 1.1 * held
    assert result["peak_nbytes"] > result["weights_nbytes"]


def test_sampling_options(run: Shell) -> None:
    def text(*options: str) -> str:
        words = [*PROMPT, "--tokens", "30", *options]
        return run("generate", running.talker(), *words, "--json").json["text"]

    greedy = text()
    assert text("--temperature", "0", "--seed", "3") == text("--top-p", "1e-9") == greedy
    hot = text("--temperature", "3", "--seed", "3")
    assert hot == text("--temperature", "3", "--seed", "3") != greedy
    assert hot != text("--temperature", "3", "--seed", "4")


def test_residencies(run: Shell) -> None:
    """Each writes, in less memory than dense tensors, and within what `show` and --memory say."""
    held = {}
    for residency in ("dense", "packed", "coded"):
        words = [*PROMPT, "--tokens", "4", "--residency", residency, "--json"]
        done = run("generate", small.artifact(), *words)
        assert (done.status, done.err) == (0, "") and done.json["tokens"] == 4
        held[residency] = done.json["weights_nbytes"]
    assert max(held["packed"], held["coded"]) < held["dense"]
    shown = run("show", small.artifact(), "--json").json["memory_nbytes"]
    assert shown.keys() == held.keys()
    # Buffers that are no weights, such as frequencies of positions, are in the one alone.
    assert all(held[r] <= 1.05 * shown[r] + 1000 for r in held)
    lines = run("show", small.artifact()).out.splitlines()[-3:]
    assert [line.split()[3] for line in lines] == ["dense:", "packed:", "coded:"]
    words = [*PROMPT, "--tokens", "4", "--memory", str(min(shown.values()) + 100), "--json"]
    done = run("generate", small.artifact(), *words)
    assert done.status == 0 and done.json["weights_nbytes"] < held["dense"]
    for options in (["--memory", "1kB"], ["--size", "1kB"]):
        refused(run("generate", small.artifact(), *PROMPT, *options), "bytes")
        refused(run("chat", small.artifact(), *options), "bytes")
        refused(run("serve", small.artifact(), "--port", "0", *options), "bytes")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "warm"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "share"),
        (["--top-p", "1.5"], "share"),
        (["--residency", "sparse"], "sparse"),
        (["--memory", "much"], "not a size"),
        (["--size", "big"], "not a size"),
        (["--memory", "1MB", "--residency", "dense"], "not allowed with"),
    ],
)
def test_options_that_cannot_be(options: list[str], said: str, run: Shell) -> None:
    usage(run("generate", "OUT", *PROMPT, *options), said)
    usage(run("chat", "OUT", *options), said)


def test_what_cannot_be_continued(run: Shell) -> None:
    refused(run("generate", running.mute(), *PROMPT), "BertForMaskedLM cannot continue a text")
    refused(run("generate", small.model(), *PROMPT), "waterfill")
    refused(run("generate", "nowhere", *PROMPT), "nowhere")
    refused(run("generate", running.talker(), "--prompt", "x" * 200), "128", "200")


def start(*words: str | Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "waterfill", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


def test_an_interrupt_ends_the_text(tmp_path: Path) -> None:
    """Text comes while the model still writes, and what came before Ctrl-C stays."""
    with start("generate", endless(tmp_path), *PROMPT, "--tokens", "100000") as process:
        assert process.stdout and process.stdout.read(12).startswith("The river")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.endswith("\n") and "tokens/s" in err and "Traceback" not in err


def endless(folder: Path) -> Path:
    """An artifact of a model with room for more tokens than one waits for."""
    import waterfill

    shutil.copytree(small.model(), folder / "model")
    small.change_config(folder / "model", max_position_embeddings=200000, eos_token_id=None)
    waterfill.compress(folder / "model", folder / "endless", lossless=True)
    return folder / "endless"


def test_a_terminal_is_not_steered(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that a model writes do not move the cursor; a pipe gets them as they are."""
    words = ["generate", running.talker(), *PROMPT, "--tokens", "110", "--seed", "5"]
    piped = run(*words).out
    assert any(not c.isprintable() and c not in "\n\t" for c in piped), "nothing to keep out"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = run(*words).out
    assert shown == "".join(c for c in piped if c.isprintable() or c in "\n\t")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other side of a terminal is closed
        return b""


# chat


@pytest.fixture
def talk(run: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Run `chat` with lines on stdin."""

    def call(lines: str, *words: str | Path) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return run("chat", *words)

    return call


def test_chat(talk: Shell) -> None:
    options = ["--tokens", "8", "--temperature", "0"]
    done = talk("Hello\n\nMore\n", running.talker(), *options, "--json")
    assert (done.status, done.err) == (0, "")
    roles = [m["role"] for m in done.json["messages"]]
    assert roles == ["user", "assistant"] * 2
    answers = [m["content"] for m in done.json["messages"] if m["role"] == "assistant"]
    plain = talk("Hello\nMore\n", running.talker(), *options)
    assert plain.status == 0 and plain.out == "".join(f"{a}\n" for a in answers)
    assert plain.err.count("tokens/s") == 4 and "MB in memory" in plain.err
    assert "template" not in plain.err


def test_chat_forgets_and_ends(talk: Shell) -> None:
    options = ["--tokens", "8", "--temperature", "0"]
    once = talk("Hello\n", running.talker(), *options).out
    assert talk("Hello\n/reset\nHello\n/quit\nHello\n", running.talker(), *options).out == 2 * once
    brief = talk("Hello\n", running.talker(), *options, "--system", "Be brief.").out
    assert brief != once
    kept = talk("x\n/reset\nHello\n", running.talker(), *options, "--system", "Be brief.").out
    assert kept.endswith(brief)


def test_chat_without_a_template_says_so(talk: Shell) -> None:
    done = talk("The river\n", small.artifact(), "--tokens", "4", "--temperature", "0")
    assert done.status == 0 and "no chat template" in done.err
    refused(talk("", small.artifact(), "--system", "x"), "no place for a system message")


def test_chat_when_the_context_is_full(talk: Shell) -> None:
    lines = "Hello\n" * 12 + "x" * 130 + "\nHello\n"
    done = talk(lines, running.talker(), "--tokens", "8", "--temperature", "0")
    assert done.status == 0
    assert "the oldest 2 messages are forgotten" in done.err
    assert "takes 128 tokens at once, and the message has 137" in done.err
    assert done.err.count("then 8 tokens") == 13


def test_chat_on_what_cannot_talk(talk: Shell) -> None:
    refused(talk("x\n", "nowhere"), "nowhere")
    done = talk("x\n", running.mute())
    assert "BertForMaskedLM cannot continue a text" in done.err and "Traceback" not in done.err


def test_chat_at_a_terminal(tmp_path: Path) -> None:
    """A prompt is shown; Ctrl-C ends an answer, not the conversation; Ctrl-D ends that."""
    master, slave = pty.openpty()
    words = ["chat", str(endless(tmp_path)), "--tokens", "100000", "--temperature", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    with subprocess.Popen(
        [sys.executable, "-m", "waterfill", *words],
        stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(slave)
        _until(master, b"/quit ends\r\n", b"> ")
        os.write(master, b"Hello\n")
        _until(master, b"Hello\r\n")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        seen = _until(master, b"tokens/s, then ", b"tokens/s\r\n", b"> ")
        assert b"Traceback" not in seen
        os.write(master, b"\x04")
        assert process.wait(timeout=60) == 0
    os.close(master)


def _until(descriptor: int, *marks: bytes) -> bytes:
    """What is read until the marks have come one after the other."""
    seen, at = b"", 0
    for mark in marks:
        while (found := seen.find(mark, at)) < 0:
            chunk = _read(descriptor)
            assert chunk, seen
            seen += chunk
        at = found + len(mark)
    return seen
