"""Lossless: any checkpoint bit for bit, its files byte for byte, and never much larger."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import waterfill
from tests import checkpoints
from tests.pipeline.disks import Full
from waterfill.container import FILE_NAME, Reader
from waterfill.pipeline import exact, show
from waterfill.registry import find_codec
from waterfill.types import DTYPES, SpecError, WaterfillError

# What docs/lossless.md states: of an artifact over the files it was made from.
PER_CHECKPOINT_NBYTES = 512
PER_TENSOR_NBYTES = 64
SHAPES = ((), (0,), (1,), (3, 0, 5), (7,), (64, 33), (2, 3, 4, 5))
QUANTISED = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def lossless(folder: Path, out: Path, **options: Any) -> Any:
    return waterfill.compress(folder, out, lossless=True, **options)


def round_trip(folder: Path, tmp_path: Path) -> Any:
    """Compress, decompress, and compare every file."""
    record = lossless(folder, tmp_path / "out")
    waterfill.decompress(tmp_path / "out", tmp_path / "back")
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(folder)
    assert [p.name for p in tmp_path.glob("*.work")] == []
    return record


def bound(folder: Path) -> int:
    """The largest that the weights file of an artifact may be."""
    files = list(folder.glob("*.safetensors"))
    total = sum(f.stat().st_size for f in files) + PER_CHECKPOINT_NBYTES
    for file in files:
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        names = header.keys() - {"__metadata__"}
        total += sum(PER_TENSOR_NBYTES + len(n) for n in names)
    return total


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards with an index, a tensor that repeats another, packed words, texts of all kinds."""
    folder = tmp_path / "model"
    size = (96, 40)
    first = {
        "embed.weight": ("BF16", size),
        "layers.0.qweight": ("I32", (12, 40)),
        "layers.0.scales": ("F16", (1, 40)),
        "layers.0.norm": ("F32", (40,)),
    }
    data = checkpoints.random_bytes(first) | {"embed.weight": checkpoints.weights(size)}
    checkpoints.write_file(
        folder / "model-00001-of-00002.safetensors", first, data, {"format": "pt"}
    )
    second = {"lm_head.weight": ("BF16", size), "steps": ("I64", ()), "none": ("F8_E5M2", (0, 4))}
    data = checkpoints.random_bytes(second) | {"lm_head.weight": checkpoints.weights(size)}
    checkpoints.write_file(
        folder / "model-00002-of-00002.safetensors", second, data, {"format": "pt", "by": "hand"}
    )
    names = {**dict.fromkeys(first, 1), **dict.fromkeys(second, 2)}
    table = {n: f"model-{k:05d}-of-00002.safetensors" for n, k in names.items()}
    index = {"weight_map": table, "metadata": {"total_size": 1}}
    (folder / f"{FILE_NAME}.index.json").write_text(json.dumps(index, indent=7))
    config = '{"quantization_config":\t' + json.dumps(QUANTISED) + ', "model_type": "own"}'
    (folder / "config.json").write_text(config)
    (folder / "README.md").write_bytes(b"\xff\xfe not UTF-8\r\n\x00")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "waterfill.json").write_text("not ours")
    return folder


# What comes back


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape(dtype: str, tmp_path: Path) -> None:
    infos = {f"tensor.{i}": (dtype, shape) for i, shape in enumerate(SHAPES)}
    checkpoints.write_file(tmp_path / "model" / "any.safetensors", infos)
    record = round_trip(tmp_path / "model", tmp_path)
    assert record.nbytes <= bound(tmp_path / "model")
    with waterfill.Artifact(tmp_path / "out") as artifact:
        assert {n: (artifact.info(n).dtype, artifact.info(n).shape) for n in infos} == infos


def test_shards_texts_and_quantised_weights(model: Path, tmp_path: Path) -> None:
    record = round_trip(model, tmp_path)
    codecs = {r["name"]: r["codec"] for r in record.ledger}
    assert codecs["embed.weight"] == "lossless" and codecs["layers.0.qweight"] == "raw"
    assert codecs["lm_head.weight"] == "same as embed.weight"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "waterfill"
    assert config["quantization_config"]["original"] == QUANTISED
    assert "Nothing was changed" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "style",
    [
        {"metadata": None},
        {"metadata": {}},
        {"metadata": {"b": "2", "a": "ü\n\"\\"}},
        {"pad": False},
        {"indent": 1},
        {"separators": (", ", ": ")},
        {"sort_keys": True},
        {"ensure_ascii": True},
    ],
    ids=repr,
)  # fmt: skip
def test_headers_as_others_write_them(style: dict[str, Any], tmp_path: Path) -> None:
    infos = {"z": ("F16", (5,)), "gewicht.größe": ("U8", (3,)), "a//b[0]": ("I8", ())}
    checkpoints.write_file(tmp_path / "model" / FILE_NAME, infos, **style)
    round_trip(tmp_path / "model", tmp_path)


