"""Encode once more, each block aimed at what the ones before it have lost; keep it if it is better."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from waterfill.calibrate import Statistics
from waterfill.coding.native import return_freed_memory
from waterfill.container import FILE_NAME, Reader
from waterfill.pipeline.encoding import Encoder
from waterfill.pipeline.remeasuring import Decoded, keep_better
from waterfill.plan.fill import Coded, refill
from waterfill.registry import make_codec
from waterfill.types import Array, Floats

MOST_BITS = 6.0  # of a tensor: finer ones lose too little for others to make up for


class _SoFar(Decoded):
    """The draft, but for tensors that have been encoded anew."""

    def __init__(self, reader: Reader, encoder: Encoder, coded: Mapping[str, Coded]) -> None:
        super().__init__(reader, encoder.priced.source)
        self._encoder, self._coded = encoder, coded
        self.moved: set[str] = set()

    def read(self, name: str) -> Array:
        if name in self.moved:
            return self._encoder.decoded(name, self._coded[name].point)
        return super().read(name)


def propagate_losses(
    encoder: Encoder,
    coded: Mapping[str, Coded],
    budget: int,
    folder: Path,
    before: dict[str, float],
) -> dict[str, float]:
    """Aim each matrix at what is missing in front of it, and replace the file if it got better.

    Parameters
    ----------
    encoder : that made the file in `folder`
    coded : what was chosen for it
    budget : bytes of the file
    folder : of the artifact in the making
    before : what `remeasure` says of the file in it

    Returns
    -------
    dict
        What `remeasure` says of the file that stays.

    Raises
    ------
    WaterfillError
        Where the model cannot be walked; the file is as it was.
    """
    priced, file = encoder.priced, folder / FILE_NAME
    texts = priced.statistics.rest
    movable = _movable(priced.statistics, coded)
    if not before or texts is None or not movable:
        return before
    from waterfill.calibrate.propagation import propagate

    infos = priced.infos
    return_freed_memory()

    def matrix(name: str) -> Floats:
        return infos[name].matrix(priced.source.read(name))

    def move(name: str, factor: Floats, share: float) -> None:
        moved = matrix(name)
        moved += share * (moved @ factor)
        encoder.aim(name, infos[name].unmatrix(moved))

    def settle(name: str) -> None:
        encoder.one(name, coded[name].point)
        so_far.moved.add(name)

    with Reader(file) as reader:
        so_far = _SoFar(reader, encoder, coded)
        step = lambda done, total: encoder.progress("propagating", done, total)  # noqa: E731
        propagate(priced.source, so_far, texts, movable, matrix, move, settle, step)
    if not so_far.moved:
        return before
    again = refill(priced.curves, coded, budget, encoder.one, encoder.nbytes)
    return keep_better(encoder, again, budget, folder, before)


def _movable(statistics: Statistics, coded: Mapping[str, Coded]) -> set[str]:
    repeated = {info.group for info in statistics.infos.values()}
    return {
        name
        for name, one in coded.items()
        if (info := statistics.infos[name]).index is None
        and statistics.is_weighted(name)
        and name not in repeated
        and make_codec(one.point.spec).lossy
        and 8 * one.nbytes < MOST_BITS * info.size
    }
