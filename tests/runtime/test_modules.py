"""Linear layers and embeddings whose weight is packed, coded or streamed, against dense ones."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D  # noqa: E402

from waterfill.codecs.integer import Integer  # noqa: E402
from waterfill.codecs.lossless import Lossless  # noqa: E402
from waterfill.codecs.trellis import Trellis  # noqa: E402
from waterfill.runtime import modules, weights  # noqa: E402
from waterfill.runtime.arrays import unpack  # noqa: E402
from waterfill.runtime.residency import MATRICES  # noqa: E402
from waterfill.runtime.streaming import StreamMatrix  # noqa: E402
from waterfill.runtime.tensors import to_torch  # noqa: E402
from waterfill.types import Encoded, TensorInfo, WaterfillError, Weighting, from_float32  # noqa: E402

FORMS = ("packed", "coded", "stream")
# Of one product, over its largest value. Activations of 8 bits are off by 0.7 % of their size.
BOUNDS = {"packed": 0.03, "coded": 1e-6, "stream": 0.0}


def encoded(m: int, n: int, form: str, dtype: str = "F32", transposed: bool = False) -> Encoded:
    """A random matrix (m, n) as a codec has it."""
    rng = np.random.default_rng(m * n)
    shape = (n, m) if transposed else (m, n)
    info = TensorInfo("w", shape, dtype, "linear", transposed=transposed)
    codec: Any = Lossless()
    if form != "stream":
        codec = Trellis(step=0.2, states=8) if m % 2 else Integer(group=128, solver="nearest")
    bits = from_float32(rng.standard_normal(shape, dtype=np.float32), dtype)
    parts, extra = codec.encode(bits, info, Weighting())
    return Encoded(codec.spec, info, parts, extra)


def weight_of(made: Encoded, form: str) -> weights.Weight:
    """The same in a form that modules hold."""
    from waterfill.registry import make_codec

    scratch = weights.Scratch()
    if form == "stream":
        return weights.StreamWeight(StreamMatrix(made), scratch)
    integers = make_codec(made.spec).integers(made.parts, made.extra, made.info)
    matrix = MATRICES[form].build(integers, made.info.dtype)
    assert matrix is not None
    return weights.MatrixWeight(matrix, scratch)


def pair(kind: Any, m: int, n: int, form: str, dtype: str = "F32", bias: bool = False) -> Any:
    """A dense module, and one of the same values that holds them in a form."""
    transposed = kind is Conv1D

    def new() -> Any:
        if kind is Conv1D:
            return Conv1D(m, n)
        if issubclass(kind, torch.nn.Embedding):
            return kind(m, n)
        return kind(n, m, bias=bias)

    made = encoded(m, n, form, dtype, transposed)
    values = to_torch(unpack(made), dtype)
    dense, held = new(), new()
    dense.weight = torch.nn.Parameter(values, requires_grad=False)
    for module in (dense, held):
        if getattr(module, "bias", None) is not None:
            module.bias = torch.nn.Parameter(torch.linspace(-1, 1, m).to(values.dtype), False)
    modules.hollow(held)
    modules.give(held, weight_of(made, form), values[:0])
    return dense.eval(), held.eval()


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
@pytest.mark.parametrize("shape", [(48, 32), (33, 64), (130, 96)])
def test_products(form: str, kind: Any, shape: tuple[int, int]) -> None:
    dense, held = pair(kind, *shape, form, bias=True)
    n = shape[1]
    for lead in ((), (1,), (1, 1), (2, 3), (16,), (17,), (5, 9)):
        x = torch.randn(*lead, n, generator=torch.Generator().manual_seed(len(lead)))
        with torch.no_grad():
            want, got = dense(x), held(x)
        assert got.shape == want.shape and got.dtype == want.dtype
        large = form == "stream" or int(np.prod(lead)) > 16
        assert far(got, want) <= (1e-6 if large else BOUNDS[form]), lead
    crooked = torch.randn(n, 4).T
    assert far(held(crooked), dense(crooked)) <= max(BOUNDS[form], 1e-6)
    assert held(torch.empty(2, 0, n)).shape == (2, 0, shape[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["F32", "BF16", "F16"])
def test_dtypes(form: str, dtype: Any, stored: str) -> None:
    dense, held = pair(torch.nn.Linear, 64, 96, form, stored)
    wide = dense.float()
    for batch in (1, 3, 40):
        x = torch.randn(batch, 96, generator=torch.Generator().manual_seed(batch)).to(dtype)
        got = held(x)
        assert got.dtype == dtype
        rounding = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        assert far(got, wide(x.float())) <= BOUNDS[form] + rounding + 2e-3 * (stored != "F32")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_an_embedding(form: str, dtype: Any) -> None:
    stored = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    dense, held = pair(torch.nn.Embedding, 70, 64, form, stored)
    for ids in (
        torch.tensor(3),
        torch.tensor([[0, 69], [5, 5]]),
        torch.empty(2, 0, dtype=torch.int64),
    ):
        assert torch.equal(held(ids), dense(ids)) and held(ids).dtype == dtype
    assert torch.equal(held(torch.tensor([4], dtype=torch.int32)), dense(torch.tensor([4])))
    with pytest.raises(IndexError, match="70 rows"):
        held(torch.tensor([70]))
    with pytest.raises(IndexError, match="70 rows"):
        held(torch.tensor([-1]))
    with pytest.raises(WaterfillError, match="takes int64 or int32"):
        held(torch.tensor([1.0]))


class Scaled(torch.nn.Embedding):
    """As Gemma's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


