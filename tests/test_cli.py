"""The command line: exit codes, what goes to stdout and stderr, and what clumsy use gets to read."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import pty
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import safetensors.numpy  # noqa: E402

from tests import checkpoints  # noqa: E402
from tests.commands import Shell, refused, shell, usage  # noqa: E402
from tests.pipeline import small  # noqa: E402
from waterfill import container  # noqa: E402
from waterfill.cli import VERBS, build_parser  # noqa: E402
from waterfill.container import FILE_NAME, Reader  # noqa: E402
from waterfill.pipeline import record_of  # noqa: E402

NAMES = [verb.name for verb in VERBS]
QUICK = ["--tokens", str(small.TOKENS), "--codec", "*=integer", "--codec", f"{small.BIG}=trellis"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


# What each verb does when all is well


def test_the_whole_chain(run: Shell, tmp_path: Path) -> None:
    model, text = small.model(), small.text()
    done = run("calibrate", model, "-o", "stats", "--text", text, "--tokens", "256", "--json")
    assert (done.status, done.err) == (0, "")
    assert done.json["protocol"]["tokens"] == 256 and {"path", "notes"} <= done.json.keys()
    shutil.rmtree("stats")
    shutil.copytree(small.statistics(), "stats")  # the same, with prices

    done = run("plan", "stats", "--bits", "5", "-o", "deep/plan.json", "--json")
    assert (done.status, done.err) == (0, "")
    assert {"budget_nbytes", "predicted_nats", "choices"} <= done.json.keys()
    assert json.loads(Path("deep/plan.json").read_text()) == done.json

    done = run("compress", model, "-o", "out", "--bits", "5", "--calibrate", "stats", "--json")
    assert (done.status, done.err) == (0, "")
    record = done.json
    assert {"name", "nbytes", "bits_per_weight", "predicted", "ledger", "curve"} <= record.keys()
    assert record["about"]["command"].startswith("waterfill compress ")

    for plan in ("deep/plan.json", "out"):
        options = ["--plan", plan, "--calibrate", "stats", "--json"]
        done = run("compress", model, "-o", "planned", "--force", *options)
        assert (done.status, done.err) == (0, "")
    assert Path("planned", FILE_NAME).read_bytes() == Path("out", FILE_NAME).read_bytes()
    shutil.rmtree("planned")

    done = run("show", "out", "--json")
    assert (done.status, done.err) == (0, "")
    assert sum(r["nbytes"] for r in done.json["ledger"]) == Path("out", FILE_NAME).stat().st_size
    assert {"codec", "bits_per_weight", "why", "name"} <= done.json["ledger"][0].keys()

    done = run("verify", "out", "--json")
    assert (done.status, done.err) == (0, "") and done.json["ok"] is True

    window = ["--window", "64", "--tokens", "256"]
    done = run("eval", "out", "--against", model, "--text", text, *window, "--json")
    assert (done.status, done.err) == (0, "")
    assert done.json["kl_nats"] > 0 and 0 < done.json["top1_agreement"] <= 1
    assert {"perplexity", "perplexity_original", "protocol"} <= done.json.keys()
    kept = record_of("out").metrics
    assert kept["kl_nats"] == done.json["kl_nats"]
    rounded = run("eval", "out", "--against", model, "--text", text, *window, "--json", "--activations", "e5m2")  # fmt: skip
    assert (rounded.status, rounded.err) == (0, "")
    assert rounded.json["kl_nats"] > done.json["kl_nats"]
    assert rounded.json["protocol"]["activations"].startswith("e5m2, simulated: inputs of the 7 ")
    assert record_of("out").metrics == kept

    done = run("generate", "out", "--prompt", "The river", "--tokens", "4", "--json")
    assert (done.status, done.err) == (0, "")
    assert done.json["text"].startswith("The river") and done.json["tokens_per_second"] > 0

    done = run("decompress", "out", "-o", "plain", "--json")
    assert (done.status, done.err) == (0, "")
    assert done.json["nbytes"] == Path("plain", FILE_NAME).stat().st_size

    done = run("report", "out", "--json")
    assert (done.status, done.err) == (0, "")
    assert Path("out/report.html").stat().st_size == done.json["nbytes"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "out", "plain", "stats"]


def test_words_for_people(run: Shell) -> None:
    out = small.artifact()
    shutil.copytree(out, "copy")
    done = run(
        "compress", small.model(), "-o", "o", "--bits", "5", "--calibrate", small.statistics()
    )
    assert done.status == 0 and "bits per weight" in done.out and "next: waterfill eval" in done.out
    done = run("plan", small.statistics(), "--bits", "5", "--dry-run")
    assert small.BIG in done.out and "nothing was encoded" in done.out
    done = run("show", "copy")
    assert done.status == 0 and small.BIG in done.out and "(container)" in done.out
    assert "every checksum holds" in run("verify", "copy").out
    assert "plain safetensors" in run("decompress", "copy", "-o", "plain").out
    assert run("generate", "copy", "--prompt", "The", "--tokens", "2").out.startswith("The")
    done = run("generate", "copy", "--prompt", "The", "--tokens", "3", "--seed", "7")
    assert (
        done.out == run("generate", "copy", "--prompt", "The", "--tokens", "3", "--seed", "7").out
    )
    assert "html" in run("report", "copy").out
    done = run("eval", "copy", "--against", small.model(), "--window", "64", "--tokens", "128")
    assert "kl_nats" in done.out and "protocol:" in done.out
    listed = run("codecs", "--json").json
    assert [line.split()[0] for line in run("codecs").out.splitlines()[1:-1]] == [
        entry["id"] for entry in listed
    ]
    for entry in listed:
        bits = entry["bits_per_weight"]
        assert bits == sorted(bits) and entry["encode_weights_per_second"] > 0


def test_methods_are_compared(run: Shell) -> None:
    done = run(
        "compare", small.model(), "-o", "compared", "--methods", "integer", "auto", "--sizes", "7",
        "--calibrate", small.statistics(), "--text", small.text(), "--window", "32", "--tokens", "64",
    )  # fmt: skip
    assert done.status == 0 and "auto at 7 chose" in done.out
    assert "next: waterfill compress" in done.out and Path("compared/report.html").exists()


def test_a_dry_run_writes_nothing(run: Shell, tmp_path: Path) -> None:
    shutil.copytree(small.statistics(), "stats")
    before = sorted(tmp_path.rglob("*"))
    done = run("plan", "stats", "--bits", "6", "--dry-run", "-o", "plan.json", "--keep", "*q_proj*")
    assert done.status == 0 and sorted(tmp_path.rglob("*")) == before


def test_more_than_needed_is_said(run: Shell) -> None:
    stats = small.statistics()
    done = run("compress", small.model(), "-o", "out", "--size", "1MB", "--calibrate", stats)
    assert done.status == 0 and "lossless" in done.out


def test_lossless(run: Shell, tmp_path: Path) -> None:
    model = small.model()
    done = run("compress", model, "-o", "out", "--lossless")
    assert (done.status, done.err) == (0, "")
    nbytes = Path("out", FILE_NAME).stat().st_size
    assert f"{nbytes:,} bytes" in done.out and "byte for byte" in done.out
    assert done.out.splitlines()[-1] == "next: waterfill decompress out -o DIR"
    done = run("compress", model, "-o", "out", "--lossless", "--force", "--json")
    assert done.json["nbytes"] == nbytes and done.json["about"]["lossless"] is True
    assert run("show", "out", "--json").json["nbytes"] == nbytes
    assert run("verify", "out", "--json").json["ok"] is True
    assert run("decompress", "out", "-o", "plain").status == 0
    for file in model.iterdir():
        assert Path("plain", file.name).read_bytes() == file.read_bytes()
    window = ["--window", "64", "--tokens", "128", "--text", small.text()]
    done = run("eval", "out", "--against", model, *window, "--json")
    assert done.json["kl_nats"] == 0 and done.json["top1_agreement"] == 1
    done = run("generate", "out", "--prompt", "The river", "--tokens", "4")
    assert done.status == 0 and done.out.startswith("The river")
    assert done.err.count("\n") == 1 and "tokens/s" in done.err
    assert run("report", "out").status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plain"]


def test_lossless_of_what_is_no_model(run: Shell) -> None:
    checkpoints.write_file(Path("net/any.safetensors"), {"w": ("F32", (8, 4))}, metadata={"k": "v"})
    refused(run("compress", "net", "-o", "out", "--bits", "4"), "config.json")
    assert run("compress", "net", "-o", "out", "--lossless").status == 0
    assert run("show", "out").status == run("verify", "out").status == 0
    assert run("report", "out").status == 0
    assert run("decompress", "out", "-o", "back").status == 0
    assert run("decompress", "out", "-o", "back", "--force").status == 0
    assert checkpoints.snapshot(Path("back")) == checkpoints.snapshot(Path("net"))
    refused(run("generate", "out", "--prompt", "x"), "tokenizer")


def test_the_weights_file_may_be_named_instead_of_its_folder(run: Shell) -> None:
    file = small.artifact() / FILE_NAME
    assert run("show", file).out == run("show", small.artifact()).out
    for words in (
        ("verify", file),
        ("generate", file, "--prompt", "The", "--tokens", "2"),
        ("decompress", file, "-o", "plain"),
        ("report", file, "-o", "page.html"),
    ):
        assert run(*words).status == 0


# Processes, streams and terminals


def test_a_process_of_its_own() -> None:
    out = small.artifact()
    done = shell("show", out, "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["ledger"]
    refused(shell("verify", "nowhere"), "nowhere")
    assert shell("verify").returncode == 2


def test_stderr_is_silent_for_models_that_libraries_talk_about(tmp_path: Path) -> None:
    from tests import tiny

    with small.quiet():
        tiny.tiny_model("mamba", tmp_path / "model")
    done = shell(
        "compress", tmp_path / "model", "-o", "out", "--bits", "8",
        "--calibrate", small.text(), "--tokens", "128", "--codec", "*=integer",
        "--codec", "*embed*=trellis",
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""


def test_a_terminal_sees_bars_and_a_file_sees_results(tmp_path: Path) -> None:
    theirs, ours = pty.openpty()
    words = [
        "compress",
        small.model(),
        "-o",
        "out",
        "--bits",
        "5",
        "--calibrate",
        small.statistics(),
    ]
    with Path("result").open("w") as result:
        process = subprocess.Popen(
            [sys.executable, "-m", "waterfill", *map(str, words)],
            stdout=result, stderr=ours, env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(ours)
        seen = b""
        while True:
            try:
                piece = os.read(theirs, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not piece:
                break
            seen += piece
        os.close(theirs)
        assert process.wait(timeout=60) == 0
    assert b"pricing" in seen and b"encoding" in seen
    assert "bits per weight" in Path("result").read_text()
    assert "pricing" not in Path("result").read_text()


def test_a_reader_that_has_seen_enough() -> None:
    words = [sys.executable, "-m", "waterfill", "show", str(small.artifact()), "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def test_debug_shows_the_traceback(run: Shell) -> None:
    done = run("verify", "nowhere", "--debug")
    assert done.status == 1 and "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("waterfill: ")


def test_the_unforeseen_is_one_line_too(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Any:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("waterfill.pipeline.show", broken)
    done = run("show", "x")
    assert done.status == 1 and done.out == ""
    assert done.err == "waterfill: unexpected RuntimeError: two lines (--debug shows where)\n"


# Help and usage


@pytest.mark.parametrize("verb", NAMES)
def test_help(verb: str, run: Shell) -> None:
    done = run(verb, "--help")
    assert done.status == 0 and done.err == ""
    assert "example" in done.out and f"waterfill {verb} " in done.out
    assert "--json" in done.out and "--debug" in done.out


def test_every_verb_is_in_the_overview(run: Shell) -> None:
    done = run("--help")
    assert done.status == 0 and all(f"    {verb}" in done.out for verb in NAMES)
    assert run("--version").out.startswith("waterfill ")


@pytest.mark.parametrize("verb", NAMES)
def test_examples_parse(verb: str, run: Shell) -> None:
    import shlex

    parser: argparse.ArgumentParser = build_parser(VERBS)
    lines = [s.strip() for s in run(verb, "--help").out.splitlines()]
    examples = [s for s in lines if s.startswith(f"waterfill {verb} ")]
    assert examples
    for example in examples:
        parser.parse_args(shlex.split(example.partition(" | ")[0])[1:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "VERB"),
        (["frobnicate"], "frobnicate"),
        (["compress"], "model"),
        (["compress", "M"], "-o"),
        (["compress", "M", "-o", "x"], "--size --bits --ratio"),
        (["compress", "M", "-o", "x", "--bits", "3", "--size", "3MB"], "not allowed with"),
        (["compress", "M", "-o", "x", "--bits", "3", "--plan", "p"], "not allowed with"),
        (["compress", "M", "-o", "x", "--lossless", "--bits", "3"], "not allowed with"),
        (
            ["compress", "M", "-o", "x", "--lossless", "--calibrate", "t"],
            "--calibrate would do nothing",
        ),
        (["compress", "M", "-o", "x", "--lossless", "--tokens", "9"], "leave it out"),
        (["compress", "M", "-o", "x", "--lossless", "--no-propagate"], "leave it out"),
        (["compress", "M", "-o", "x", "--lossless", "--tune", "pv"], "leave it out"),
        (["compress", "M", "-o", "x", "--bits", "3", "--tune-steps", "9"], "--tune pv"),
        (
            ["compress", "M", "-o", "x", "--lossless", "--keep", "a", "--codec", "b=raw"],
            "--keep and --codec would do nothing: leave them out",
        ),
        (["compress", "M", "-o", "x", "--bits", "0"], "try 3.2"),
        (["compress", "M", "-o", "x", "--bits", "nan"], "try 3.2"),
        (["compress", "M", "-o", "x", "--bits", "many"], "try 3.2"),
        (["compress", "M", "-o", "x", "--size", "abc"], "for example 250MB"),
        (["compress", "M", "-o", "x", "--size", "-5"], "for example 250MB"),
        (["compress", "M", "-o", "x", "--ratio", "0%"], "for example 20%"),
        (["compress", "M", "-o", "x", "--ratio", "lots"], "for example 20%"),
        (["compress", "M", "-o", "x", "--ratio", "500%"], "for example 20%"),
        (["compress", "M", "-o", "x", "--bits", "3", "--codec", "=nonsense"], "GLOB=SPEC"),
        (["compress", "M", "-o", "x", "--bits", "3", "--tokens", "0"], "positive"),
        (["compress", "", "-o", "x", "--bits", "3"], "model: the name is empty"),
        (["compress", "M", "-o", "", "--bits", "3"], "-o/--out: the name is empty"),
        (["compress", "M", "-o", "x", "--bits", "3", "--calibrate", ""], "the name is empty"),
        (["calibrate", " ", "-o", "x"], "model: the name is empty"),
        (["eval", "OUT", "--against", ""], "--against: the name is empty"),
        (["show", ""], "OUT: the name is empty"),
        (["calibrate", "M"], "-o"),
        (["calibrate", "M", "-o", "x", "--method", "magic"], "fisher"),
        (["calibrate", "M", "-o", "x", "--self", "--text", "t"], "not allowed with"),
        (["plan", "S"], "--size --bits --ratio"),
        (["show"], "OUT"),
        (["eval", "OUT"], "--against"),
        (["decompress", "OUT"], "-o"),
        (["verify"], "OUT"),
        (["generate", "OUT"], "--prompt"),
        (["generate", "OUT", "--prompt", "x", "--tokens", "-1"], "positive"),
        (["report"], "OUT"),
    ],
)
def test_usage(words: list[str], said: str, run: Shell, tmp_path: Path) -> None:
    usage(run(*words), said)
    assert not list(tmp_path.iterdir())


# Models that cannot be read


def _config(**entries: Any) -> Callable[[Path], None]:
    return lambda folder: small.change_config(folder, **entries)


def _weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = {k: v.copy() for k, v in small.arrays_of(folder).items()}
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / FILE_NAME, {"format": "pt"})

    return apply


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / FILE_NAME).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / FILE_NAME).write_bytes(
            len(text).to_bytes(8, "little") + text + data[8 + length :]
        )

    return apply


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _pickle(folder: Path) -> None:
    (folder / FILE_NAME).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def _cut(folder: Path) -> None:
    data = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).write_bytes(data[:-100])


def _drop(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [f.unlink() for f in folder.glob(pattern)] and None


def _set(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors[small.BIG].__setitem__((3, 4), value)


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (_drop("*.safetensors"), "safetensors"),
    "no config": (_drop("config.json"), "config.json"),
    "a pickle": (_pickle, "pickle"),
    "cut short": (_cut, "cut short"),
    "empty weights": (_write(FILE_NAME, b""), "too few"),
    "not safetensors": (_write(FILE_NAME, b"\x80\x04" * 500), "not a safetensors file"),
    "config not JSON": (_write("config.json", b"{nope"), "not JSON"),
    "config a list": (_write("config.json", b"[1]"), "JSON object"),
    "config empty": (_write("config.json", b"{}"), "model type"),
    "unknown model": (_config(model_type="zzz"), "zzz"),
    "other width": (_config(hidden_size=32), "config.json asks for"),
    "a layer too many": (_config(num_hidden_layers=2), "no tensor for"),
    "NaN": (_weights(_set(np.nan)), small.BIG),
    "Inf": (_weights(_set(-np.inf)), small.BIG),
    "a tensor missing": (_weights(lambda t: t.pop(small.BIG) is None), small.BIG),
    "unknown dtype": (_header(lambda h: h[small.BIG].update(dtype="Q7")), "Q7"),
    "shape that lies": (_header(lambda h: h[small.BIG].update(shape=[260, 17])), small.BIG),
    "negative shape": (_header(lambda h: h[small.BIG].update(shape=[-260, -16])), small.BIG),
    "offsets that lie": (
        _header(lambda h: h[small.BIG].update(data_offsets=[0, 1 << 40])),
        small.BIG,
    ),
    "header that overlaps": (
        _header(lambda h: h["model.norm.weight"].update(data_offsets=[0, 64])),
        "overlaps",
    ),
    "already quantised": (_config(quantization_config={"quant_method": "gptq"}), "quantised"),
    "no tokenizer": (_drop("*token*"), "no tokenizer"),
    "a broken tokenizer": (_write("tokenizer.json", b"{}"), "tokenizer"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(name: str, run: Shell, tmp_path: Path) -> None:
    spoil, said = BAD_MODELS[name]
    shutil.copytree(small.model(), tmp_path / "model")
    spoil(tmp_path / "model")
    options = ["--bits", "5", "--calibrate", small.text(), *QUICK]
    refused(run("compress", "model", "-o", "out", *options), said)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_no_tokenizer_is_fine_where_no_text_is_needed(run: Shell, tmp_path: Path) -> None:
    shutil.copytree(small.model(), "model")
    _drop("*token*")(tmp_path / "model")
    options = ["--bits", "5", "--calibrate", "self", *QUICK]
    done = run("compress", "model", "-o", "out", *options)
    assert done.status == 0 and done.err == ""
    assert run("verify", "out").status == run("show", "out").status == 0
    assert run("decompress", "out", "-o", "plain").status == 0
    refused(run("generate", "out", "--prompt", "x"), "tokenizer")
    refused(run("eval", "out", "--against", "model", "--text", small.text()), "tokenizer")


def test_layers_beyond_the_config_are_said(run: Shell, tmp_path: Path) -> None:
    shutil.copytree(small.model(), "model")
    first = "model.layers.0.mlp.up_proj.weight"

    def second_layer(tensors: dict[str, Any]) -> None:
        extra = {k.replace(".0.", ".1."): v for k, v in tensors.items() if "layers.0" in k}
        tensors.update({k: v + np.float32(1) for k, v in extra.items()})

    _weights(second_layer)(tmp_path / "model")
    words = ["--bits", "20", "--calibrate", small.text(), *QUICK, "--json"]
    done = run("compress", "model", "-o", "out", *words)
    assert done.status == 0 and done.err.count("\n") == 1
    assert done.err.startswith("waterfill: warning: model.layers.1.") and "6 more" in done.err
    why = {row["name"]: row["why"] for row in done.json["ledger"]}
    assert "config.json" not in why[first]
    assert "config.json" in why[first.replace("0", "1")] and "kept" in why[first.replace("0", "1")]


@pytest.mark.parametrize("model", ["nosuch", "no/such", "/no/such/folder", "no such", "a/b/c"])
def test_models_that_are_not_there(model: str, run: Shell, tmp_path: Path) -> None:
    refused(run("compress", "-o", "out", "--bits", "4", "--", model), "there is no folder")
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_a_model(run: Shell) -> None:
    file = small.model() / FILE_NAME
    refused(run("compress", file, "-o", "out", "--bits", "4"), "is a file")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b" \n\t ", "empty"),
        (b"too short", "64"),
        (None, "cannot read"),
        ("Caf\xe9, cr\xe8me".encode("latin1") * 99, "not UTF-8 text (byte 3)"),
        (bytes(range(32)) * 99, "control characters"),
        ("A plain text. ".encode("utf-16-le") * 99, "control characters"),
    ],
)
def test_texts_that_are_none(content: bytes | None, said: str, run: Shell, tmp_path: Path) -> None:
    if content is not None:
        Path("text").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    refused(run("compress", small.model(), "-o", "out", "--bits", "5", "--calibrate", "text"), said)
    refused(run("calibrate", small.model(), "-o", "stats", "--text", "text"), said)
    if content and said != "64":  # eval takes short texts
        said = "no text" if said == "empty" else said
        refused(run("eval", small.artifact(), "--against", small.model(), "--text", "text"), said)
    assert sorted(tmp_path.iterdir()) == before


def test_activations_that_are_none(run: Shell) -> None:
    done = run("eval", small.artifact(), "--against", small.model(), "--activations", "int4")
    refused(done, "activations are int8, e4m3, e5m2")


def test_a_text_shorter_than_a_window_is_run_and_noted(run: Shell) -> None:
    Path("text").write_text("A mill was built where the old road crosses the river. " * 2)
    done = run("calibrate", small.model(), "-o", "stats", "--text", "text", "--json")
    assert done.status == 0
    assert any("cut to" in note for note in done.json["notes"].values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "0"], "positive"),
        (["--size", "10"], "smallest"),
        (["--bits", "5", "--codec", "*=nonsense"], "known: "),
        (["--bits", "5", "--codec", "nonsense"], "known: "),
        (["--bits", "5", "--codec", "integer:bits=99"], "2 to 8"),
        (["--bits", "5", "--codec", "*=integer:bits=99"], "2 to 8"),
        (["--bits", "5", "--codec", "*=integer:bits"], "has: bits"),
        (["--bits", "5", "--codec", "zzz=integer"], "zzz"),
        (["--bits", "5", "--keep", "zzz"], "zzz"),
    ],
)
def test_plans_that_cannot_be(options: list[str], said: str, run: Shell, tmp_path: Path) -> None:
    stats = small.statistics()
    refused(run("plan", stats, *options), said)
    refused(run("compress", small.model(), "-o", "out", "--calibrate", stats, *options), said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoil", ["nothing there", "not JSON", "newer", "rows cut", "empty table"])
def test_statistics_that_are_none(spoil: str, run: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "stats"
    if spoil != "nothing there":
        shutil.copytree(small.statistics(), folder)
    path = folder / "statistics.json"
    if spoil == "not JSON":
        path.write_text("{")
    elif spoil == "newer":
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    elif spoil == "empty table":
        path.write_text(json.dumps({"version": 1}))
    elif spoil == "rows cut":
        (folder / "rows.safetensors").write_bytes(b"123")
    refused(run("plan", folder, "--bits", "5"), "stats")


# Artifacts that cannot be read


def every_reading_verb(path: str) -> list[list[str]]:
    return [
        ["show", path],
        ["verify", path],
        ["decompress", path, "-o", "plain"],
        ["generate", path, "--prompt", "x", "--tokens", "2"],
        ["eval", path, "--against", str(small.model()), "--window", "64", "--tokens", "64"],
        ["report", path, "-o", "page.html"],
    ]


@pytest.mark.parametrize("what", ["nowhere", "a text", "a folder", "a plain model", "statistics"])
def test_not_an_artifact(what: str, run: Shell, tmp_path: Path) -> None:
    path = {
        "nowhere": tmp_path / "nowhere",
        "a text": small.text(),
        "a folder": tmp_path,
        "a plain model": small.model(),
        "statistics": small.statistics(),
    }[what]
    for words in every_reading_verb(str(path)):
        refused(run(*words), path.name)
    assert not list(tmp_path.iterdir())


def test_any_flipped_bit_is_refused_by_every_verb(run: Shell, tmp_path: Path) -> None:
    shutil.copytree(small.artifact(), "out")
    file = tmp_path / "out" / FILE_NAME
    good = file.read_bytes()
    with Reader(small.artifact()) as reader:
        payload = sum(e.nbytes for e in reader.entries.values())
    choose = random.Random(0)
    for attempt in range(400):
        bad = bytearray(good)
        bit = choose.randrange(8 * len(good))
        bad[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(bad)
        refused(run("verify", "out"))
        if attempt % 40 == 0:
            for words in every_reading_verb("out"):
                if words[0] in ("show", "report"):  # these read no payload
                    assert run(*words).status in (0, 1)
                    Path("page.html").unlink(missing_ok=True)
                else:
                    refused(run(*words), FILE_NAME)
    for position in (0, 9, len(good) - 1):  # header and index: even `show` refuses
        bad = bytearray(good)
        bad[position] ^= 16
        file.write_bytes(bad)
        for words in every_reading_verb("out"):
            refused(run(*words), FILE_NAME)
    assert payload > 0 and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_cut_artifact(keep: float, run: Shell) -> None:
    shutil.copytree(small.artifact(), "out")
    file = Path("out", FILE_NAME)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if keep == 0.5 else int(keep)])
    for words in every_reading_verb("out"):
        refused(run(*words), FILE_NAME)


def test_a_future_container(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(lambda document: None, monkeypatch, version=2)
    for words in every_reading_verb("out"):
        refused(run(*words), "upgrade waterfill")


def test_a_future_codec(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(document: dict[str, Any]) -> None:
        for entry in document["tensors"]:
            entry["codec"][1] += 1

    rewrite(newer, monkeypatch)
    for words in every_reading_verb("out"):
        if words[0] != "verify":  # checksums hold, whoever wrote them
            refused(run(*words), "upgrade waterfill")


def test_an_unknown_codec(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(document: dict[str, Any]) -> None:
        document["tensors"][0]["codec"][0] = "osmosis"

    rewrite(unknown, monkeypatch)
    refused(run("decompress", "out", "-o", "plain"), "osmosis")


def rewrite(
    change: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch, version: int = 1
) -> None:
    """Write the artifact again as ./out with another index, its checksums right."""
    shutil.copytree(small.artifact(), "out")
    data = (small.artifact() / FILE_NAME).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    begin, end = header[container.INDEX]["data_offsets"]
    document = json.loads(zlib.decompress(data[start + begin : start + end]))
    change(document)
    with monkeypatch.context() as patch:
        patch.setattr(container, "VERSION", version)
        front, index = container._front(document["tensors"], document["about"])
    Path("out", FILE_NAME).write_bytes(front + data[start : start + begin] + index)


def test_a_record_that_is_damaged(run: Shell) -> None:
    shutil.copytree(small.artifact(), "out")
    for content in ("{", "[]"):
        Path("out/waterfill.json").write_text(content)
        refused(run("report", "out"), "waterfill.json")
    Path("out/waterfill.json").unlink()
    assert run("report", "out").status == 0


def test_an_artifact_without_its_config(run: Shell) -> None:
    shutil.copytree(small.artifact(), "out")
    Path("out/config.json").unlink()
    assert run("verify", "out").status == run("decompress", "out", "-o", "plain").status == 0
    refused(run("generate", "out", "--prompt", "x"), "config.json")


# Misuse of what is sound


def test_prompts_that_cannot_be(run: Shell) -> None:
    out = small.artifact()
    refused(run("generate", out, "--prompt", ""), "empty")
    refused(run("generate", out, "--prompt", "x", "--tokens", "5000"), "128")


def test_compared_with_the_wrong_model(run: Shell, tmp_path: Path) -> None:
    from tests import tiny

    with small.quiet():
        tiny.tiny_model("llama", tmp_path / "llama")
        tiny.tiny_model("gpt2", tmp_path / "gpt2")
    for other in ("llama", "gpt2"):
        refused(run("eval", small.artifact(), "--against", other), "not made from")
    refused(run("eval", small.artifact(), "--against", small.artifact()), "compressed by waterfill")
    refused(run("eval", small.artifact(), "--against", "nosuch"), "there is no folder")


def test_texts_and_windows_for_eval(run: Shell) -> None:
    words = ["eval", small.artifact(), "--against", small.model()]
    refused(run(*words, "--text", "nofile"), "nofile")
    Path("empty").write_text("")
    refused(run(*words, "--text", "empty"), "empty")
    refused(run(*words, "--window", "64", "--stride", "128"), "stride")
    refused(run(*words, "--window", "100000"), "128")


def test_where_nothing_can_be_written(run: Shell, tmp_path: Path) -> None:
    Path("file").write_text("")
    out = small.artifact()
    refused(run("decompress", out, "-o", "file/x"), "file/x")
    refused(run("report", out, "-o", "file/page.html"), "file")
    refused(run("plan", small.statistics(), "--bits", "5", "-o", "file/plan.json"), "file")
    refused(run("calibrate", small.model(), "-o", "file/s", "--text", small.text()), "file/s")
    refused(run("decompress", out, "-o", "file"), "--force")
    refused(run("decompress", out, "-o", out, "--force"), "in use")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
