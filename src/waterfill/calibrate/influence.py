"""How much each block changes what passes through it: layer input modification."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity

from waterfill.calibrate.loader import Loader
from waterfill.calibrate.passes import model_inputs
from waterfill.calibrate.stream import block_names, build_skeleton, install_doors
from waterfill.calibrate.watch import Watch
from waterfill.sources.base import Source

__all__ = ["influence"]


def influence(source: Source, ids: NDArray[np.int64]) -> dict[str, float]:
    """1 minus the cosine between input and output of the block that a tensor is in.

    The mean over tokens (LIM, Dumitru et al. 2024, arXiv 2406.17415); a block's weights are in memory
    only while it runs.

    Parameters
    ----------
    ids : int64 (windows, window)

    Returns
    -------
    dict
        Tensor of the checkpoint -> 0 (the block changes nothing) to 2; those outside of blocks are
        not in it, nor are blocks whose output is of another shape than their input.
    """
    model = build_skeleton(source)
    loader = Loader(model, source)
    install_doors(loader, Watch(), lambda: False, lambda _: None)
    sums: dict[str, list[float]] = {}
    for block in block_names(model):
        module: Any = model.get_submodule(block)
        module.register_forward_hook(
            lambda _, args, kwargs, out, block=block: _note(sums, block, args, kwargs, out),
            with_kwargs=True,
        )
    for row in ids:
        with torch.no_grad():
            model(**model_inputs(model, row[None]))
    found = {}
    for job in loader.all_jobs:
        for block, (total, count) in sums.items():
            if any(name.startswith(block + ".") for name in job.outputs):
                found.update(dict.fromkeys(job.files, total / count))
    return found


def _note(
    sums: dict[str, list[float]], block: str, args: Any, kwargs: dict[str, Any], out: Any
) -> None:
    given = args[0] if args else kwargs.get("hidden_states")
    made = out[0] if isinstance(out, (tuple, list)) else out
    if not (isinstance(given, torch.Tensor) and isinstance(made, torch.Tensor)):
        return
    if given.shape == made.shape and given.is_floating_point():
        cosine = cosine_similarity(given.float(), made.float(), dim=-1)
        known = sums.setdefault(block, [0.0, 0])
        known[0] += float((1 - cosine).sum(dtype=torch.float64))
        known[1] += cosine.numel()