def test_several_files_and_no_index(tmp_path: Path) -> None:
    checkpoints.write_file(tmp_path / "model" / "vae.safetensors", {"a": ("F32", (4, 4))})
    checkpoints.write_file(tmp_path / "model" / "unet.safetensors", {"b": ("F32", (4, 4))})
    round_trip(tmp_path / "model", tmp_path)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        # The format takes that one name for itself.
        st.text(st.characters(max_codepoint=126, min_codepoint=32), max_size=40).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(sorted(DTYPES)),
            st.lists(st.integers(0, 9), max_size=4).map(tuple),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_any_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, tuple[int, ...], bool]],
) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    infos = {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}
    data = {
        name: bytes(len(bits)) if tensors[name][2] else bits
        for name, bits in checkpoints.random_bytes(infos).items()
    }
    checkpoints.write_file(tmp_path / "model" / FILE_NAME, infos, data, {"format": "pt"})
    record = round_trip(tmp_path / "model", tmp_path)
    assert record.nbytes <= bound(tmp_path / "model")
    shutil.rmtree(tmp_path)


def test_random_bits_cost_no_more_than_is_stated(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(40)]
    infos = {f"{dtype}.{n}": (dtype, (4, 3)) for dtype in DTYPES for n in names}
    checkpoints.write_file(tmp_path / "model" / FILE_NAME, infos, None, {"format": "pt"})
    record = lossless(tmp_path / "model", tmp_path / "out")
    assert {r["codec"] for r in record.ledger} == {"raw", ""}
    over = record.nbytes - record.about["original_nbytes"]
    assert record.nbytes <= bound(tmp_path / "model")
    assert over / len(infos) < 24  # what the page says is usual


def test_the_ledger_sums_to_the_file_and_names_every_tensor(model: Path, tmp_path: Path) -> None:
    record = lossless(model, tmp_path / "out")
    assert sum(r["nbytes"] for r in record.ledger) == record.nbytes
    assert record.nbytes == (tmp_path / "out" / FILE_NAME).stat().st_size
    assert list(show(tmp_path / "out")["ledger"]) == list(record.ledger)
    total = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    assert record.about["original_nbytes"] == total
    assert record.about["lossless"] and record.predicted == {"kl_nats": 0.0}


def test_a_checkpoint_of_nothing(tmp_path: Path) -> None:
    checkpoints.write_file(tmp_path / "model" / FILE_NAME, {})
    record = round_trip(tmp_path / "model", tmp_path)
    assert show(tmp_path / "out")["nbytes"] == record.nbytes <= bound(tmp_path / "model")
    assert waterfill.load(tmp_path / "out") == {}


def test_a_bool_may_be_any_byte(tmp_path: Path) -> None:
    checkpoints.write_file(
        tmp_path / "model" / FILE_NAME, {"mask": ("BOOL", (4,))}, {"mask": b"\0\1\2\xff"}
    )
    round_trip(tmp_path / "model", tmp_path)


def test_numpy_is_enough(model: Path, tmp_path: Path) -> None:
    from tests.test_import import BLOCKED, python

    code = (
        f"{BLOCKED}\nfrom waterfill.cli import main\n"
        "assert main(['compress', sys.argv[1], '-o', sys.argv[2], '--lossless']) == 0\n"
        "assert main(['decompress', sys.argv[2], '-o', sys.argv[3]]) == 0"
    )
    python(code, model, tmp_path / "out", tmp_path / "back")
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(model)


# What is refused, and what is said


