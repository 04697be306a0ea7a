"""A patch applied to a model in memory: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.coding import native
from waterfill.runtime.digests import digest, model_digest
from waterfill.runtime.patch import Patch
from waterfill.runtime.tensors import to_torch
from waterfill.sources.aliases import conflict
from waterfill.sources.state import StateSource, span_of
from waterfill.types import Array, WaterfillError

__all__ = ["apply_"]

Bytes = NDArray[np.uint8]
PIECE = 1 << 16


def apply_(model: Any, patch: str | Path | bytes | bytearray | memoryview) -> Any:
    """Turn a model in memory into the next version of it, in place.

    Every new tensor is made and the whole result's hash compared before the model is touched. An
    error, an interrupt too, leaves the model as it was or, after the last byte, as it is to be.
    Memory beside the model: the new bytes of all tensors that change; of those that do not lie in
    one piece on the CPU, the old ones too.

    Parameters
    ----------
    model : torch module, or dict of name -> torch tensor or numpy array
        Tensors keep their memory and device. A dict may gain, lose and exchange tensors, a module
        may not.
    patch : file, or its bytes

    Returns
    -------
    The model.

    Raises
    ------
    WaterfillError
        If the patch is for another model, or needs what cannot be done in place.
    FormatError
        If the patch is damaged.
    """
    state = model.state_dict() if hasattr(model, "state_dict") else model
    if not isinstance(state, Mapping):
        raise WaterfillError(
            f"apply_ changes a torch module or a dict of tensors, not {type(model).__name__}; "
            "waterfill patch is for folders"
        )
    source = StateSource(state)
    with Patch(patch) as opened:
        step = _stage(source, opened)
    _check(source, step, state is not model)
    if state is not model:
        _require_own(source, step, model.state_dict())
    _commit(state, source, step)
    return model


Row = tuple[str, str, tuple[int, ...], str]


@dataclass
class _Step:
    """What is to be done to a state, all of it made and verified.

    Attributes
    ----------
    staged : name -> (dtype, new bits)
    removed : names that go
    followers : names that share the memory of another and are not in the patch's model -> that one
    """

    staged: dict[str, tuple[str, Array]]
    removed: frozenset[str]
    followers: Mapping[str, str]

    def exchanged(self, source: StateSource) -> set[str]:
        """Names whose tensors cannot keep their memory."""
        infos = {name: (dtype, bits.shape) for name, (dtype, bits) in self.staged.items()}
        return {name for name, info in infos.items() if source.tensors.get(name) != info}


def _stage(source: StateSource, patch: Patch) -> _Step:
    before = _digests(source)
    followers: Mapping[str, str] = {}
    if model_digest(before.values()) != patch.base:
        # A checkpoint on disk has tied tensors once, a module under each of their names.
        own = {name: row for name, row in before.items() if name not in source.shared}
        if model_digest(own.values()) == patch.base:
            before, followers = own, source.shared
    patch.require_base(model_digest(before.values()))
    infos = {name: source.tensors[name] for name in before}
    after = {n: (n, *i, before[n][3] if n in before else "") for n, i in patch.infos(infos).items()}
    staged = {}
    for name, entry in patch.entries.items():
        if not entry.info.group:
            old = source.read(name) if name in before else None
            staged[name] = entry.info.dtype, patch.restore(name, old, infos.get(name))
            after[name] = (*after[name][:3], digest(staged[name][1]))
    for name, entry in patch.entries.items():
        if entry.info.group:
            staged[name] = staged[entry.info.group]
            after[name] = (*after[name][:3], after[entry.info.group][3])
    patch.require_result(model_digest(after.values()))
    for name, first in source.shared.items():
        if name in after and first in after and after[name][1:] != after[first][1:]:
            raise _tied(name, first)
    return _Step(staged, patch.removed, followers)


def _tied(name: str, other: str) -> WaterfillError:
    which = f"{name} and {other} share" if name != other else f"elements of {name} share"
    return WaterfillError(
        f"{which} their memory in this model and differ in the new one; untie them first"
    )


def _digests(source: StateSource) -> dict[str, Row]:
    known: dict[str, Row] = {}
    for name, info in source.tensors.items():
        first = source.shared.get(name)
        known[name] = (name, *info, known[first][3] if first else digest(source.read(name)))
    return known


def _check(source: StateSource, step: _Step, module: bool) -> None:
    """WaterfillError where the step cannot be done in place."""
    exchanged = step.exchanged(source)
    if module and (exchanged or step.removed):
        name = sorted(exchanged | step.removed)[0]
        raise WaterfillError(
            f"{name} is new, gone, or of another shape or dtype in the new model; a module cannot "
            "follow that in place: load the new model afresh"
        )
    if (exchanged or step.removed) and not isinstance(source.state, MutableMapping):
        raise WaterfillError("this mapping cannot gain or lose tensors; give a dict")
    for name in step.staged.keys() - exchanged:
        if not _writable(source.state[name]):
            raise WaterfillError(f"{name} cannot be written to")
    stay = [n for n in source.tensors if n not in exchanged | step.removed | source.shared.keys()]
    found = conflict(
        ((name, span_of(source.state[name])) for name in stay),
        changed=lambda name: name in step.staged,
        wanted=lambda name: step.staged[name][1] if name in step.staged else source.read(name),
    )
    if found:
        raise _tied(*found)


def _require_own(source: StateSource, step: _Step, again: Mapping[str, Any]) -> None:
    """WaterfillError where a module gave copies of its tensors: writing to them would change nothing."""
    for name in step.staged:
        if name not in again or span_of(again[name]) != span_of(source.state[name]):
            raise WaterfillError(
                f"{name}: this module's state_dict gives a copy, which leads nowhere; "
                "give a dict of the tensors themselves"
            )


def _writable(tensor: Any) -> bool:
    if isinstance(tensor, np.ndarray):
        return bool(tensor.flags.writeable)
    repeats = any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return not tensor.is_inference() and not repeats


def _commit(state: Any, source: StateSource, step: _Step) -> None:
    exchanged = step.exchanged(source)
    entries = dict(state) if exchanged or step.removed else None
    direct: list[tuple[Bytes, Bytes]] = []
    written: list[tuple[Any, Array, str]] = []
    core, copying = native.core(), False
    try:
        for name, (dtype, bits) in step.staged.items():
            if name in exchanged:
                _exchange(state, name, bits, dtype)
                continue
            own = source.read(name)
            if core is not None and source.lies_in(name, own):
                direct.append((_octets(own), _octets(bits)))
                continue
            # Before the first byte is written, so that whatever happens next can be undone.
            written.append((state[name], own.copy(), dtype))
            write_bits(state[name], bits, dtype)
        _follow(state, step, exchanged)
        copying = True
        if core is not None:
            core.copy_all(direct, native.threads())
    except BaseException:
        _undo(state, entries, written, direct if copying else None)
        raise


def _octets(bits: Array) -> Bytes:
    return bits.reshape(-1).view(np.uint8)


def _follow(state: Any, step: _Step, exchanged: set[str]) -> None:
    for name in step.removed:
        del state[name]
    for name, first in step.followers.items():
        if first in exchanged:
            state[name] = state[first]
        elif first in step.removed:
            del state[name]


def _undo(
    state: Any,
    entries: dict[str, Any] | None,
    written: list[tuple[Any, Array, str]],
    copied: list[tuple[Bytes, Bytes]] | None,
) -> None:
    """Back to where all began, unless all is done: an interrupt may have come just after it."""
    while True:
        try:
            if copied is not None and all(_equal(*pair) for pair in copied):
                return
            while written:
                write_bits(*written[-1])
                written.pop()
            if entries is not None:
                state.clear()
                state.update(entries)
            return
        except KeyboardInterrupt:
            continue  # the first one is raised again, once all is as it was


def _equal(a: Bytes, b: Bytes) -> bool:
    # In pieces: where memory ran out there is none for a comparison of all at once.
    return all(
        np.array_equal(a[at : at + PIECE], b[at : at + PIECE]) for at in range(0, a.size, PIECE)
    )


def _exchange(state: Any, name: str, bits: Array, dtype: str) -> None:
    like = state.get(name, next(iter(state.values()), None))
    if like is None or isinstance(like, np.ndarray):
        state[name] = bits.copy()
    else:
        state[name] = to_torch(bits.copy(), dtype).to(like.device)


def write_bits(tensor: Any, bits: Array, dtype: str) -> None:
    """Overwrite a torch tensor or numpy array with stored bits of its own shape and dtype."""
    if isinstance(tensor, np.ndarray):
        tensor[...] = bits.view(tensor.dtype.newbyteorder("<")) if bits.shape else bits
        return
    import torch

    new = to_torch(bits, dtype)
    with torch.no_grad():
        if dtype == "BOOL":  # a copy of bools makes a 1 of every other byte
            tensor, new = tensor.view(torch.uint8), new.view(torch.uint8)
        tensor.copy_(new)
