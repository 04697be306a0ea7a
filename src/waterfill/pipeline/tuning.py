"""Tune the finished file's codes and numbers on the calibration text; keep it if it is better."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from waterfill.coding.native import return_freed_memory
from waterfill.container import FILE_NAME, Reader, describe, file_nbytes, write
from waterfill.pipeline.planning import Priced, Progress, quiet, read
from waterfill.pipeline.remeasuring import Decoded, remeasure
from waterfill.registry import make_codec
from waterfill.runtime.arrays import damage_of
from waterfill.types import Encoded, Tunable, WaterfillError, Weighting

METHODS = ("pv", "v", "ste")
TUNE_STEPS = 64
SLOPE = 2 * math.log(2)  # by so much of itself the harm falls for a bit more of every weight


def tune_file(
    priced: Priced,
    budget: int,
    folder: Path,
    before: dict[str, float],
    method: str,
    steps: int,
    progress: Progress = quiet,
) -> tuple[dict[str, float], list[str]]:
    """Tune what can be, and replace the file if it got better and is still within the budget.

    Parameters
    ----------
    priced : the model
    budget : bytes of the file
    folder : of the artifact in the making
    before : what `remeasure` says of the file in it
    method : one of `METHODS`
    steps : of tuning

    Returns
    -------
    What `remeasure` says of the file that stays, with ``kl_nats_untuned`` if it is another one; and
    why it was not tuned, if so.
    """
    if not before:
        return before, ["not tuned: the file's harm could not be measured, or it has none"]
    file = folder / FILE_NAME
    second = folder / f"{FILE_NAME}.tuned"
    try:
        with Reader(file) as reader:
            tuned = _tune(reader, priced, before["kl_nats_calibration"], method, steps, progress)
            return_freed_memory()
            _rewrite(reader, priced, tuned, second, budget)
        after = remeasure(priced.source, priced.statistics, second, progress)
        if after["kl_nats_calibration"] >= before["kl_nats_calibration"]:
            return before, ["not tuned: text set aside was none the better for it"]
        second.replace(file)
    except WaterfillError as error:
        return before, [f"not tuned: {error}"]
    finally:
        second.unlink(missing_ok=True)  # an artifact holds one weights file, whatever happens
    return {**after, "kl_nats_untuned": before["kl_nats_calibration"]}, []


def _tune(
    reader: Reader, priced: Priced, nats: float, method: str, steps: int, progress: Progress
) -> dict[str, Tunable]:
    """Items that have changed."""
    from waterfill.calibrate.tuning import Tuning, tune

    statistics = priced.statistics
    tunables = dict(_tunables(reader))
    if not tunables:
        raise WaterfillError(
            "no tensor has a codec with codes and scales to tune; choose one with --codec, such as "
            "'*=integer'"
        )
    if statistics.rest is None:
        raise WaterfillError("the statistics hold no text to tune on; calibrate again")
    return_freed_memory()
    return tune(
        priced.source,
        Decoded(reader, priced.source),
        statistics.rest,
        statistics.infos,
        tunables,
        statistics.weighting,
        Tuning(method, steps, price=SLOPE * nats / priced.params),
        lambda done, total: progress("tuning", done, total),
    )


def _tunables(reader: Reader) -> Iterator[tuple[str, Tunable]]:
    for name, entry in reader.entries.items():
        if not entry.info.group:
            with damage_of(name):
                found = make_codec(entry.spec).tunable(reader.read(name))
            if found is not None:
                yield name, found


def _rewrite(
    reader: Reader, priced: Priced, tuned: Mapping[str, Tunable], path: Path, budget: int
) -> None:
    """Write the file anew, with as many tuned tensors in place of theirs as the budget allows."""
    made = {name: _retuned(reader.read(name), one, priced) for name, one in tuned.items()}
    plain = {name: describe(_plain(reader, name), e.note) for name, e in reader.entries.items()}
    while made:
        # Notes and checksums are other ones, and take a few bytes more or less: in a file that is
        # full to the byte, a figure is rounded until all fits.
        for digits in (4, 3, 2, 1):
            ours = {
                name: describe(one, _note(reader, one, n, digits))
                for name, (one, n) in made.items()
            }
            described = list({**plain, **ours}.values())
            excess = file_nbytes(described, reader.about) - budget
            if excess <= 0:
                every = (made[n][0] if n in made else _plain(reader, n) for n in reader.entries)
                write(path, described, (one.parts.values() for one in every), reader.about)
                return
        # Rarer codes take more bytes where codes are entropy coded: some tensor stays as it was.
        grown = {name: one.nbytes - reader.entries[name].nbytes for name, (one, _) in made.items()}
        enough = [name for name, more in grown.items() if more >= excess]
        del made[
            min(enough or [max(grown, key=grown.__getitem__)], key=lambda n: priced.infos[n].size)
        ]
    raise WaterfillError(f"tuned tensors do not fit into {budget:,} bytes")


def _plain(reader: Reader, name: str) -> Encoded:
    entry = reader.entries[name]
    return Encoded(entry.spec, entry.info, {}, {}) if entry.info.group else reader.read(name)


def _note(reader: Reader, one: Encoded, nats: float, digits: int) -> dict[str, Any]:
    return {**reader.entries[one.info.name].note, "nats": float(f"{nats:.{digits}g}")}


def _retuned(one: Encoded, tuned: Tunable, priced: Priced) -> tuple[Encoded, float]:
    """The tensor coded anew, and its predicted nats."""
    codec = make_codec(one.spec)
    made = dataclasses.replace(one, parts=codec.retuned(tuned, one))
    weighting = priced.statistics.weighting(one.info.name) or Weighting()
    original = one.info.matrix(read(priced.source, one.info))
    decoded = one.info.matrix(codec.decode(made.parts, made.extra, one.info))
    return made, weighting.distortion(original, decoded)
