"""The whole chain: calibrate -> price -> plan -> encode -> verify, resumable.

Every step leaves its product in a work folder beside the output: statistics, prices, encoded
pieces. A run that was interrupted finds them again; a run that succeeds removes them.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from waterfill import __version__
from waterfill.coding.native import return_freed_memory
from waterfill.container import FILE_NAME, Reader
from waterfill.pipeline.encoding import Encoder, encode
from waterfill.pipeline.evolving import MINUTES, evolve
from waterfill.pipeline.exact import compress_exact
from waterfill.pipeline.planning import (
    Priced,
    Progress,
    about,
    predicted_curve,
    prepare,
    quiet,
)
from waterfill.pipeline.plans import check_fits, read_plan, statistics_of
from waterfill.pipeline.preparing import check_early, statistics_for, warnings_of
from waterfill.pipeline.propagating import propagate_losses
from waterfill.pipeline.remeasuring import remeasure
from waterfill.pipeline.tuning import METHODS, TUNE_STEPS, tune_file
from waterfill.plan.allocation import DEFAULT, find_allocator
from waterfill.plan.budget import budget_nbytes
from waterfill.plan.fill import Coded
from waterfill.plan.price import Rules
from waterfill.registry import make_codec
from waterfill.runtime import artifact
from waterfill.runtime.pieces import Pieces
from waterfill.sources import open_source
from waterfill.types import Record, SpecError, WaterfillError


def compress(
    model: str | Path | Any,
    out: str | Path,
    *,
    size: str | int | None = None,
    bits: float | None = None,
    ratio: str | float | None = None,
    plan: str | Path | None = None,
    lossless: bool = False,
    keep: Sequence[str] = (),
    codec: Mapping[str, str] | None = None,
    allocate: str | None = None,
    minutes: float = MINUTES,
    calibration: str | Path | Sequence[str | Path] | None = None,
    tokens: int = 32768,
    propagate: bool = True,
    tune: str | None = None,
    tune_steps: int = TUNE_STEPS,
    force: bool = False,
    trust_remote_code: bool = False,
    command: str = "waterfill.compress(...)",
    progress: Progress = quiet,
) -> Record:
    """Compress a model to a folder whose weights file has the size you name, and not a byte more.

    Parameters
    ----------
    model : folder in Hugging Face layout, hub id, ``"demo"``, or a transformers model in memory
    out : folder to make
    size, bits, ratio : the budget, exactly one of them: bytes (``"250MB"``), average bits per weight
        with every byte counted, or the share of the original (``"20%"``)
    plan : instead of a budget: a file that ``waterfill plan`` wrote, or an artifact. Its choices are
        kept to, and its budget. Statistics are those it was made from, unless `calibration` is given.
    lossless : instead of a budget: keep every bit, of any safetensors checkpoint. Nothing is
        calibrated and torch is not needed; see `waterfill.pipeline.exact`
    keep : globs of tensors to keep exact
    codec : glob -> codec id or specification such as ``"integer:bits=3,group=128"``
    allocate : how the budget is spent over the tensors: ``"hull"`` (the default), or another name of
        `waterfill.plan.allocators`
    minutes : how long an allocator that runs the model may look for a better file
    calibration : text files, a statistics folder, ``"self"``, or None for the packaged text
    tokens : calibration tokens
    propagate : encode a second time, each block aimed at what the ones before it have lost, and
        keep the better of the two files
    tune : ``"pv"`` to go on and better codes and scales together on the calibration text, at the same
        size (docs/tuning.md); ``"v"`` for scales and codebooks alone; ``"ste"`` for straight-through
        estimation. It needs some 20 bytes of memory for each weight, and takes a while
    tune_steps : of tuning, a batch of about 2,048 tokens each; the time it takes goes with them
    force : replace `out` if it exists

    Returns
    -------
    Record

    Raises
    ------
    WaterfillError
        With a message that says what to do; nothing is left at `out`.
    """
    return_freed_memory()
    if tune not in (None, *METHODS) or tune_steps < 1:
        raise SpecError(f"tune is {', '.join(METHODS)}, with one step or more, not {tune!r}")
    out = Path(out)
    artifact.refuse_existing(out, force)
    if lossless:
        choices = {"size": size, "bits": bits, "ratio": ratio, "plan": plan, "keep": keep or None,
                   "codec": codec or None, "allocate": allocate, "calibration": calibration,
                   "tune": tune}  # fmt: skip
        if given := [name for name, value in choices.items() if value is not None]:
            raise SpecError(f"lossless keeps every bit, so {given[0]} has no meaning: leave it out")
        source = open_source(model, trust_remote_code=trust_remote_code, any_files=True)
        return compress_exact(source, out, force=force, command=command, progress=progress)
    source = open_source(model, trust_remote_code=trust_remote_code)
    rules = Rules(tuple(keep), tuple((codec or {}).items()))
    allocator = find_allocator(allocate or DEFAULT)
    saved = None
    if plan is not None:
        if rules != Rules() or any(x is not None for x in (size, bits, ratio, allocate)):
            raise SpecError(
                "a plan has a size, codecs and an allocation of its own: name no others beside it"
            )
        saved = read_plan(Path(plan))
        size, rules = saved.plan.budget_nbytes, saved.rules
        calibration = statistics_of(saved) if calibration is None else calibration
    used = [source.path, *_paths(calibration), None if plan is None else Path(plan)]
    artifact.refuse_existing(out, force, used)
    check_early(source, rules, size=size, bits=bits, ratio=ratio)
    work = out.with_name(out.name + ".work")
    try:
        statistics = statistics_for(source, work, calibration, tokens, progress)
        return_freed_memory()
        priced = prepare(source, statistics, rules, progress=progress)
        budget = budget_nbytes(
            params=priced.params,
            original_nbytes=priced.original_nbytes,
            size=size,
            bits=bits,
            ratio=ratio,
        )
        planned = None
        if saved is not None:
            check_fits(saved, priced)
            planned = saved.plan.choices
            priced = dataclasses.replace(priced, why={**priced.why, **saved.plan.why})
        pieces = Pieces(
            work / "pieces", f"{source.fingerprint()} {statistics.digest} {__version__}"
        )
        with artifact.new_folder(out, force) as folder:
            encoder = Encoder(priced, pieces, progress)
            first = allocator.starts_from or allocator.name
            coded = encode(encoder, budget, folder, planned, first)
            better = None
            if allocator.starts_from:
                better = partial(evolve, allocator, state=work / "search.json", minutes=minutes)
            whole, warnings = _measure(encoder, coded, budget, folder, better, propagate)
            if tune:
                whole, more = tune_file(priced, budget, folder, whole, tune, tune_steps, progress)
                warnings += more
            facts = {"allocate": saved.allocate if saved else allocator.name, "warnings": warnings}
            record = _finish(priced, budget, folder, command, out.name, whole, facts)
    except OSError as error:
        raise artifact.explain(error, out) from error
    shutil.rmtree(work, ignore_errors=True)
    return record


def _paths(calibration: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if calibration is None or calibration == "self":
        return []
    paths = [calibration] if isinstance(calibration, (str, Path)) else calibration
    return [Path(p) for p in paths]


Better = Callable[..., tuple[dict[str, float], Mapping[str, Coded]]]


def _measure(
    encoder: Encoder,
    coded: Mapping[str, Coded],
    budget: int,
    folder: Path,
    better: Better | None,
    propagate: bool,
) -> tuple[dict[str, float], list[str]]:
    """The finished file's harm as a whole, perhaps after it was bettered; and warnings."""
    priced = encoder.priced
    warnings = warnings_of(priced.statistics)
    if all(make_codec(one.point.spec).lossy is False for one in coded.values()):
        return {}, warnings
    whole: dict[str, float] = {}
    try:
        file = folder / FILE_NAME
        whole = remeasure(priced.source, priced.statistics, file, encoder.progress)
    except WaterfillError as error:
        # The file is whole and its predictions stand; what went undone is said.
        if better is None:
            return {}, [*warnings, f"the compressed model was not measured: {error}"]
        raise  # what was asked for cannot be
    if better is not None:
        start = whole
        whole, coded = better(encoder, coded, budget, folder, whole)
        if whole is start:
            warnings = [*warnings, "the search found no better file than the one it started from"]
    try:
        if propagate:
            whole = propagate_losses(encoder, coded, budget, folder, whole)
    except WaterfillError as error:
        undone = f"the compressed model was not encoded a second time: {error}"
        warnings = [*warnings, undone]
    return whole, warnings


def _finish(
    priced: Priced,
    budget: int,
    folder: Path,
    command: str,
    name: str,
    whole: Mapping[str, float],
    more: Mapping[str, Any],
) -> Record:
    """Check the file as written, then put around it what an artifact needs."""
    source = priced.source
    with Reader(folder / FILE_NAME) as reader:
        for _ in reader.verify():
            pass
        rows = artifact.ledger(reader)
        nbytes = reader.nbytes
    predicted = sum(r["predicted_nats"] for r in rows)
    lossless = all(r["predicted_nats"] == 0 for r in rows)
    facts = {
        **about(priced),
        "local": Path(str(source.path)).exists(),
        "command": command,
        "budget_nbytes": budget,
        "original_nbytes": priced.original_nbytes,
        "params": priced.params,
        "lossless": lossless,
        "plan_digest": artifact.plan_digest(rows),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "calibration": dict(priced.statistics.protocol),
        **more,
    }
    record = Record(
        name=name,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / max(priced.params, 1),
        predicted={"kl_nats": predicted, **whole},
        ledger=tuple(rows),
        curve=predicted_curve(priced, budget),
        about=facts,
    )
    artifact.furnish(folder, source, record)
    return record
