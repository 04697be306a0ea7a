"""What a model does between its matrix products, by the kernels where they do the same.

For one token, torch's attention of a single query and norms of seven operations each take as long as
packed products. Attention is swapped by its name in transformers' registry; a norm gets another class,
once random input has shown which formula is its own (`waterfill.runtime.norms`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from waterfill.coding import native
from waterfill.coding.attention import MAX_WIDTH
from waterfill.runtime.cache.held.attending import attend
from waterfill.runtime.cache.held.states import States, dense
from waterfill.runtime.norms import quicken_norm
from waterfill.runtime.weights import KERNEL_DTYPES

__all__ = [
    "ATTENTION",
    "MAX_QUERIES",
    "attention_forward",
    "quicken",
    "standing_in",
    "swap_attention",
]

ATTENTION = "waterfill"  # the name in transformers' registries
NOT_PLAIN = ("softcap", "position_bias", "s_aux")  # attention that is more than softmax of products
MAX_QUERIES = 8  # more are a prompt, which torch reads faster


def quicken(model: Any) -> Any:
    """Let a model compute attention of single tokens, and its norms, by the kernels.

    With many queries, on another device, under autograd, or with anything that the kernels do not
    know, what was there before runs. Without the kernels nothing is changed.

    Parameters
    ----------
    model : transformers.PreTrainedModel, changed in place

    Returns
    -------
    the model
    """
    if native.core() is not None:
        swap_attention(model)
        for module in list(model.modules()):
            quicken_norm(module)
    return model


def swap_attention(model: Any) -> None:
    """Have a model, and all its submodels, look attention up here, where it looks up sdpa now."""
    for config in _configs(model):
        config._attn_implementation = {"": ATTENTION}


@contextlib.contextmanager
def standing_in(attention: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, models whose attention was swapped are given another, of the same arguments."""
    AttentionInterface.register(ATTENTION, attention)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION, attention_forward)


def _configs(model: Any) -> list[Any]:
    """Configurations of all submodels whose attention may be swapped by its name."""
    wholes: list[Any] = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    refused = {id(m.config) for m in wholes if not _swappable(m.__class__)}
    found = {id(m.config): m.config for m in wholes if m.config._attn_implementation == "sdpa"}
    return [config for key, config in found.items() if key not in refused]


@functools.cache
def _swappable(cls: Any) -> bool:
    """Whether a class of models looks attention up, and asks for its name nowhere else."""
    if not cls._can_set_attn_implementation():
        return False
    code = sys.modules[cls.__module__]
    own = getattr(code, "ALL_ATTENTION_FUNCTIONS", None)
    if own is not None and own["sdpa"] is not sdpa_attention_forward:
        return False
    return '_attn_implementation == "sdpa"' not in inspect.getsource(code)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as by transformers' ``sdpa_attention_forward``, that of few queries by the kernel.

    Parameters
    ----------
    query : (batch, heads, queries, d)
    key, value : (batch, shared, keys, d or e); `heads` is a multiple of `shared`
    attention_mask : (batch or 1, heads or 1, queries or 1, keys), bool or to be added

    Returns
    -------
    (batch, queries, heads, e), and None where others return attention's weights
    """
    if isinstance(key, States) and isinstance(value, States) and key.source is value.source:
        return _of_cache(module, query, key, attention_mask, dropout, scaling, **kwargs)
    # A model that has made something else of one of them reads the other as it is.
    key, value = dense(key), dense(value)
    core = native.core()
    shape = _shape(module, query, key, value) if core is not None else None
    if (
        shape is None
        or not _mask_fits(attention_mask, query, shape)
        or dropout
        or any(kwargs.get(name) is not None for name in NOT_PLAIN)
        or kwargs.get("output_attentions")
    ):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    batch, heads, _, queries, keys, d, e = shape
    mask, strides, boolean = 0, (0, 0, 0, 0), False
    if attention_mask is not None:
        mask, boolean = attention_mask.data_ptr(), attention_mask.dtype == torch.bool
        strides = attention_mask.expand(batch, heads, queries, keys).stride()  # type: ignore[assignment]
    out = query.new_empty((batch, queries, heads, e))
    assert core is not None
    core.attend(
        shape, KERNEL_DTYPES[query.dtype],
        query.data_ptr(), query.stride(), key.data_ptr(), key.stride(),
        value.data_ptr(), value.stride(), mask, strides, boolean,
        d**-0.5 if scaling is None else scaling, out.data_ptr(), native.threads(),
    )  # fmt: skip
    return out, None


def _of_cache(
    module: nn.Module,
    query: torch.Tensor,
    key: States,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a cache of this package, which then remembers the new tokens."""
    view = key.source
    plain = not view.runs or dropout or any(kwargs.get(name) is not None for name in NOT_PLAIN)
    if plain or kwargs.get("output_attentions"):
        out, _ = attention_forward(
            module, query, *view.dense(), attention_mask, dropout, scaling, **kwargs
        )
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attend(view, query, attention_mask, scale)
    positions = kwargs.get("position_ids")
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != query.shape[2]):
        positions = None
    plain_scale = query.shape[-1] ** -0.5
    if scaling is not None and scaling != plain_scale:
        query = query * (scaling / plain_scale)
    view.commit(query, positions)
    return out, None


def _shape(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """Batch, heads, key heads, queries, keys, widths of a key and a value; None for other tensors than the kernel's."""
    batch, heads, queries, d = q.shape
    groups, shared, keys, e = v.shape
    if (
        0 < queries <= MAX_QUERIES
        and k.shape == (batch, shared, keys, d)
        and groups == batch > 0
        and heads == shared * getattr(module, "num_key_value_groups", 1) > 0
        and 0 < d <= MAX_WIDTH
        and 0 < e <= MAX_WIDTH
        and keys > 0
        and type(q) is torch.Tensor
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and q.dtype in KERNEL_DTYPES
        and k.dtype == v.dtype == q.dtype
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and not (
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        )
        and not torch.compiler.is_compiling()
    ):
        return batch, heads, shared, queries, keys, d, e
    return None


def _mask_fits(mask: torch.Tensor | None, q: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Without a mask several queries may mean a causal one, and only one query sees every key."""
    batch, heads, _, queries, keys, *_ = shape
    if mask is None:
        return queries == 1
    return (
        mask.dim() == 4
        and mask.is_cpu
        and mask.dtype in (torch.bool, q.dtype)
        and mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, heads)
        and mask.shape[2] in (1, queries)
        and mask.shape[3] == keys
        and not (mask.requires_grad and torch.is_grad_enabled())
    )


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
