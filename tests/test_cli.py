"""The street door: exit status, streams, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.pipeline import small
from waterfill import container
from waterfill.cli import main

Run = Callable[..., tuple[int, str, str]]
VERBS = (
    "compress",
    "calibrate",
    "plan",
    "show",
    "eval",
    "decompress",
    "verify",
    "generate",
    "report",
)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command in this process: (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return status, *capfd.readouterr()

    return call


def refused(run: Run, *arguments: object, status: int = 1) -> str:
    """The command fails with one line on stderr, nothing on stdout, no traceback."""
    got, out, err = run(*arguments)
    assert (got, out) == (status, ""), err
    assert "Traceback" not in err
    if status == 1:
        assert err.startswith("waterfill: ") and err.count("\n") == 1, err
    return err


def compress(*arguments: object) -> tuple[object, ...]:
    return (
        "compress",
        *arguments,
        "--bits",
        6,
        "--tokens",
        small.TOKENS,
        "--calibrate",
        small.text(),
    )


# --- what works ---------------------------------------------------------------------------------


def test_the_whole_way(run: Run, tmp_path: Path) -> None:
    stats, out = tmp_path / "stats", tmp_path / "out"
    status, said, err = run(
        "calibrate", small.model(), "--text", small.text(), "--tokens", 256, "-o", stats
    )
    assert (status, err) == (0, "") and "weight matrices" in said
    status, said, err = run("plan", stats, "--bits", 6)
    assert (status, err) == (0, "") and "nothing was encoded" in said
    status, said, err = run("compress", small.model(), "-o", out, "--bits", 6, "--calibrate", stats)
    assert (status, err) == (0, "") and "bits per weight" in said
    status, said, err = run("show", out)
    assert (status, err) == (0, "") and "sum to the file" in said
    status, said, err = run("verify", out)
    assert (status, err) == (0, "") and "every checksum holds" in said
    status, said, err = run(
        "eval", out, "--against", small.model(), "--text", small.text(), "--tokens", 300
    )
    assert (status, err) == (0, "") and "kl_nats" in said and "protocol" in said
    status, said, err = run("generate", out, "--prompt", "hello", "--tokens", 3)
    assert (status, err) == (0, "") and said.startswith("hello")
    status, said, err = run("report", out)
    assert (status, err) == (0, "") and "<html" in (out / "report.html").read_text()[:200]
    status, said, err = run("decompress", out, "-o", tmp_path / "plain")
    assert (status, err) == (0, "")
    assert (
        load_file(tmp_path / "plain" / "model.safetensors").keys()
        == small.arrays_of(small.model()).keys()
    )


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("show",), {"nbytes", "bits_per_weight", "ledger", "predicted_kl_nats"}),
        (("verify",), {"nbytes", "tensors", "ok"}),
        (("generate", "--prompt", "a", "--tokens", "2"), {"text", "tokens_per_second"}),
    ],
)
def test_json_is_json_and_nothing_else(
    run: Run, arguments: tuple[str, ...], keys: set[str]
) -> None:
    status, out, err = run(arguments[0], small.artifact(), *arguments[1:], "--json")
    assert (status, err) == (0, "")
    assert keys <= json.loads(out).keys()


def test_json_of_plan_codecs_and_compress(run: Run, tmp_path: Path) -> None:
    _, out, _ = run("plan", small.statistics(), "--bits", 6, "--json")
    assert {"budget_nbytes", "predicted_nats", "choices"} <= json.loads(out).keys()
    _, out, _ = run("codecs", "--json")
    assert "trellis" in [c["id"] for c in json.loads(out)]
    _, out, _ = run(*compress(small.model(), "-o", tmp_path / "out"), "--json")
    record = json.loads(out)
    assert sum(r["nbytes"] for r in record["ledger"]) == record["nbytes"]


def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path) -> None:
    stats = shutil.copytree(small.statistics(), tmp_path / "stats")
    before = sorted(p.name for p in stats.rglob("*"))
    run("plan", stats, "--bits", 6, "--dry-run", "-o", tmp_path / "plan.json", "--keep", "*q_proj*")
    assert sorted(p.name for p in stats.rglob("*")) == before
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(run: Run, verb: str) -> None:
    status, out, _ = run(verb, "--help")
    assert status == 0 and f"\n  waterfill {verb} " in out


def test_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "waterfill"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([*command, "verify", small.artifact()], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    result = subprocess.run(
        [*command, "compress", "nobody/nothing", "-o", tmp_path / "o", "--bits", "3"],
        capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1 and result.stdout == ""
    assert "nobody/nothing" in result.stderr and "Traceback" not in result.stderr


# --- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("compress",),
        ("compress", "demo", "-o", "x"),
        ("compress", "demo", "-o", "x", "--bits", "0"),
        ("compress", "demo", "-o", "x", "--bits", "three"),
        ("compress", "demo", "-o", "x", "--size", "abc"),
        ("compress", "demo", "-o", "x", "--ratio", "500%"),
        ("compress", "demo", "-o", "x", "--bits", "3", "--size", "1MB"),
        ("compress", "demo", "-o", "x", "--bits", "3", "--codec", "trellis"),
        ("compress", "demo", "-o", "x", "--bits", "3", "--tokens", "-5"),
        ("generate", "x"),
    ],
)
def test_usage_is_exit_two(run: Run, arguments: tuple[str, ...]) -> None:
    err = refused(run, *arguments, status=2)
    assert err.startswith("usage: ")


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    status, _, err = run("verify", tmp_path / "nothing", "--debug")
    assert (
        status == 1
        and "Traceback" in err
        and err.rstrip().splitlines()[-1].startswith("waterfill: ")
    )


# --- models that are not as they should be ------------------------------------------------------


def broken(tmp_path: Path) -> Path:
    return shutil.copytree(small.model(), tmp_path / "broken")


def test_missing_weights(run: Run, tmp_path: Path) -> None:
    model = broken(tmp_path)
    (model / "model.safetensors").unlink()
    assert "safetensors" in refused(run, *compress(model, "-o", tmp_path / "out"))


def test_pickled_weights_are_never_opened(run: Run, tmp_path: Path) -> None:
    model = broken(tmp_path)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "safetensors" in refused(run, *compress(model, "-o", tmp_path / "out"))


@pytest.mark.parametrize("keep", [3, 40, -1000])
def test_truncated_weights(run: Run, tmp_path: Path, keep: int) -> None:
    path = broken(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path.name) in refused(run, *compress(path.parent, "-o", tmp_path / "out"))


def test_a_header_that_lies(run: Run, tmp_path: Path) -> None:
    path = broken(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1))
    refused(run, *compress(path.parent, "-o", tmp_path / "out"))


def test_an_unknown_dtype(run: Run, tmp_path: Path) -> None:
    path = broken(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"Q32"', 1))
    assert "Q32" in refused(run, *compress(path.parent, "-o", tmp_path / "out"))


def test_shapes_that_do_not_match_the_config(run: Run, tmp_path: Path) -> None:
    model = broken(tmp_path)
    small.change_config(model, intermediate_size=40)
    assert "40" in refused(run, *compress(model, "-o", tmp_path / "out"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(run: Run, tmp_path: Path, value: float) -> None:
    path = broken(tmp_path) / "model.safetensors"
    tensors = dict(load_file(path))
    tensors[small.BIG] = tensors[small.BIG].copy()
    tensors[small.BIG][3, 3] = value
    save_file(tensors, path, {"format": "pt"})
    assert small.BIG in refused(run, *compress(path.parent, "-o", tmp_path / "out"))


def test_no_tokenizer_matters_only_where_text_is_needed(run: Run, tmp_path: Path) -> None:
    model = broken(tmp_path)
    for file in [*model.glob("tokenizer*"), *model.glob("special_tokens*")]:
        file.unlink()
    assert "self" in refused(run, *compress(model, "-o", tmp_path / "out"))
    out = tmp_path / "out"
    status, _, err = run(
        "compress", model, "-o", out, "--bits", 6, "--tokens", 128, "--calibrate", "self"
    )
    assert (status, err) == (0, "")
    assert "tokenizer" in refused(run, "generate", out, "--prompt", "a")


@pytest.mark.parametrize(("text", "word"), [("", "text"), ("few words", "tokens")])
def test_texts_that_are_too_short(run: Run, tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text)
    err = refused(
        run, "compress", small.model(), "-o", tmp_path / "o", "--bits", 6, "--calibrate", path
    )
    assert word in err and not (tmp_path / "o").exists()


def test_output_exists(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "--force" in refused(run, *compress(small.model(), "-o", tmp_path / "out"))
    assert "--force" in refused(run, "decompress", small.artifact(), "-o", tmp_path / "out")


def test_a_size_too_small_names_the_smallest(run: Run, tmp_path: Path) -> None:
    err = refused(
        run, "compress", small.model(), "-o", tmp_path / "o", "--size", "1KB", "--calibrate", small.statistics()
    )  # fmt: skip
    assert "smallest" in err and "bytes" in err


@pytest.mark.parametrize(
    "options",
    [("--keep", "*nonsense*"), ("--codec", "*=nonsense"), ("--codec", "*=integer:bits=77")],
)
def test_rules_that_fit_nothing(run: Run, tmp_path: Path, options: tuple[str, str]) -> None:
    refused(run, *compress(small.model(), "-o", tmp_path / "out"), *options)


# --- artifacts that are not as they should be ---------------------------------------------------


@pytest.mark.parametrize("verb", ["verify", "show", "generate", "decompress"])
def test_a_flipped_bit(run: Run, tmp_path: Path, verb: str) -> None:
    path = shutil.copytree(small.artifact(), tmp_path / "bad") / "model.safetensors"
    data = bytearray(path.read_bytes())
    # Of the header for `show`, which reads no payload; of the payload for the rest.
    data[100 if verb == "show" else len(data) // 2] ^= 4
    path.write_bytes(data)
    more = {"generate": ("--prompt", "a"), "decompress": ("-o", tmp_path / "plain")}.get(verb, ())
    refused(run, verb, path.parent, *more)
    assert not (tmp_path / "plain").exists()


def test_a_future_version(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "VERSION", 2)
    container.write(tmp_path / "model.safetensors", [], [], {})
    monkeypatch.undo()
    assert "upgrade" in refused(run, "verify", tmp_path)


def test_what_is_no_artifact(run: Run, tmp_path: Path) -> None:
    for verb in ("verify", "show"):
        assert "no such file" in refused(run, verb, tmp_path)
        assert "not one written by waterfill" in refused(run, verb, small.model())
    assert "statistics" in refused(run, "plan", tmp_path, "--bits", 3)


def test_eval_against_the_wrong_thing(run: Run) -> None:
    arguments: tuple[Any, ...] = ("eval", small.artifact(), "--text", small.text(), "--against")
    assert "quantised" in refused(run, *arguments, small.artifact())
    refused(run, *arguments, "no/such/folder/at/all")
