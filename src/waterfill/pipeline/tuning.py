"""Tune the finished file's codes and numbers on the calibration text; keep it if it is better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from waterfill.coding.native import return_freed_memory
from waterfill.container import FILE_NAME, Reader, describe, file_nbytes, write
from waterfill.pipeline.planning import Priced, Progress, quiet, read
from waterfill.pipeline.remeasuring import Decoded, remeasure
from waterfill.registry import make_codec
from waterfill.types import Encoded, Tunable, WaterfillError, Weighting

METHODS = ("pv",)
TUNE_STEPS = 64


def tune_file(
    priced: Priced,
    budget: int,
    folder: Path,
    before: dict[str, float],
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
            tuned = _tune(reader, priced, steps, progress)
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


def _tune(reader: Reader, priced: Priced, steps: int, progress: Progress) -> dict[str, Tunable]:
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
        Tuning(steps),
        lambda done, total: progress("tuning", done, total),
    )


def _tunables(reader: Reader) -> Iterator[tuple[str, Tunable]]:
    for name, entry in reader.entries.items():
        if not entry.info.group:
            encoded = reader.read(name)
            found = make_codec(entry.spec).tunable(encoded.parts, encoded.extra, entry.info)
            if found is not None:
                yield name, found


def _rewrite(
    reader: Reader, priced: Priced, tuned: Mapping[str, Tunable], path: Path, budget: int
) -> None:
    """Write the file anew with tuned tensors in place of theirs; WaterfillError if it is too large."""
    made = {name: _retuned(reader.read(name), one, priced) for name, one in tuned.items()}

    def one(name: str) -> tuple[Encoded, float]:
        entry = reader.entries[name]
        if name in made:
            return made[name]
        encoded = Encoded(entry.spec, entry.info, {}, {}) if entry.info.group else reader.read(name)
        return encoded, entry.note.get("nats", 0.0)

    # Notes and checksums are other ones, and take a few bytes more or less: in a file that is full
    # to the byte, a figure is rounded until all fits.
    for digits in (4, 3, 2, 1):
        described = [
            describe(one(name)[0], _note(entry.note, one(name)[1], digits))
            for name, entry in reader.entries.items()
        ]
        nbytes = file_nbytes(described, reader.about)
        if nbytes <= budget:
            write(path, described, (one(n)[0].parts.values() for n in reader.entries), reader.about)
            return
    raise WaterfillError(f"the tuned file takes {nbytes:,} bytes, and {budget:,} are allowed")


def _note(note: Mapping[str, Any], nats: float, digits: int) -> dict[str, Any]:
    return {**note, "nats": float(f"{nats:.{digits}g}")} if nats else dict(note)


def _retuned(one: Encoded, tuned: Tunable, priced: Priced) -> tuple[Encoded, float]:
    """The tensor coded anew, and its predicted nats."""
    codec = make_codec(one.spec)
    parts, extra = codec.retuned(tuned, one.parts, one.extra, one.info)
    weighting = priced.statistics.weighting(one.info.name) or Weighting()
    original = one.info.matrix(read(priced.source, one.info))
    decoded = one.info.matrix(codec.decode(parts, extra, one.info))
    return Encoded(one.spec, one.info, parts, extra), weighting.distortion(original, decoded)