class Router(torch.nn.Linear):
    """As some mixtures have it: it multiplies with its weight itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight).softmax(-1)


@pytest.mark.parametrize("form", FORMS)
def test_subclasses_stay_what_they_are(form: str) -> None:
    dense, held = pair(Scaled, 40, 32, form)
    ids = torch.arange(40)
    assert torch.equal(held(ids), dense(ids)) and isinstance(held, Scaled)
    dense, held = pair(Router, 16, 32, form)
    x = torch.randn(3, 32)
    assert torch.equal(held(x), dense(x)) and isinstance(held, Router)
    assert type(held).__name__ == "Router" and held.in_features == 32


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_can_be_asked_for(form: str) -> None:
    for kind in (torch.nn.Linear, Conv1D):
        dense, held = pair(kind, 24, 32, form, "BF16")
        assert held.weight.shape == dense.weight.shape and held.weight.dtype == torch.bfloat16
        assert held.weight.device.type == "cpu" and "LazyWeight" in repr(held.weight)
        assert torch.equal(held.weight + 0, dense.weight) and torch.equal(
            held.weight.T, dense.weight.T
        )
        held.float()
        assert held.weight.dtype == torch.float32
        assert far(held.weight.abs(), dense.weight.abs()) <= (4e-3 if form == "packed" else 0)
        assert not list(held.parameters()) or kind is Conv1D
        assert "weight" not in held.state_dict()


def test_what_is_refused() -> None:
    _, held = pair(torch.nn.Linear, 24, 32, "packed")
    with pytest.raises(
        WaterfillError, match=r"Linear of 32 inputs and 24 outputs takes float32.*int64"
    ):
        held(torch.ones(2, 32, dtype=torch.int64))
    with pytest.raises(
        WaterfillError, match=r"takes float32, bfloat16, float16, not torch\.float64"
    ):
        held(torch.ones(2, 32, dtype=torch.float64))
    with pytest.raises(WaterfillError, match=r"was given the shape \[2, 31\]"):
        held(torch.ones(2, 31))
    with pytest.raises(WaterfillError, match="was given the shape"):
        held(torch.tensor(1.0))
    x = torch.ones(2, 32, requires_grad=True)
    with pytest.raises(WaterfillError, match="cannot be trained through"):
        held(x)
    with torch.no_grad():
        assert held(x).shape == (2, 24)


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda m: m.weight.mul_(2),
    "an init": lambda m: torch.nn.init.normal_(m.weight),
    "a copy": lambda m: m.weight.copy_(torch.zeros(m.weight.shape)),
    "an output": lambda m: torch.add(torch.ones(()), 1, out=m.weight),
    "an item": lambda m: operator.setitem(m.weight, 0, 1),
    "data": lambda m: setattr(m.weight, "data", torch.zeros(m.weight.shape)),
    "another": lambda m: setattr(m, "weight", torch.nn.Parameter(torch.zeros(m.weight.shape))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_cannot_be_changed(change: str) -> None:
    dense, held = pair(torch.nn.Linear, 24, 32, "coded")
    with torch.no_grad(), pytest.raises(WaterfillError, match=r"cannot be changed.*dense"):
        CHANGES[change](held)
    assert torch.equal(held.weight + 0, dense.weight)


def test_a_large_batch_goes_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "TILE_ROWS", 5)
    for form in FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            dense, held = pair(torch.nn.Linear, 64, 32, form)
            x = torch.randn(20, 32)
            assert far(held(x.to(dtype)), dense(x)) <= (1e-6 if dtype == torch.float32 else 2e-2)
            room = 4 * 32 * 64 if form == "stream" else 4 * 32 * 5
            assert held.held.scratch.nbytes <= room


def test_streams_share_a_buffer_and_find_the_last_one_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    real = StreamMatrix.decode

    def counted(self: StreamMatrix, buffer: Any) -> Any:
        calls.append(self.shape)
        return real(self, buffer)

    monkeypatch.setattr(StreamMatrix, "decode", counted)
    scratch = weights.Scratch()
    made = [encoded(m, 32, "stream") for m in (16, 48, 8)]
    held = [weights.StreamWeight(StreamMatrix(e), scratch) for e in made]
    for weight, source in zip(held, made, strict=True):
        for _ in range(2):
            assert torch.equal(weight.dense(torch.float32), to_torch(unpack(source), "F32"))
    assert calls == [(16, 32), (48, 32), (8, 32)] and scratch.nbytes == 48 * 32 * 4
    again = StreamMatrix.from_arrays(held[0].matrix.arrays)
    x = np.ones((1, 32), np.float32)
    assert (
        np.array_equal(again.apply(x), held[0].matrix.apply(x)) and again.nbytes == made[0].nbytes
    )
