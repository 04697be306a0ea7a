"""The numbers a small float can be, its scales, and what is decoded from them."""

from __future__ import annotations

import numpy as np
import pytest

from waterfill.coding.levels import floats
from waterfill.registry import parse_spec
from waterfill.types import FormatError, SpecError, TensorInfo, Weighting


def test_e2m1_is_the_one_of_the_formats_that_machines_have() -> None:
    assert (4 * floats(2, 1)[7:]).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (64 * floats(3, 0)[7:]).tolist() == [0, 1, 2, 4, 8, 16, 32, 64]
    assert (4 * floats(1, 2)[7:]).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits_are_those_of_torch_but_that_every_code_is_a_number(name: str) -> None:
    torch = pytest.importorskip("torch")
    known = torch.arange(128, dtype=torch.uint8).view(getattr(torch, name)).float().numpy()
    ours = floats(4, 3) if "e4m3" in name else floats(5, 2)
    finite = np.isfinite(known)
    assert finite.sum() >= 124
    scale = known[1] / ours[128]
    assert np.array_equal(ours[127:][finite] * scale, known[finite])
    assert len(ours) == 255 and (np.diff(ours) > 0).all() and np.array_equal(ours, -ours[::-1])


def coded(text: str, matrix: np.ndarray) -> tuple[dict[str, bytes], dict[str, object], np.ndarray]:
    info = TensorInfo("w", matrix.shape, "F32", "linear")
    chosen = parse_spec(text)
    parts, extra = chosen.encode(matrix, info, Weighting())
    return parts, extra, chosen.decode(parts, extra, info)


@pytest.mark.parametrize("rule", ["pow2", "ratio"])
def test_scales_that_are_powers_of_two(rule: str) -> None:
    """Levels of a group are whole multiples of one power of two, or of it and the row's number."""
    random = np.random.default_rng(0)
    matrix = random.normal(0, 0.3, (12, 64)).astype(np.float32) * random.lognormal(0, 1, (12, 1))
    _, _, got = coded(f"float:search=clip,group=16,scales={rule}", matrix.astype(np.float32))
    for row in got:
        steps = [np.abs(g[g != 0]).min() for g in row.reshape(4, 16)]
        mantissas = {float(np.frexp(v / steps[0])[0]) for v in steps}
        assert mantissas <= {0.5, 0.75, 2 / 3}  # the least that occurs is one step, or three halves
    if rule == "pow2":
        assert set(np.frexp(np.abs(got[got != 0]))[0].tolist()) == {0.5, 0.75}


def test_the_split_of_bits_is_the_tensors() -> None:
    random = np.random.default_rng(1)
    even = random.uniform(-1, 1, (64, 64)).astype(np.float32)
    wide = (random.choice([-1, 1], (64, 64)) * np.exp2(-8 * random.random((64, 64)))).astype("f4")
    assert coded("float", even)[1]["ebits"] == 1
    relative = coded("float:mbits=3", wide)[1]
    assert relative.get("ebits", 2) >= 2 and "ebits" not in coded("float:search=clip", even)[1]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    "text", ["float", "float:ebits=3,mbits=0,search=clip", "float:scales=pow2"]
)
def test_integers_are_what_it_decodes_to(text: str, dtype: str) -> None:
    random = np.random.default_rng(5)
    info = TensorInfo("w", (40, 80), dtype, "linear")
    bits = info.unmatrix((random.standard_t(4, (40, 80)) * 0.03).astype(np.float32))
    chosen = parse_spec(f"{text},group=32" if ":" in text else f"{text}:group=32")
    parts, extra = chosen.encode(bits, info, Weighting())
    found = chosen.integers(parts, extra, info)
    assert found is not None and found.levels is not None
    assert np.array_equal(info.unmatrix(found.values()), chosen.decode(parts, extra, info))
    assert np.abs(found.levels).max() < 2 ** (found.bits - 1)
    outline = chosen.integers(parts, extra, info, outline=True)
    assert outline is not None and outline.levels is None and outline.bits == found.bits


def test_steps_beyond_a_byte_are_no_integers() -> None:
    matrix = np.eye(8, dtype=np.float32)
    parts, extra, _ = coded("float:ebits=4,mbits=3,search=absmax", matrix)
    info = TensorInfo("w", (8, 8), "F32", "linear")
    assert parse_spec("float:ebits=4,mbits=3,search=absmax").integers(parts, extra, info) is None


@pytest.mark.parametrize("ebits", [0, 4, True, 1.0, "1"])
def test_bits_of_exponent_that_no_writer_wrote(ebits: object) -> None:
    matrix = np.ones((8, 8), np.float32)
    parts, _, _ = coded("float", matrix)
    with pytest.raises(FormatError, match="bits of exponent"):
        parse_spec("float").decode(parts, {"ebits": ebits}, TensorInfo("w", (8, 8), "F32"))


@pytest.mark.parametrize("text", ["float:ebits=6", "float:ebits=0", "float:ebits=4,mbits=4", "float:search=mse", "float:scales=e8", "float:group=4"])  # fmt: skip
def test_settings_out_of_range(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(text)
