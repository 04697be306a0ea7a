"""The verbs for the KV cache: what they leave and print, and what clumsy use gets to read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import waterfill  # noqa: E402
from tests import running  # noqa: E402
from tests.commands import Shell, refused, usage  # noqa: E402
from waterfill.runtime.cache.fitting.statistics import FILE_NAME, load_statistics  # noqa: E402
from waterfill.runtime.conversation import Conversation  # noqa: E402
from waterfill.runtime.generation import Sampling, open_writer  # noqa: E402

PROMPT = ["--prompt", "The river"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with the statistics of its cache beside it."""
    from waterfill.pipeline import calibrate_cache_to

    out = tmp_path_factory.mktemp("cache") / "talker"
    shutil.copytree(running.talker(), out)
    made = calibrate_cache_to(out, tokens=2048)
    assert made["path"] == str(out / FILE_NAME)
    return out


def test_calibration_leaves_a_file_beside_the_model(run: Shell, tmp_path: Path) -> None:
    shutil.copytree(running.talker(), tmp_path / "out")
    done = run("calibrate-cache", "out", "--tokens", "1024")
    assert done.status == 0 and "statistics of 2 layers" in done.out and "next: " in done.out
    made = load_statistics(tmp_path / "out" / FILE_NAME)
    assert made.protocol["model_type"] == "llama" and made.protocol["windows"] == 8
    refused(run("calibrate-cache", "out", "--tokens", "1024"), "exists", "--force")
    again = run("calibrate-cache", "out", "--self", "--tokens", "256", "--force", "--json").json
    assert again["layers"] == 2 and again["protocol"]["texts"][0]["name"] == "self"


def test_an_artifact_is_what_it_was_with_the_file_beside(run: Shell, calibrated: Path) -> None:
    for words in (["show"], ["verify"], ["generate", *PROMPT, "--tokens", "2"]):
        done = run(words[0], calibrated, *words[1:], "--json")
        assert done.status == 0 and FILE_NAME not in done.out
    assert run("decompress", calibrated, "-o", "plain").status == 0
    assert load_statistics(Path("plain", FILE_NAME)).layers  # the weights are the same
    assert run("generate", calibrated, *PROMPT, "--tokens", "2", "--cache", "transform").status == 0
    assert set(waterfill.load(calibrated)) == set(waterfill.load(running.talker()))


def test_measuring(run: Shell, calibrated: Path) -> None:
    words = ["--sizes", "30kB", "--bits", "12", "--methods", "auto", "transform", "channel:bits=2"]
    words += ["--window", "128", "--tokens", "300", "--no-stock", "-o", "made/cache.json"]
    done = run("cache", calibrated, *words, "--report", "made/cache.html")
    assert done.status == 0, done.err
    assert re.search(r"^exact +256 ", done.out, re.MULTILINE)
    result = json.loads(Path("made/cache.json").read_text())
    cells = {(c["method"], c["asked"]): c for c in result["cells"]}
    assert len(cells) == 5 and cells["channel:bits=2", ""]["chosen"] == {"channel": 2}
    for (_, asked), cell in cells.items():
        assert cell["kl_nats"] > 0 and cell["tokens_per_second"] > 0
        if asked == "30kB":
            assert cell["nbytes"] <= 30_000 == cell["budget_nbytes"]
    page = Path("made/cache.html").read_text()
    assert page.count("<circle") == 5 and page.count("<polyline") == 3 and "<script" not in page
    assert run("cache", calibrated, *words[:-2], "--json").json["protocol"]["window"] == 128


def test_what_cannot_be_measured_is_a_dash(run: Shell, calibrated: Path) -> None:
    words = ["--sizes", "1kB", "--window", "128", "--tokens", "130", "--no-stock"]
    done = run("cache", calibrated, *words)
    assert done.status == 1 and "\u2013" in done.out and "too small" in done.out
    assert "no cache was made" in done.err


def test_sizes_of_what_is_written(run: Shell, calibrated: Path) -> None:
    words = [*PROMPT, "--tokens", "100", "--cache-size", "20kB", "--json"]
    found = run("generate", calibrated, *words).json["cache"]
    assert found["nbytes"] <= found["budget_nbytes"] == 20_000 and found["tokens"] == 108


def test_one_cache_holds_one_text_after_the_other(calibrated: Path) -> None:
    writer = open_writer(calibrated, cache={"size": "25kB", "tokens": None})
    talk = Conversation(writer, Sampling(tokens=20, temperature=0))
    caches = []
    for text in ("Hello", "Hello"):
        talk.reset()
        answer = "".join(talk.ask(text))
        assert talk.answer is not None
        caches.append((answer, talk.answer.cache, talk.answer.cache.get_seq_length()))
    (first, one, tokens), (second, other, again) = caches
    assert one is other and (first, tokens) == (second, again)
    # Two texts at a time do not share it.
    a, b = (iter(writer.write(writer.encode("A river"), Sampling(5))) for _ in range(2))
    assert next(a) and next(b)
    assert "".join(a) is not None and "".join(b) is not None


@pytest.mark.parametrize("verb", ["generate", "chat", "serve"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cache-size", "abc"], "not a size"),
        (["--cache-size", "-5"], "not a size"),
        (["--cache", "chanel"], "no cache method is called 'chanel'; known"),
        (["--cache", "channel:bits=9"], "bits must be 1 to 8"),
        (["--cache", "channel:colour=9"], "not an option"),
        (["--cache-statistics", "x"], "--cache-size"),
        (["--cache", "channel:bits=4", "--cache-size", "1MB"], "leave"),
    ],
)
def test_options_that_cannot_be(verb: str, options: list[str], said: str, run: Shell) -> None:
    words = PROMPT if verb == "generate" else []
    usage(run(verb, "OUT", *words, *options), said)


def test_what_is_refused(run: Shell, calibrated: Path, tmp_path: Path) -> None:
    for verb in (["generate", *PROMPT], ["chat"], ["serve", "--port", "0"]):
        refused(run(verb[0], calibrated, *verb[1:], "--cache-size", "1kB"), "too small", "larger")
    refused(run("calibrate-cache", "demo"), "-o")
    refused(run("calibrate-cache", "nowhere/at/all"), "nowhere/at/all")
    weights = calibrated / "model.safetensors"
    refused(run("calibrate-cache", calibrated, "-o", weights, "--force"), "something else")
    refused(run("calibrate-cache", calibrated, "-o", tmp_path), "is a folder")
    refused(run("calibrate-cache", calibrated, "-o", "f", "--window", "129"), "128 tokens")
    refused(run("calibrate-cache", calibrated, "-o", "f", "--window", "40"), "64")
    refused(run("calibrate-cache", running.mute(), "-o", "f"), "BertForMaskedLM")
    usage(run("cache", calibrated, "--bits", "nan"), "no number of bits")
    usage(run("cache", calibrated, "--methods", "chanel"), "known")
    refused(
        run("cache", calibrated, "--methods", "transform", "--statistics", weights), "statistics"
    )
    damaged = Path("damaged.safetensors")
    damaged.write_bytes((calibrated / FILE_NAME).read_bytes()[:5000])
    refused(run("cache", calibrated, "--statistics", damaged), "damaged.safetensors")
    refused(run("cache", calibrated, "--statistics", "missing"), "missing")
