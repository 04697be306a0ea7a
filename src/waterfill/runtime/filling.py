"""Modules of a transformers model made to hold packed or coded weights while it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from waterfill.coding.native import trim_memory
from waterfill.container import Reader
from waterfill.runtime import modules
from waterfill.runtime.arrays import decode
from waterfill.runtime.residency import Row, integers_of, matrix_class, rows_of
from waterfill.runtime.streaming import StreamMatrix
from waterfill.runtime.tensors import LazyTensor, to_torch
from waterfill.runtime.weights import MatrixWeight, Scratch, StreamWeight, Weight
from waterfill.types import FLOAT_DTYPES

__all__ = ["Filling"]

Choose = Callable[[list[Row]], Mapping[str, str]]


@dataclass
class Filling:
    """One load of a model whose modules keep weights in the forms that `choose` picks.

    Attributes
    ----------
    state : tensors that transformers is to load; what modules keep is taken out before it does
    """

    reader: Reader
    state: dict[str, LazyTensor]
    choose: Choose

    def __deepcopy__(self, memo: Any) -> Filling:
        return self  # transformers copies what a configuration refers to; a load there is but one

    def before(self, model: Any) -> None:
        """Take away the weights that will be kept in another form; the model is still empty."""
        placed = _placed(model, self.reader)
        roots = {name: self.reader.entries[t].info.group or t for name, t in placed.items()}
        uses = dict.fromkeys(roots.values(), 0)
        for name, root in roots.items():
            uses[root] += not isinstance(model.get_submodule(name), nn.Embedding)
        self._dtype = model.dtype
        rows = list(rows_of(self.reader, uses, _stored(model.dtype)))
        forms = self.choose(rows)
        self.places: dict[str, list[str]] = {}
        self.forms: dict[str, str] = {}
        for name, root in roots.items():
            if forms.get(root, "dense") != "dense":
                self.places.setdefault(root, []).append(name)
                self.forms[root] = forms[root]
        kept = {name for names in self.places.values() for name in names}
        for name in kept:
            modules.hollow(model.get_submodule(name))
            self.state.pop(placed[name], None)
        keys = {f"{name}.weight" for name in kept}
        model.all_tied_weights_keys = {
            target: source
            for target, source in model.all_tied_weights_keys.items()
            if target not in keys
        }

    def after(self, model: Any) -> None:
        """Read the kept weights, one after the other; the model has all others."""
        scratch = Scratch()
        like = torch.empty(0, dtype=self._dtype, device=model.device)
        for root, names in self.places.items():
            found = [model.get_submodule(name) for name in names]
            transposed = not isinstance(found[0], (nn.Linear, nn.Embedding))
            weight = self._weight(root, transposed, scratch)
            trim_memory()  # what the last tensor took: else its holes add up to more than a layer
            if weight is not None:
                for module in found:
                    modules.give(module, weight, like)
                continue
            dense = self._dense(root, like)
            for module in found:
                modules.restore(module, dense)

    def _weight(self, root: str, transposed: bool, scratch: Scratch) -> Weight | None:
        integers = integers_of(self.reader, root)
        info = self.reader.entries[root].info
        if integers is not None and info.transposed == transposed:
            matrix = matrix_class(self.forms[root], integers).build(integers, info.dtype)
            if matrix is not None:
                return MatrixWeight(matrix, scratch)
        if self.forms[root] == "coded":
            return StreamWeight(StreamMatrix(self.reader.read(root), transposed), scratch)
        return None

    def _dense(self, root: str, like: torch.Tensor) -> nn.Parameter:
        bits = to_torch(decode(self.reader, root), self.reader.entries[root].info.dtype)
        return nn.Parameter(bits.to(like), requires_grad=False)


def _stored(dtype: torch.dtype) -> str:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    return names.get(dtype, "F64")


def _placed(model: Any, reader: Reader) -> dict[str, str]:
    """Module -> the tensor that is its weight, one to one, where a module can hold it in another form."""
    tensors = set(_untouched(model, reader))
    tied = model.all_tied_weights_keys
    placed = {}
    for name, module in model.named_modules():
        transposed = modules.stored_transposed(module)
        if transposed is None:
            continue
        key = f"{name}.weight"
        wanted = [key, *_partners(key, tied)]
        found = [t for k in wanted for t in _spellings(k, model.base_model_prefix) if t in tensors]
        if found and _fits(reader, found[0], module):
            placed[name] = found[0]
    return _whole_ties(placed, tied)


def _whole_ties(placed: dict[str, str], tied: Mapping[str, str]) -> dict[str, str]:
    """Without the modules that share a weight with one that cannot keep it."""
    pairs = [tuple(key.removesuffix(".weight") for key in pair) for pair in tied.items()]
    while True:
        alone = {m for pair in pairs if len(placed.keys() & set(pair)) == 1 for m in pair}
        if not alone:
            return placed
        placed = {module: tensor for module, tensor in placed.items() if module not in alone}


def _partners(key: str, tied: Mapping[str, str]) -> list[str]:
    """Parameters that share their memory with one."""
    source = tied.get(key, key)
    return [source, *(t for t, s in tied.items() if s == source)]


def _spellings(key: str, prefix: str) -> list[str]:
    """A parameter's name, and as a model with or without a head would write it."""
    return [key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")] if prefix else [key]


def _fits(reader: Reader, tensor: str, module: nn.Module) -> bool:
    info = reader.entries[tensor].info
    root = reader.entries[info.group or tensor].info
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    return root.shape == shape and root.dtype in FLOAT_DTYPES


def _untouched(model: Any, reader: Reader) -> list[str]:
    """Whole tensors that transformers loads under their own name, but for the base model's prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = get_model_conversion_mapping(model)
    names = [name for name, entry in reader.entries.items() if entry.info.index is None]
    return [n for n in names if all(c.rename_source_key(n)[0] == n for c in conversions)]