@pytest.mark.parametrize(
    "option",
    [
        {"size": "1MB"}, {"bits": 3}, {"ratio": "20%"}, {"plan": "p"}, {"keep": ["*"]},
        {"codec": {"*": "raw"}}, {"calibration": "self"},
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_options_without_a_meaning(option: dict[str, Any], model: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"{next(iter(option))} has no meaning: leave it out"):
        lossless(model, tmp_path / "out", **option)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_codec_that_errs_is_caught(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = find_codec("lossless")
    true_decode = codec.decode

    def wrong(self: Any, parts: Any, extra: Any, info: Any) -> Any:
        bits = true_decode(self, parts, extra, info)
        bits.reshape(-1)[:1] ^= 1
        return bits

    monkeypatch.setattr(codec, "decode", wrong)
    with pytest.raises(WaterfillError, match=r"embed\.weight: .* please report"):
        lossless(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_artifact_is_not_compressed_again(model: Path, tmp_path: Path) -> None:
    lossless(model, tmp_path / "out")
    with pytest.raises(WaterfillError, match="by waterfill already"):
        lossless(tmp_path / "out", tmp_path / "again")


def test_what_is_left_behind_is_said(model: Path, tmp_path: Path) -> None:
    (model / "code.py").write_text("")
    (model / "original").mkdir()
    (warning,) = lossless(model, tmp_path / "out").about["warnings"]
    assert warning.startswith("code.py and 1 more of ")


def test_a_file_that_changes_meanwhile(model: Path, tmp_path: Path) -> None:
    file = next(model.glob("*.safetensors"))
    before = file.read_bytes()

    def change(*_: object) -> None:
        file.write_bytes(before[:-2] + b"\1\2")

    with pytest.raises(WaterfillError, match="changed while it was being read"):
        lossless(model, tmp_path / "out", progress=change)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    lossless(model, tmp_path / "out")


def test_existing_out(model: Path, tmp_path: Path) -> None:
    lossless(model, tmp_path / "out")
    with pytest.raises(WaterfillError, match="--force"):
        lossless(model, tmp_path / "out")
    lossless(model, tmp_path / "out", force=True)
    before = checkpoints.snapshot(model)
    with pytest.raises(WaterfillError, match="in use"):
        lossless(model, model, force=True)
    assert checkpoints.snapshot(model) == before


# Interrupted, killed, and short of room


def stop_at(share: float) -> Any:
    def progress(stage: str, done: int, total: int) -> None:
        assert stage == "encoding"
        if done >= share * total:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_interrupt_and_go_on(
    share: float, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lossless(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        lossless(model, tmp_path / "out", progress=stop_at(share))
    assert {p.name for p in tmp_path.iterdir()} == {"model", "whole", "out.work"}
    made = len(list((tmp_path / "out.work" / "pieces").iterdir()))
    encoded: list[str] = []
    true_encode = exact.encode_tensor

    def counting(bits: Any, info: Any, *rest: Any) -> Any:
        encoded.append(info.name)
        return true_encode(bits, info, *rest)

    monkeypatch.setattr(exact, "encode_tensor", counting)
    steps: list[tuple[int, int]] = []
    lossless(model, tmp_path / "out", progress=lambda _, *step: steps.append(step))
    assert len(set(encoded)) == 6 - made  # of seven tensors one is a repeat
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    same = (tmp_path / "out" / FILE_NAME).read_bytes()
    assert same == (tmp_path / "whole" / FILE_NAME).read_bytes()


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    infos = {f"w{i}": ("BF16", (512, 512)) for i in range(24)}
    data = {name: checkpoints.weights((512, 512), i) for i, name in enumerate(infos)}
    checkpoints.write_file(tmp_path / "model" / FILE_NAME, infos, data)
    out = tmp_path / "out"
    words = ["compress", str(tmp_path / "model"), "-o", str(out), "--lossless"]
    process = subprocess.Popen(
        [sys.executable, "-m", "waterfill", *words], env={**os.environ, "WATERFILL_THREADS": "1"}
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.work/pieces/*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -9 and not out.exists()
    lossless(tmp_path / "model", out)
    waterfill.decompress(out, tmp_path / "back")
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(tmp_path / "model")
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out", "back"}


@pytest.mark.parametrize("word", ["pieces", "out.partial", "README.md"])
def test_disk_full(word: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        full = Full(patch, word)
        with pytest.raises(WaterfillError, match="disk is full"):
            lossless(model, tmp_path / "out")
        assert full.hits
    assert {p.name for p in tmp_path.iterdir()} <= {"model", "out.work"}
    round_trip(model, tmp_path)


def test_damage_anywhere_is_refused(model: Path, tmp_path: Path) -> None:
    lossless(model, tmp_path / "out")
    file = tmp_path / "out" / FILE_NAME
    data = file.read_bytes()
    for at in range(0, len(data), 997):
        file.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        with pytest.raises(WaterfillError):
            waterfill.decompress(tmp_path / "out", tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_a_model_in_memory(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(5, 3).to(torch.float8_e4m3fn)
    waterfill.compress(module, tmp_path / "out", lossless=True)
    with Reader(tmp_path / "out") as reader:
        assert "files" not in reader.about
    with waterfill.Artifact(tmp_path / "out") as artifact:
        for name, tensor in module.state_dict().items():
            read = artifact.read(name, torch.empty_like(tensor))
            assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
    waterfill.decompress(tmp_path / "out", tmp_path / "back")
    assert [p.name for p in (tmp_path / "back").iterdir()] == [FILE_NAME]
