"""Patches applied to tensors that share memory, or that cannot be written as they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import waterfill
from waterfill.coding import native
from waterfill.runtime import apply
from waterfill.types import WaterfillError

F = np.float32
State = dict[str, Any]


def own(state: State) -> State:
    return {name: value.copy() for name, value in state.items()}


def bits(state: State) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in state.items()}


def views() -> dict[str, State]:
    """States of which one byte belongs to several elements."""
    whole, pair, matrix = np.zeros(8, F), np.zeros(4, np.uint16), np.zeros((4, 4), F)
    return {
        "a part": {"part": whole[:4], "whole": whole},
        "a part from behind": {"whole": whole, "part": whole[6:2:-1]},
        "another dtype": {"a": pair, "b": pair.view(np.float16)},
        "another shape": {"a": whole, "b": whole.reshape(2, 4)},
        "a row and a column": {"row": matrix[1], "column": matrix[:, 2], "other": np.zeros(3, F)},
        "one for all": {"x": as_strided(np.zeros(1, F), (4,), (0,))},
        "windows": {"x": as_strided(np.zeros(5, F), (3, 3), (4, 4))},
    }


@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize("kind", list(views()))
def test_views_of_one_memory(kind: str, core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not core:
        monkeypatch.setenv("WATERFILL_SIMD", "numpy")
    for name in views()[kind]:
        # One of them is to be what the others, which stay, cannot be with it.
        state = views()[kind]
        before = bits(state)
        new = own(state)
        new[name] = (
            np.arange(1, new[name].size + 1).reshape(new[name].shape).astype(new[name].dtype)
        )
        if name == "other":
            assert bits(waterfill.apply_(state, waterfill.diff(own(state), new))) == bits(new)
            continue
        with pytest.raises(WaterfillError, match=r"share their memory .*; untie them first"):
            waterfill.apply_(state, waterfill.diff(own(state), new))
        assert bits(state) == before
    # All of them are to be what they can be.
    state, like = views()[kind], views()[kind]
    for number, value in enumerate(like.values()):
        value[...] = value.dtype.type(number + 1)
    assert bits(waterfill.apply_(state, waterfill.diff(own(state), own(like)))) == bits(like)


def test_interleaved_views_share_nothing() -> None:
    room = np.zeros((6, 2), F)
    state = {"even": room[:, 0], "odd": room[:, 1]}
    new = {"even": np.arange(6, dtype=F), "odd": -np.arange(6, dtype=F)}
    assert bits(waterfill.apply_(state, waterfill.diff(own(state), new))) == bits(new)


def test_torch_views() -> None:
    torch = pytest.importorskip("torch")
    whole = torch.zeros(8)
    for new in (torch.arange(8.0), torch.arange(8.0) + 1):
        state = {"part": whole[:4], "whole": whole}
        wanted = {"part": new[:4].clone(), "whole": new.clone()}
        waterfill.apply_(state, waterfill.diff(own_torch(state), wanted))
        assert torch.equal(whole, new) and torch.equal(state["part"], new[:4])
    wanted["part"] = wanted["part"] + 1
    with pytest.raises(WaterfillError, match="part and whole share"):
        waterfill.apply_(state, waterfill.diff(own_torch(state), wanted))
    assert torch.equal(whole, torch.arange(8.0) + 1)
    # Neither torch nor anyone else could write one memory twice: what came before must not be touched.
    state = {"x": torch.zeros(3, 4).t(), "y": torch.zeros(1).expand(4)}
    patch = waterfill.diff(own_torch(state), {"x": torch.ones(4, 3), "y": torch.ones(4)})
    with pytest.raises(WaterfillError, match="y cannot be written to"):
        waterfill.apply_(state, patch)
    assert not state["x"].any()


def own_torch(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def test_a_module_that_gives_copies_is_refused() -> None:
    torch = pytest.importorskip("torch")

    class Copies(torch.nn.Linear):  # type: ignore[misc]
        def state_dict(self, *words: Any, **options: Any) -> Any:
            return own_torch(super().state_dict(*words, **options))

    old, new = Copies(3, 3), Copies(3, 3)
    before = old.weight.detach().clone()
    with pytest.raises(WaterfillError, match="gives a copy"):
        waterfill.apply_(old, waterfill.diff(old, new))
    assert torch.equal(old.weight, before)
    assert waterfill.apply_(old, waterfill.diff(old, old)) is old


@pytest.mark.parametrize("core", [True, False])
def test_bools_of_any_byte(core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if not core:
        monkeypatch.setenv("WATERFILL_SIMD", "numpy")
    octets = np.arange(256, dtype=np.uint8).reshape(16, 16)
    patch = waterfill.diff({"x": np.zeros((16, 16), bool)}, {"x": octets.view(bool)})
    room = torch.zeros((16, 32), dtype=torch.bool)
    for tensor in (room[:, :16].clone(), room[:, ::2], torch.zeros(16, 16, dtype=torch.bool).t()):
        waterfill.apply_({"x": tensor}, patch)
        assert np.array_equal(tensor.view(torch.uint8).numpy(), octets)
        # And read from where they lie apart.
        assert waterfill.diff({"x": tensor}, {"x": octets.view(bool)}) == waterfill.diff(
            {"x": octets.view(bool)}, {"x": octets.view(bool)}
        )


def test_what_is_no_state_of_tensors_is_said() -> None:
    torch = pytest.importorskip("torch")
    one = {"a": np.zeros(3, F)}
    for model in ([1, 2], "folder", None):
        with pytest.raises(WaterfillError, match="a torch module or a dict"):
            waterfill.apply_(model, waterfill.diff(one, one))
    for state, said in (
        ({0: np.zeros(3, F)}, "0: the name of a tensor"),
        ({"a": F(1)}, "a must be a numpy array"),
        ({"a": torch.zeros(3, device="meta")}, "meta device"),
        ({"a": torch.eye(3).to_sparse()}, "layout torch.sparse_coo"),
    ):
        with pytest.raises(WaterfillError, match=said):
            waterfill.diff(state, one)
        with pytest.raises(WaterfillError, match=said):
            waterfill.apply_(state, waterfill.diff(one, one))


@pytest.mark.skipif(native._core is None, reason="needs the native core")
@pytest.mark.parametrize("first", ["empty", "as before"])
def test_a_first_tensor_that_stays_as_it_was_does_not_stop_the_undoing(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patch may list what does not change; equal bytes there do not say that all is done."""
    state = {"a": np.zeros(0 if first == "empty" else 3, F), "b": np.zeros((3, 4), F).T}
    target = {"a": state["a"].copy(), "b": state["b"].T.copy().T}
    source = apply.StateSource(target)
    staged = {"a": ("F32", target["a"].copy()), "b": ("F32", np.ones((4, 3), F))}
    write, calls = apply.write_bits, [0]

    def failing(tensor: Any, new: Any, dtype: str) -> None:
        calls[0] += 1
        write(tensor, new, dtype)
        if calls[0] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(apply, "write_bits", failing)
    with pytest.raises(KeyboardInterrupt):
        apply._commit(target, source, apply._Step(staged, frozenset(), {}))
    assert bits(target) == bits(state)
