"""calibrate(): text through the model, block by block; leaves Statistics on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from waterfill.calibrate.assemble import Evidence
from waterfill.calibrate.differences import Trial, scale_of
from waterfill.calibrate.finish import Rescale, finish, save
from waterfill.calibrate.loader import Loader, load_all
from waterfill.calibrate.memory import remedy_for_memory, tokens_that_fit
from waterfill.calibrate.names import place
from waterfill.calibrate.passes import NoGradient, Passes
from waterfill.calibrate.statistics import SAMPLE, Statistics
from waterfill.calibrate.stream import block_names, build_skeleton
from waterfill.calibrate.sums import Sums, open_sums
from waterfill.calibrate.text import (
    Windows,
    default_text,
    default_window,
    read_windows,
    write_itself,
)
from waterfill.coding.native import return_freed_memory
from waterfill.sources.base import Source
from waterfill.types import TensorInfo, WaterfillError, Weighting, to_float32

__all__ = ["METHODS", "calibrate"]

METHODS = ("fisher", "differences", "none")
BATCH_TOKENS = 4096
# Logits of a batch, in numbers: 0.5 GB as float32, and a few times that in the backward pass.
BATCH_LOGITS = 1 << 27
# What the backward pass keeps between blocks, in bytes: this, or a share of the model if that is
# more. Smaller batches read the weights more often; that is cheap beside the products they make.
KEPT_NBYTES = 64 << 20

SAMPLE_TOKENS = 4096  # kept with the statistics, for a finished file to be measured on
SAMPLE_SHARE = 8  # or one token in so many, if that is less

Progress = Callable[[int, int, str], None]


@remedy_for_memory()
def calibrate(
    source: Source,
    folder: Path | str,
    texts: Sequence[Path | str] | Literal["self"] | None = None,
    tokens: int = 32768,
    window: int | None = None,
    method: str = "fisher",
    seed: int = 0,
    progress: Progress | None = None,
) -> Statistics:
    """Learn what each weight of a model sees, and how much it matters.

    An interrupted run is continued by the same call; a finished one is opened.

    Parameters
    ----------
    source : the model
    folder : where to leave the statistics
    texts : files; None for the text of the package; "self" for text the model writes itself
    tokens : how many to run
    window : tokens per window; default 512, or what the model can take
    method : fisher (one backward pass), differences (noise in one tensor at a time), none
    seed : of sampled labels, of the noise, and of text from the model itself
    progress : called with (done, total, what), in blocks

    Returns
    -------
    Statistics
    """
    if method not in METHODS:
        raise WaterfillError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if tokens < 1:
        raise WaterfillError("calibration needs at least one token")
    return_freed_memory()
    folder = Path(folder)
    fingerprint = source.fingerprint()
    model = build_skeleton(source)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    size = window or default_window(longest)
    if longest and size > longest:
        raise WaterfillError(f"{source.name} takes {longest} tokens at once, not {size}")
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if texts == "self":
        writer = build_skeleton(source)
        load_all(Loader(writer, source))
        windows = write_itself(writer, tokens, size, seed)
        del writer
    else:
        chosen = [default_text()] if texts is None else [Path(t) for t in texts]
        if not chosen:
            raise WaterfillError("name at least one text")
        windows = read_windows(source, chosen, tokens, size, vocabulary)
    protocol = {
        "texts": windows.texts,
        "tokens": int(windows.ids.size),
        "window": int(windows.ids.shape[1]),
        "bos": windows.bos,
        "method": method,
        "seed": seed,
        "asked": {"tokens": tokens, "window": size, "method": method},
    }
    if (folder / "statistics.json").is_file():
        done = Statistics.open(folder)
        if done.source_fingerprint == fingerprint and done.protocol["asked"] == protocol["asked"]:
            if all(done.protocol[k] == protocol[k] for k in ("texts", "tokens", "window", "seed")):
                return done
    sums = open_sums(folder / "partial", {**protocol, "fingerprint": fingerprint})
    loader = Loader(model, source)
    notes = list(windows.notes)
    gradients = method == "fisher"
    room = min(
        BATCH_TOKENS,
        BATCH_LOGITS // (vocabulary or 1),
        tokens_that_fit(model, KEPT_NBYTES, max(len(block_names(model)), 1)),
    )
    per_batch = max(1, room // size)
    batches = np.array_split(windows.ids, -(-len(windows.ids) // per_batch))
    try:
        note = _run(loader, sums, batches, gradients, seed, progress)
    except NoGradient as error:
        notes.append(
            f"{type(model).__name__} has no sensitivities: {error}; all outputs weigh alike"
        )
        gradients, protocol["method"] = False, "none"
        model = build_skeleton(source)
        loader = Loader(model, source)
        shutil.rmtree(sums.folder)
        sums = open_sums(folder / "partial", {**protocol, "fingerprint": fingerprint})
        note = _run(loader, sums, batches, gradients, seed, progress)
    notes += [note] if note else []
    evidence = Evidence(sums, int(windows.ids.size), gradients)
    rescale = _trials(source, windows, seed, progress) if method == "differences" else None
    save(_kept(windows.ids), folder / SAMPLE)
    done = finish(loader, folder, evidence, protocol, notes, fingerprint, rescale)
    shutil.rmtree(sums.folder)
    return done


def _kept(ids: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """A few windows from all over the text, to measure a finished file on; and all others."""
    most = min(SAMPLE_TOKENS, ids.size // SAMPLE_SHARE)
    count = max(1, most // ids.shape[1])
    chosen = np.linspace(0, len(ids) - 1, count).astype(np.int64)
    return {"ids": np.ascontiguousarray(ids[chosen]), "rest": np.delete(ids, chosen, axis=0)}


def _run(
    loader: Loader,
    sums: Sums,
    batches: list[Any],
    gradients: bool,
    seed: int,
    progress: Progress | None,
) -> str:
    """Run the batches that are not in yet; a note on the loss, or ""."""
    each = len(block_names(loader.model)) * (2 if gradients else 1)
    total = each * len(batches)
    state = {"done": sums.batches * each}

    def step(name: str) -> None:
        state["done"] += 1
        if progress is not None:
            progress(min(state["done"], total), total, name)

    passes = Passes(loader, sums, gradients, seed, step)
    for number in range(sums.batches, len(batches)):
        passes.run(number, batches[number])
        state["done"] = each * (number + 1)
    return passes.note


def _trials(source: Source, windows: Windows, seed: int, progress: Progress | None) -> Rescale:
    """For method="differences": the whole model in memory, one tensor disturbed at a time."""
    model = build_skeleton(source)
    loader = Loader(model, source)
    shapes = {name: shape for name, (_, shape) in source.tensors.items()}
    plain = {job.files[0]: job.key for job in loader.all_jobs if job.converter is None}
    trial = Trial(
        model, load_all(loader), place(loader.all_jobs, shapes, model), plain, windows.ids, seed
    )

    def rescale(items: list[tuple[str, int | None]], info: TensorInfo, first: Weighting) -> float:
        if progress is not None:
            progress(list(shapes).index(info.tensor), len(shapes), info.name)
        name, index = items[0]
        bits = source.read(name) if index is None else source.read_slice(name, index)
        size = float(to_float32(bits, info.dtype).std())
        return scale_of(lambda noise: trial.kl(items, noise), info, first, trial.generator, size)

    return rescale
