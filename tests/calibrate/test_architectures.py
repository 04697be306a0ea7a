"""Calibration of tiny models of every architecture, against plain transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny  # noqa: E402

from waterfill.calibrate import Statistics, calibrate  # noqa: E402
from waterfill.calibrate.loader import Loader  # noqa: E402
from waterfill.calibrate.passes import model_inputs, sampled_loss  # noqa: E402
from waterfill.calibrate.stream import build_skeleton, install_doors  # noqa: E402
from waterfill.calibrate.text import read_windows  # noqa: E402
from waterfill.calibrate.watch import Watch  # noqa: E402
from waterfill.sources import FolderSource, ModuleSource  # noqa: E402

TOKENS, WINDOW = 512, 64


def prepare(name: str, folder: Path) -> tuple[Any, FolderSource, Statistics]:
    tiny.tiny_model(name, folder / "model")
    source = FolderSource(folder / "model")
    statistics = calibrate(
        source, folder / "statistics", [tiny.write_text(folder)], tokens=TOKENS, window=WINDOW
    )
    arguments: dict[str, Any] = {"dtype": torch.float32}
    if any("experts" in name for name in source.tensors):
        arguments["experts_implementation"] = "eager"
    cls = getattr(transformers, source.config["architectures"][0])
    return cls.from_pretrained(folder / "model", **arguments).eval(), source, statistics


def windows(source: FolderSource, folder: Path) -> Any:
    return read_windows(source, [folder / "text.txt"], TOKENS, WINDOW, None).ids


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_tensor_is_accounted_for(name: str, tmp_path: Path) -> None:
    plain, source, statistics = prepare(name, tmp_path)
    counted = dict.fromkeys(source.tensors, 0)
    for info in statistics.infos.values():
        assert info.dtype == source.tensors[info.tensor][0]
        counted[info.tensor] += info.size
        weighting = statistics.weighting(info.name)
        if weighting is None:
            small = len(info.shape) < 2 or min(info.shape) <= 4  # vectors, one per expert or state
            assert small, f"{info} has no weighting"
            continue
        m, n = info.matrix_shape
        assert weighting.row_weights.shape == (m,)
        assert weighting.second_moment.shape == (n, n)
        assert np.all(weighting.row_weights >= 0) and weighting.row_weights.any()
        assert np.linalg.eigvalsh(weighting.second_moment.astype(np.float64))[0] > -1e-4
    for tensor, (_, shape) in source.tensors.items():
        assert counted[tensor] == np.prod(shape, dtype=int), tensor

    ids = windows(source, tmp_path)[:2]
    skeleton = build_skeleton(source)
    watch = Watch()
    install_doors(Loader(skeleton, source), watch, lambda: False, lambda name: None)
    with torch.no_grad():
        with watch:
            got = skeleton(**model_inputs(skeleton, ids)).logits
        want = plain(**model_inputs(plain, ids)).logits
    assert want.std() > 0.05
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert all(p.is_meta for p in skeleton.parameters())


def observe(monkeypatch: pytest.MonkeyPatch, model: Any, ids: Any) -> tuple[dict[int, Any], Any]:
    """Inputs and output gradients of every product with a weight, seen above autograd.

    Returns weight's address -> [(inputs (p, n), output gradients (p, m))], float64, and the
    squared gradients at the logits that labels cause in the mean, (V,) summed over positions.
    """
    seen: dict[int, list[Any]] = {}
    linear, addmm = torch.nn.functional.linear, torch.addmm

    def note(x: Any, weight: Any, out: Any) -> Any:
        entry = [x.detach().double().reshape(-1, x.shape[-1]), None]
        seen.setdefault(weight.data_ptr(), []).append(entry)
        if out.requires_grad:
            out.register_hook(lambda g: entry.__setitem__(1, g.double().reshape(-1, g.shape[-1])))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.functional, "linear", lambda x, w, b=None: note(x, w, linear(x, w, b))
        )
        patch.setattr(torch, "addmm", lambda b, x, w: note(x, w, addmm(b, x, w)))
        model.requires_grad_(True)
        out = model(**model_inputs(model, ids))
        loss, expected, _ = sampled_loss(out, torch.Generator().manual_seed(0))
        p = out.logits.detach().double().softmax(-1).reshape(TOKENS, -1)
        np.testing.assert_allclose(expected, (p * (1 - p)).sum(0).numpy(), rtol=1e-4)
        loss.backward()
    return seen, expected


def check(
    statistics: Statistics, name: str, calls: Any, rows: slice = slice(None), expected: Any = None
) -> None:
    x = torch.cat([c[0] for c in calls]).numpy()
    g = torch.cat([c[1] for c in calls]).numpy()[:, rows]
    weighting = statistics.weighting(name)
    assert weighting is not None
    moment = x.T @ x / TOKENS
    np.testing.assert_allclose(
        weighting.second_moment, moment, rtol=1e-3, atol=1e-5 * np.abs(moment).max()
    )
    squares = (g**2).mean(0)
    if expected is not None and len(expected) == len(squares):
        assert 0.5 < expected.sum() / squares.sum() / TOKENS < 2
        squares = expected * squares.sum() / expected.sum()
    np.testing.assert_allclose(weighting.row_weights, squares, rtol=2e-3, atol=1e-5 * squares.max())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_moments_and_sensitivities(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source, statistics = prepare(name, tmp_path)
    seen, expected = observe(monkeypatch, model, windows(source, tmp_path))
    checked = 0
    for parameter, value in model.named_parameters():
        if value.ndim == 3:
            for e in range(value.shape[0]):
                calls = seen.get(value[e].data_ptr())
                if not calls:
                    continue
                for item, rows in file_items(source, parameter, e, value.shape[1]):
                    check(statistics, item, calls, rows)
                    checked += 1
        elif (calls := seen.get(value.data_ptr())) and parameter in statistics.infos:
            info = statistics.infos[parameter]
            assert info.transposed == (name == "gpt2" and "wte" not in parameter)
            if info.kind != "embedding":
                check(statistics, parameter, calls, expected=expected)
                checked += 1
    assert checked >= 8


def file_items(source: FolderSource, parameter: str, e: int, rows: int) -> list[Any]:
    """What a slice of a fused parameter is called in the file, and which rows."""
    block = parameter.partition(".mlp.experts")[0]
    gate, up, down = ("w1", "w3", "w2")
    stem = f"{block}.block_sparse_moe.experts.{e}."
    if stem + "w1.weight" not in source.tensors:
        gate, up, down = ("gate_proj", "up_proj", "down_proj")
        stem = f"{block}.mlp.experts.{e}."
    if parameter.endswith("down_proj"):
        return [(f"{stem}{down}.weight", slice(None))]
    half = rows // 2
    return [(f"{stem}{gate}.weight", slice(half)), (f"{stem}{up}.weight", slice(half, None))]


@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_experts_in_one_tensor_are_told_apart(name: str, tmp_path: Path) -> None:
    _, source, statistics = prepare(name, tmp_path)
    experts = [i for i in statistics.infos.values() if i.kind == "expert"]
    assert len(experts) == 2 * 2 * 4  # layers, tensors, experts
    for info in experts:
        assert info.transposed and info.name == f"{info.tensor}[{info.index}]"
        assert info.shape == source.tensors[info.tensor][1][1:]
        assert info.matrix(source.read_slice(info.tensor, info.index)).shape == info.matrix_shape


def test_shared_inputs_are_stored_once(tmp_path: Path) -> None:
    prepare("llama", tmp_path)
    files = list((tmp_path / "statistics" / "moments").iterdir())
    # per layer: attention, its output, gate and up, down; then the embedding and the head
    assert len(files) == 2 * 4 + 2


def test_tied_embedding_keeps_marginals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source, statistics = prepare("qwen3", tmp_path)
    ids = windows(source, tmp_path)
    table = model.get_input_embeddings()
    gradients: list[Any] = []

    def hook(module: Any, args: Any, out: Any) -> None:
        out.register_hook(lambda g: gradients.append(g.double()))

    table.register_forward_hook(hook)
    seen, expected = observe(monkeypatch, model, ids)
    ((x, g),) = seen[table.weight.data_ptr()]
    counts = np.bincount(ids.reshape(-1), minlength=tiny.VOCABULARY)
    frequency = (counts + 0.2) / (TOKENS + 0.2 * tiny.VOCABULARY)
    back = gradients[0].reshape(-1, tiny.HIDDEN)
    energy = np.bincount(ids.reshape(-1), (back**2).sum(1).numpy(), tiny.VOCABULARY)
    mean = energy.sum() / TOKENS
    a_rows = frequency * (energy + 2 * mean) / (counts + 2)
    a_rows /= a_rows.sum() / frequency.sum()
    a, b = (back.T @ back / TOKENS).numpy(), (x.T @ x / TOKENS).numpy()
    b_rows = expected * (g**2).sum().item() / expected.sum() / TOKENS
    weighting = statistics.weighting("model.embed_tokens.weight")
    assert weighting is not None
    s, r = weighting.second_moment, weighting.row_weights
    want = a_rows * np.trace(a) + b_rows * np.trace(b)
    np.testing.assert_allclose(r * np.trace(s), want, rtol=2e-3, atol=1e-4 * want.max())
    want = a * a_rows.sum() + b * b_rows.sum()
    np.testing.assert_allclose(s * r.sum(), want, rtol=2e-3, atol=1e-4 * np.abs(want).max())


def test_a_module_in_memory_gives_what_its_folder_gives(tmp_path: Path) -> None:
    model, source, statistics = prepare("mistral", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.path)
    again = calibrate(
        ModuleSource(model, tokenizer),
        tmp_path / "again",
        [tmp_path / "text.txt"],
        tokens=TOKENS,
        window=WINDOW,
    )
    assert list(again.infos) == list(statistics.infos) or set(again.infos) == set(statistics.infos)
    for name in statistics.infos:
        one, two = statistics.weighting(name), again.weighting(name)
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            np.testing.assert_array_equal(one.row_weights, two.row_weights)
            np.testing.assert_array_equal(one.second_moment, two.second_moment)


def test_an_expert_without_tokens_is_judged_by_its_siblings(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = tiny.tiny_model("mixtral", folder)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight[0] = -block.mlp.gate.weight[1]
            block.mlp.gate.weight[2:] = 0  # never the best: one of the first two is positive
    model.config.num_experts_per_tok = 1
    model.save_pretrained(folder)
    statistics = calibrate(
        FolderSource(folder), tmp_path / "s", [tiny.write_text(tmp_path)], 256, 64
    )
    lonely = [n for n, words in statistics.notes.items() if "siblings" in words]
    assert len(lonely) == 2 * 2 * 3  # layers, experts, matrices
    for name in lonely:
        weighting = statistics.weighting(name)
        assert weighting is not None and weighting.row_weights.any()
        assert np.trace(weighting.second_moment) > 0
