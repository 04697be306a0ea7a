"""Harm of one tensor at a time: at the layer's output, and in nats at the model's.

The model's figure is the sum of what its tensors do; these are measured to hold beside what was
predicted for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.evaluate.language import (
    Progress,
    as_windows,
    evaluating,
    is_masked,
    mean_divergence,
    scored_logits,
)
from waterfill.evaluate.windows import Windows
from waterfill.types import WaterfillError

__all__ = ["layer_errors", "layer_kl"]


def layer_errors(
    original: Any,
    compressed: Any,
    windows: Windows | NDArray[np.int64],
    names: Sequence[str],
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Error of each linear layer's output, with the original's inputs (nothing accumulates).

    Parameters
    ----------
    original : torch module
    compressed : torch module, or mapping of tensor name to decoded weight as stored
    windows : Windows or int64 (count, window)
    names : weights to measure; those of modules that are not linear in it are left out

    Returns
    -------
    list of dict
        `name`; `measured_output_error`: mean over tokens of ``||W x - Q x||^2`` (summed over
        outputs, so it compares with ``tr(E S E^T)``); `relative_output_error`: the same over
        ``||W x||^2``.
    """
    import torch
    from torch.func import functional_call

    sums: dict[str, list[float]] = {}
    hooks = []
    inside = False

    def watch(name: str, module: Any) -> Any:
        leaf = name.rpartition(".")[2]

        def hook(_: Any, arguments: tuple[Any, ...], output: Any) -> None:
            nonlocal inside
            if inside:  # a call of our own, below
                return
            inside = True
            try:
                weight = module.get_parameter(leaf).float()
                error = weight - weight_of(compressed, name, weight)
                x = [a.float() if a.is_floating_point() else a for a in arguments]
                # The layer is linear in its weight: W - Q in place of W gives the error itself,
                # without the cancellation of subtracting two outputs.
                zero = (
                    {} if module.bias is None else {"bias": torch.zeros_like(module.bias.float())}
                )
                for slot, value in enumerate((error, weight)):
                    made = functional_call(module, {leaf: value, **zero}, tuple(x))
                    sums[name][slot] += float(made.double().square().sum())
                # Convolutions have many positions an item; the sum is over them all.
                sums[name][2] += output.numel() / output.shape[_feature_axis(module)]
            finally:
                inside = False

        return hook

    for name in names:
        module = _linear_module(original, name)
        if module is not None:
            sums[name] = [0.0, 0.0, 0.0]
            hooks.append(module.register_forward_hook(watch(name, module)))
    rows = as_windows(windows, masked=is_masked(original))
    order = range(len(rows))
    try:
        with evaluating(original):
            for i in order if progress is None else progress(order, "layer errors"):
                tokens = torch.from_numpy(np.ascontiguousarray(rows.tokens[i : i + 1]))
                original(input_ids=tokens.to(original.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [
        {
            "name": name,
            "measured_output_error": error / max(count, 1.0),
            "relative_output_error": error / power if power else 0.0,
        }
        for name, (error, power, count) in sums.items()
    ]


def layer_kl(
    original: Any,
    compressed: Any,
    windows: Windows | NDArray[np.int64],
    names: Sequence[str],
    *,
    limit: int | None = None,
    window_limit: int | None = 2,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """KL of the model with one tensor compressed and all others original.

    Slow: one pass over the windows per tensor.

    Parameters
    ----------
    original : torch module
    compressed : torch module, or mapping of tensor name to decoded weight as stored
    windows : Windows or int64 (count, window)
    names : tensors; ``name[index]`` is a slice along the first axis
    limit : int, optional
        At most this many tensors, spread evenly over `names`.
    window_limit : int, optional
        At most this many windows, spread evenly over the text; None for all.

    Returns
    -------
    list of dict
        `name`, `measured_nats` per token, `measured_nats_stderr` (tokens as independent),
        `tokens`. A tensor that the loaded model does not have under its name (checkpoints whose
        experts are fused at load) has None for `measured_nats` and a `note`.
    """
    from torch.func import functional_call

    masked = is_masked(original)
    rows = as_windows(windows, masked)
    rows = rows[_spread(len(rows), window_limit)]
    chosen = [names[i] for i in _spread(len(names), limit)]
    present = [name for name in chosen if _has(original, name.partition("[")[0])]
    values: dict[str, list[NDArray[np.float64]]] = {name: [] for name in present}

    class Swapped:
        """The original as `scored_logits` sees a model, one tensor replaced."""

        device, forward = original.device, original.forward

        def __init__(self, tensor: str, value: Any) -> None:
            self.replaced = {tensor: value}

        def __call__(self, **inputs: Any) -> Any:
            return functional_call(original, self.replaced, (), inputs)

    order = range(len(rows))
    with evaluating(original):
        for i in order if progress is None else progress(order, "layer by layer"):
            before = scored_logits(original, rows, i, masked)
            for name in present:
                swapped = Swapped(*_replacement(original, compressed, name))
                _, kl = mean_divergence(before, scored_logits(swapped, rows, i, masked))
                values[name].append(kl)
    return [
        _kl_row(name, np.concatenate(values[name]))
        if name in values
        else {"name": name, "measured_nats": None, "note": "not a tensor of the loaded model"}
        for name in chosen
    ]


def weight_of(compressed: Any, name: str, like: Any) -> Any:
    """The compressed tensor of this name, with the dtype, shape and device of `like`."""
    import torch

    if isinstance(compressed, Mapping):
        value = compressed[name] if name in compressed else None
    else:
        whole, _, index = name.partition("[")
        value = dict(compressed.named_parameters(remove_duplicate=False)).get(whole)
        value = value[int(index[:-1])] if value is not None and index else value
    if value is None:
        raise WaterfillError(
            f"the compressed model has no plain tensor {name}; pass decoded arrays instead"
        )
    tensor = torch.as_tensor(value)
    if tuple(tensor.shape) != tuple(like.shape):
        raise WaterfillError(
            f"{name} is {tuple(tensor.shape)} compressed, {tuple(like.shape)} originally"
        )
    return tensor.detach().to(device=like.device, dtype=like.dtype)


def _replacement(original: Any, compressed: Any, name: str) -> tuple[str, Any]:
    """(parameter name, its value with this tensor, or slice of a tensor, compressed)."""
    tensor, _, index = name.partition("[")
    full = _full_name(original, tensor)
    parameter = original.get_parameter(full).detach()
    if not index:
        return full, weight_of(compressed, name, parameter)
    value = parameter.clone()
    value[int(index[:-1])] = weight_of(compressed, name, value[int(index[:-1])])
    return full, value


def _full_name(model: Any, name: str) -> str:
    """The parameter's name in the model; checkpoints of a bare trunk lack its prefix."""
    for full in (name, f"{model.base_model_prefix}.{name}"):
        try:
            model.get_parameter(full)
        except AttributeError:
            continue
        return full
    raise WaterfillError(f"the original model has no tensor {name}")


def _has(model: Any, name: str) -> bool:
    try:
        _full_name(model, name)
    except WaterfillError:
        return False
    return True


def _linear_module(model: Any, name: str) -> Any:
    """The module whose output is linear in this weight, or None."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if not name.endswith(".weight"):
        return None
    owner = _full_name(model, name).removesuffix(".weight")
    module = model.get_submodule(owner)
    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return module if isinstance(module, kinds) else None


def _feature_axis(module: Any) -> int:
    return 1 if type(module).__name__ in ("Conv1d", "Conv2d", "Conv3d") else -1


def _spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` indices, evenly over range(count)."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted({int(i) for i in np.linspace(0, count - 1, max(limit, 1))})


def _kl_row(name: str, kl: NDArray[np.float64]) -> dict[str, Any]:
    error = float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else 0.0
    return {
        "name": name,
        "measured_nats": float(kl.mean()),
        "measured_nats_stderr": error,
        "tokens": len(kl),
    }
