"""Patches in memory: what they restore, what they refuse, and that nothing is ever half done."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import waterfill
from waterfill.coding import native
from waterfill.container import PATCH, Reader, chunks
from waterfill.pipeline.diffing import encode_tensor
from waterfill.runtime import apply
from waterfill.types import DTYPES, FormatError, TensorInfo, WaterfillError

State = dict[str, Any]


def states() -> tuple[State, State]:
    """Two versions of one state: sparse, dense, unchanged, gone, new, reshaped and retyped tensors."""
    rng = np.random.default_rng(0)
    sparse = rng.normal(0, 0.02, (64, 96)).astype(np.float16)
    bits = sparse.view(np.uint16).copy()
    bits[rng.random(bits.shape) < 0.05] += 1
    old = {
        "sparse": sparse,
        "dense": rng.normal(0, 1, (40, 30)).astype(np.float32),
        "same": np.arange(12, dtype=np.int64),
        "gone": np.ones(5, np.float32),
        "reshaped": np.zeros((2, 3), np.int8),
        "retyped": np.ones(4, np.float64),
        "flag": np.array([True, False, True]),
        "nothing": np.zeros((0, 4), np.float32),
    }
    new = {
        **{k: v.copy() for k, v in old.items() if k != "gone"},
        "sparse": bits.view(np.float16),
        "dense": rng.normal(0, 1, (40, 30)).astype(np.float32),
        "reshaped": np.ones((3, 2), np.int8),
        "retyped": np.ones(4, np.float32),
        "flag": np.array([True, True, True]),
        "new": rng.integers(0, 1000, (3, 3, 3)).astype(np.uint16),
    }
    return old, new


def copied(state: State) -> State:
    return {name: value.copy() for name, value in state.items()}


def same(a: State, b: State) -> bool:
    return list(sorted(a)) == sorted(b) and all(
        (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes())
        for n in a
    )


@pytest.mark.parametrize("core", [True, False])
def test_a_dict_becomes_the_other(monkeypatch: pytest.MonkeyPatch, core: bool) -> None:
    if not core:
        monkeypatch.setenv("WATERFILL_SIMD", "numpy")
    old, new = states()
    patch = waterfill.diff(old, new)
    target = copied(old)
    memory = target["sparse"]
    assert waterfill.apply_(target, patch) is target
    assert same(target, new) and target["sparse"] is memory
    back = waterfill.diff(new, old)
    assert same(waterfill.apply_(target, back), old)


def test_the_same_bytes_each_time_and_as_a_file(tmp_path: Path) -> None:
    old, new = states()
    patch = waterfill.diff(old, new)
    (tmp_path / "p").write_bytes(patch)
    assert waterfill.diff(old, new) == patch
    assert same(waterfill.apply_(copied(old), tmp_path / "p"), new)
    assert same(waterfill.apply_(copied(old), bytearray(patch)), new)
    assert same(waterfill.apply_(copied(old), memoryview(patch)), new)
    with Reader(patch, (PATCH,)) as reader:
        assert list(reader.verify()) == list(reader.entries)
        modes = {name: entry.spec.id for name, entry in reader.entries.items()}
    assert modes.keys() == {"sparse", "dense", "reshaped", "retyped", "flag", "new"}
    assert modes["sparse"] == "delta" and modes["new"] in ("raw", "lossless")


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_each_mode_restores_each_dtype(dtype: str) -> None:
    rng = np.random.default_rng(1)
    width = DTYPES[dtype].itemsize
    x = rng.integers(0, 256, 999 * width, np.uint8).view(f"<u{width}")
    info = TensorInfo("t", (9, 111), dtype)
    for changed in (x ^ x.dtype.type(1), np.where(rng.random(999) < 0.1, x + 1, x), x[::-1].copy()):
        old, new = (v.view(DTYPES[dtype]).reshape(9, 111) for v in (x, changed.astype(x.dtype)))
        encoded, share = encode_tensor(info, old, new)
        assert share is not None and 0 < share <= 1 and encoded.nbytes <= info.nbytes + 200
        if np.dtype(DTYPES[dtype]).kind in "fiub" and dtype not in ("BF16", "F8_E4M3", "F8_E5M2"):
            target = {"t": old.copy()}
            waterfill.apply_(target, waterfill.diff({"t": old}, {"t": new}))
            assert target["t"].tobytes() == new.tobytes()


def test_a_xor_wins_where_all_words_change_in_a_few_bits() -> None:
    rng = np.random.default_rng(2)
    old = rng.integers(0, 1 << 63, 5000, np.uint64)
    flips = np.uint64(1) << rng.integers(0, 64, 5000).astype(np.uint64)
    small = TensorInfo("t", (5000,), "U64")
    encoded, _ = encode_tensor(small, old, old ^ np.where(rng.random(5000) < 0.5, flips, 0))
    assert encoded.spec.id in ("xor", "delta") and encoded.nbytes < 0.5 * small.nbytes
    target = {"t": old.copy()}
    new = {"t": old ^ (rng.integers(0, 4, 5000).astype(np.uint64) << np.uint64(50))}
    patch = waterfill.diff({"t": old}, new)
    with Reader(patch, (PATCH,)) as reader:
        assert reader.entries["t"].spec.id == "xor"
    assert same(waterfill.apply_(target, patch), new)


def test_any_other_base_is_refused() -> None:
    old, new = states()
    patch = waterfill.diff(old, new)
    for change in (
        lambda s: s["sparse"].reshape(-1).view(np.uint16).__setitem__(7, 3),
        lambda s: s.pop("same"),
        lambda s: s.update(extra=np.zeros(1, np.float32)),
        lambda s: s.update(same=s["same"].reshape(3, 4)),
        lambda s: s.update(same=s["same"].view(np.uint64)),
    ):
        target = copied(old)
        change(target)
        before = copied(target)
        with pytest.raises(WaterfillError, match=r"this patch is for \w{8}, you gave \w{8}"):
            waterfill.apply_(target, patch)
        assert same(target, before)
    with pytest.raises(WaterfillError, match="already the model it makes"):
        waterfill.apply_(copied(new), patch)


def test_every_flipped_bit_is_refused() -> None:
    old = {"w": np.arange(600, dtype=np.uint16), "v": np.zeros(3, np.float32)}
    new = {
        "w": old["w"] + (np.arange(600) % 50 == 0).astype(np.uint16),
        "v": np.ones(3, np.float32),
    }
    patch = waterfill.diff(old, new)
    for bit in range(8 * len(patch)):
        broken = bytearray(patch)
        broken[bit // 8] ^= 1 << bit % 8
        target = copied(old)
        with pytest.raises(FormatError):
            waterfill.apply_(target, bytes(broken))
        assert same(target, old)
    for length in range(0, len(patch), 7):
        with pytest.raises(FormatError):
            waterfill.apply_(copied(old), patch[:length])


def rewritten(patch: bytes, change: Callable[[dict[str, Any], list[list[bytes]]], None]) -> bytes:
    """The patch with another index or payload, every checksum made to fit."""
    with Reader(patch, (PATCH,)) as reader:
        index = reader._index_bytes(_header_of(patch))
        document = json.loads(zlib.decompress(index))
        payloads = [list(reader.read(name).parts.values()) for name in reader.entries]
    change(document, payloads)
    for item, parts in zip(document["tensors"], payloads, strict=True):
        keys = list(item["parts"])
        item["parts"] = {k: [len(p), zlib.crc32(p)] for k, p in zip(keys, parts, strict=True)}
    return b"".join(chunks(document["tensors"], payloads, document["about"], PATCH))


def _header_of(patch: bytes) -> Any:
    return json.loads(patch[8 : 8 + int.from_bytes(patch[:8], "little")])


def item(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(i for i in document["tensors"] if i["name"] == name)


HOSTILE: dict[str, Callable[[dict[str, Any], list[list[bytes]]], object]] = {
    "no base": lambda d, p: d["about"].pop("base"),
    "a digest that is none": lambda d, p: d["about"].update(result="x" * 64),
    "another result": lambda d, p: d["about"].update(result="0" * 64),
    "removed is a number": lambda d, p: d["about"].update(removed=3),
    "removed what is not there": lambda d, p: d["about"].update(removed=["gone", "never"]),
    "removed and changed": lambda d, p: d["about"].update(removed=["gone", "sparse"]),
    "delta of a new tensor": lambda d, p: item(d, "new").update(codec=["delta", 1, {}]),
    "a later delta": lambda d, p: item(d, "sparse").update(codec=["delta", 2, {}]),
    "an unknown mode": lambda d, p: item(d, "sparse").update(codec=["shuffle", 1, {}]),
    "xor of nothing": lambda d, p: item(d, "sparse").update(codec=["xor", 1, {}]),
    "xor of what is not there": lambda d, p: item(d, "sparse").update(
        codec=["xor", 1, {"of": ["raw", 1, {}]}]
    ),
    "delta of another shape": lambda d, p: item(d, "sparse").update(shape=[96, 64]),
    "delta of another dtype": lambda d, p: item(d, "sparse").update(dtype="BF16"),
    "a huge new tensor": lambda d, p: item(d, "new").update(
        shape=[1 << 40], codec=["lossless", 1, {}]
    ),
    "a thousand new tensors, each of them not huge": lambda d, p: [
        (d["tensors"].append({**item(d, "new"), "name": f"n{i}", "parts": {}, "same_as": "n"}), p.append([]))
        for i in range(1000)
    ] and (
        d["tensors"].append({**item(d, "new"), "name": "n", "dtype": "U8", "shape": [1 << 28],
                             "codec": ["lossless", 2, {"coder": "auto"}], "parts": {"stream": 0}}),
        p.append([b"\1\0"]),
        [i.update(dtype="U8", shape=[1 << 28]) for i in d["tensors"] if i.get("same_as") == "n"],
    ),
    "repeats what is not there": lambda d, p: d["tensors"].append(
        {**item(d, "new"), "name": "n", "parts": {}, "same_as": "same"}
    ) or p.append([]),
    "repeats what has another shape": lambda d, p: d["tensors"].append(
        {**item(d, "new"), "name": "n", "shape": [27], "parts": {}, "same_as": "new"}
    ) or p.append([]),
    "repeats what has another dtype": lambda d, p: d["tensors"].append(
        {**item(d, "new"), "name": "n", "dtype": "BF16", "parts": {}, "same_as": "new"}
    ) or p.append([]),
    "an empty delta": lambda d, p: p.__setitem__(0, [b""]),
    "a delta of noise": lambda d, p: p.__setitem__(0, [bytes(range(200))]),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_patch_that_lies_is_refused(what: str) -> None:
    old, new = states()
    broken = rewritten(waterfill.diff(old, new), lambda d, p: HOSTILE[what](d, p) and None)
    target = copied(old)
    with pytest.raises(FormatError):
        waterfill.apply_(target, broken)
    assert same(target, old)


def test_what_cannot_be_compared_is_said() -> None:
    with pytest.raises(WaterfillError, match="complex64"):
        waterfill.diff({"a": np.zeros(2, np.complex64)}, {})
    with pytest.raises(WaterfillError, match="int cannot be stored"):
        waterfill.diff({"step": 3}, {"step": 4})
    with pytest.raises(WaterfillError, match="must be a string"):
        waterfill.diff({1: np.zeros(2)}, {1: np.ones(2)})
    for nothing in (None, 3, [np.zeros(2)]):
        with pytest.raises(WaterfillError, match="is no model"):
            waterfill.diff({}, nothing)
    for nothing in (None, 3, [np.zeros(2)], "folder"):
        with pytest.raises(WaterfillError, match="a torch module or a dict"):
            waterfill.apply_(nothing, waterfill.diff({}, {}))
    readonly = {"a": np.zeros(4, np.float32)}
    patch = waterfill.diff(readonly, {"a": np.ones(4, np.float32)})
    readonly["a"].flags.writeable = False
    with pytest.raises(WaterfillError, match="cannot be written"):
        waterfill.apply_(readonly, patch)
    with pytest.raises(FormatError, match="no such file; expected a waterfill patch"):
        waterfill.apply_({}, "nowhere")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_commit_that_is_stopped_is_undone(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], after: int
) -> None:
    """Without the core tensors are written one by one, the worst case."""
    monkeypatch.setenv("WATERFILL_SIMD", "numpy")
    old, new = states()
    patch = waterfill.diff(old, new)
    target = copied(old)
    write, calls = apply.write_bits, [0]

    def failing(tensor: Any, bits: Any, dtype: str) -> None:
        calls[0] += 1
        if calls[0] == after + 1:
            tensor.reshape(-1)[:1] = 0  # half done
            raise error
        if calls[0] == after + 2 and error is KeyboardInterrupt:
            raise error  # once more, while all is being undone
        write(tensor, bits, dtype)

    monkeypatch.setattr(apply, "write_bits", failing)
    with pytest.raises(error):
        waterfill.apply_(target, patch)
    assert same(target, old)


@pytest.mark.skipif(native._core is None, reason="needs the native core")
def test_an_interrupt_around_the_native_copy_is_before_or_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = states()
    patch = waterfill.diff(old, new)
    core = native._core

    class Stopped:
        def __init__(self, when: str) -> None:
            self.when = when

        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def copy_all(self, pairs: Any, threads: int) -> None:
            if self.when == "after":
                core.copy_all(pairs, threads)
            raise KeyboardInterrupt

    for when, want in (("before", old), ("after", new)):
        target = copied(old)
        monkeypatch.setattr(native, "_core", Stopped(when))
        with pytest.raises(KeyboardInterrupt):
            waterfill.apply_(target, patch)
        assert same(target, want)


def test_torch_modules(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    def module(seed: int) -> Any:
        torch.manual_seed(seed)
        made = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20))
        made[1].weight = made[0].weight
        return made.bfloat16()

    old, new = module(0), module(1)
    patch = waterfill.diff(old, new)
    with Reader(patch, (PATCH,)) as reader:
        assert sum(e.info.group == "" for e in reader.entries.values()) == 2
    before = old[0].weight.data_ptr()
    assert waterfill.apply_(old, patch) is old
    for name, tensor in new.state_dict().items():
        assert torch.equal(old.state_dict()[name].view(torch.int16), tensor.view(torch.int16))
    assert old[0].weight.data_ptr() == before and old[1].weight is old[0].weight

    # A checkpoint on disk has the tied tensor once.
    once = [{n: t for n, t in m.state_dict().items() if n != "1.weight"} for m in (module(0), new)]
    third = waterfill.apply_(module(0), waterfill.diff(*once))
    assert torch.equal(third[1].weight, new[1].weight)

    with pytest.raises(WaterfillError, match=r"0\.weight is on the meta device"):
        waterfill.apply_(module(0).to("meta"), patch)

    # Tied here, apart in the new model; and what a module cannot follow.
    apart = {n: t.clone() for n, t in new.state_dict().items()}
    apart["1.weight"] += 1
    for wanted, said in (
        (apart, "share their memory"),
        ({"0.weight": apart["0.weight"]}, "in place"),
    ):
        tied = module(0)
        with pytest.raises(WaterfillError, match=said):
            waterfill.apply_(tied, waterfill.diff(tied, wanted))
        assert torch.equal(tied[0].weight, module(0)[0].weight)


def test_torch_tensors_of_every_layout() -> None:
    torch = pytest.importorskip("torch")
    old = {
        "strided": torch.arange(24, dtype=torch.float32).reshape(4, 6).t(),
        "scalar": torch.tensor(1.5, dtype=torch.float16),
        "fp8": torch.ones(7).to(torch.float8_e4m3fn),
        "leaf": torch.ones(3, requires_grad=True),
        "bool": torch.tensor([True, False]),
    }
    new = {
        "strided": old["strided"] + 1,
        "scalar": -old["scalar"],
        "fp8": torch.full((7,), 2.0).to(torch.float8_e4m3fn),
        "leaf": torch.full((3,), float("nan")),
        "bool": torch.tensor([True, True]),
    }
    patch = waterfill.diff(old, new)
    waterfill.apply_(old, patch)
    for name, tensor in new.items():
        a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (old[name], tensor))
        assert torch.equal(a, b), name
    assert old["strided"].stride() == (1, 6) and old["leaf"].requires_grad
