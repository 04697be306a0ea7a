"""Price ladders: what each codec would cost, in bytes and nats, for one tensor."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from waterfill.registry import (
    Codec,
    Inner,
    codec_ids,
    find_codec,
    make_codec,
    parse_spec,
    read_spec,
)
from waterfill.types import Array, Floats, Point, SpecError, TensorInfo, Weighting

SAMPLE_WEIGHTS = 1 << 18  # enough for rate and harm to within a few per mille
SAMPLE_ROWS = 128  # at least, so that side information of columns does not swamp the estimate
LIKE = 0.7  # similarity from which on one name may be a slip for another
AUTO = "auto"  # in place of a codec: whichever serves best, of all there are
MARGIN = 1.1  # a codec this much dearer than the others' hull everywhere has no part in it
_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the user fixed by hand.

    Attributes
    ----------
    keep : globs on tensor names that stay exact
    codecs : (glob, text) pairs; text is a codec id, with options or without, or `AUTO`. Options hold
        for every rung of its ladder, so one that the ladder varies pins the codec. The last match
        wins.
    """

    keep: tuple[str, ...] = ()
    codecs: tuple[tuple[str, str], ...] = ()

    def check(self, infos: Mapping[str, TensorInfo], weighted: Mapping[str, bool]) -> None:
        """SpecError for a pattern that matches nothing, or nothing its codec can take."""
        for pattern in [*self.keep, *(glob for glob, _ in self.codecs)]:
            if not fnmatch.filter(infos, pattern):
                raise SpecError(
                    f"the pattern {pattern!r} matches no tensor; {_near(pattern, infos)}"
                )
        for pattern, text in self.codecs:
            if text != AUTO:
                parse_spec(text)
            names = fnmatch.filter(infos, pattern)
            if not any(takes(text, infos[n], weighted[n]) for n in names):
                raise SpecError(
                    f"{pattern}={text}: that codec can take none of the tensors that match"
                )

    def candidates(self, info: TensorInfo, weighted: bool) -> tuple[list[Codec], str]:
        """Codecs to price for a tensor, and why the planner has no choice among them ("" if it has).

        A broad pattern may cover vectors that a codec for matrices cannot take: they stay free.
        """
        if any(fnmatch.fnmatchcase(info.name, glob) for glob in self.keep):
            return _all(info, lossy=False), "kept exact by --keep"
        forced = [t for glob, t in self.codecs if fnmatch.fnmatchcase(info.name, glob)]
        if forced and takes(forced[-1], info, weighted):
            if forced[-1] == AUTO:
                return _all(info, lossy=weighted, usual=False), ""
            rungs = ladder(forced[-1], info)
            # With rungs to choose among the water level decides, as it does where nobody named a
            # codec: the same choices make the same file.
            return rungs, "set by --codec" if len(rungs) == 1 else ""
        return _all(info, lossy=weighted), ""


def _near(pattern: str, infos: Mapping[str, TensorInfo]) -> str:
    """Names like a pattern, in words; as globs, so that forty layers are one name."""
    names = (info.tensor + ("*" if info.index is not None else "") for info in infos.values())
    globs = dict.fromkeys(_LAYER.sub("*", name) for name in names)
    wanted = _LAYER.sub("*", pattern).strip("*.")
    near = []
    for glob in globs:
        parts = glob.split(".")
        # A pattern is mostly of a part of the name.
        runs = [".".join(parts[i:j]) for i, j in itertools.combinations(range(len(parts) + 1), 2)]
        score = max(difflib.SequenceMatcher(None, wanted, run).ratio() for run in runs)
        near.append((-score, glob))
    best = [glob for score, glob in sorted(near)[:3] if score <= -LIKE]
    if best:
        return f"did you mean {' or '.join(best)}?"
    return f"there are {', '.join(list(globs)[:3])}{', ...' if len(globs) > 3 else ''}"


def takes(text: str, info: TensorInfo, weighted: bool) -> bool:
    """Whether a codec, or a setting of one, is for such a tensor."""
    if text == AUTO:
        return True
    cls = find_codec(text.strip().partition(":")[0])
    return (weighted or not cls.lossy) and next(iter(cls.ladder(info)), None) is not None


def ladder(text: str, info: TensorInfo) -> list[Codec]:
    """The rungs of a codec with the options that the text names; equal ones once.

    A codec that it names inside another is a ladder too, of which each rung is tried.
    """
    spec = read_spec(text)
    options = [
        [(key, Inner(rung)) for rung in ladder(value, info)]
        if isinstance(value, Inner)
        else [(key, value)]
        for key, value in spec.config.items()
    ]
    rungs = find_codec(spec.id).ladder(info)
    each = itertools.product(rungs, *options)
    return list(dict.fromkeys(_with_options(rung, dict(chosen)) for rung, *chosen in each))


def _with_options(rung: Codec, options: Mapping[str, Any]) -> Codec:
    return make_codec(dataclasses.replace(rung.spec, config={**rung.spec.config, **options}))


def _all(info: TensorInfo, lossy: bool, usual: bool = True) -> list[Codec]:
    classes = [cls for cls in map(find_codec, codec_ids()) if cls.usual or not usual]
    return [rung for cls in classes if lossy or not cls.lossy for rung in cls.ladder(info)]


def price(
    bits: Array, info: TensorInfo, weighting: Weighting | None, codecs: Sequence[Codec]
) -> list[Point]:
    """Encode a tensor at every rung and measure bytes and nats.

    Tall matrices are priced on a sample of their rows: rate and distortion are averages over
    rows, and the sample is spread evenly.

    Parameters
    ----------
    bits : the stored array, shape `info.shape`
    weighting : None where no model of harm exists; distortion is then counted as zero, and only
        lossless codecs make sense.
    """
    points: dict[Codec, Point] = {}
    samples: dict[int, _Sample] = {}
    for rung in reversed(codecs):
        if rung in points:
            continue  # a prefix of one that was encoded
        taken = _rows(info, rung.fair_rows)
        if taken not in samples:
            samples[taken] = _sample(bits, info, weighting, taken)
        at = samples[taken]
        parts, extra = rung.encode(at.bits, at.info, at.weighting or Weighting())
        nats = 0.0
        if rung.lossy and at.weighting is not None and at.exact is not None:
            decoded = at.info.matrix(rung.decode(parts, extra, at.info))
            nats = at.weighting.distortion(at.exact, decoded)
        sizes = {name: len(part) for name, part in parts.items()}
        points[rung] = _point(rung, sizes, nats, at.share)
        for count, (nbytes, harm) in enumerate(rung.layers(sizes, extra, at.info) or ()):
            if count:
                kept = rung.truncate(sizes, extra, at.info, nbytes)
                points.setdefault(rung.at(count), _point(rung.at(count), kept, harm, at.share))
    return [points[rung] for rung in codecs]


def _point(rung: Codec, sizes: Mapping[str, int], nats: float, share: float) -> Point:
    """What bytes of parts and nats of some of the rows come to for all of them."""
    once = sum(sizes.get(name, 0) for name in rung.shared)
    return Point((sum(sizes.values()) - once) / share + once, nats / share, rung.spec)


@dataclasses.dataclass(frozen=True, eq=False)
class _Sample:
    """Some rows of a tensor; `share` of all, and `exact` their weights where harm is known."""

    bits: Array
    info: TensorInfo
    weighting: Weighting | None
    exact: Floats | None
    share: float


def _rows(info: TensorInfo, least: int) -> int:
    """How many rows stand for a tensor: all of them where half would have to."""
    m, n = info.matrix_shape
    wanted = max(SAMPLE_ROWS, SAMPLE_WEIGHTS // max(n, 1), least)
    return wanted if m >= 2 * wanted and len(info.shape) >= 2 else m


def _sample(bits: Array, info: TensorInfo, weighting: Weighting | None, count: int) -> _Sample:
    m = info.matrix_shape[0]
    if count < m:
        rows = np.linspace(0, m - 1, count).astype(np.int64)
        bits = np.take(bits, rows, axis=1 if info.transposed else 0)
        info = dataclasses.replace(info, shape=bits.shape)
        if weighting is not None and not isinstance(weighting.row_weights, float):
            weighting = Weighting(weighting.second_moment, weighting.row_weights[rows])
    exact = info.matrix(bits) if weighting is not None else None
    return _Sample(bits, info, weighting, exact, count / m if m else 1.0)


def contenders(points: Sequence[Point]) -> set[str]:
    """Ids of the codecs with a point near the lower hull of all the others' points.

    Tensors of one kind and shape are alike in this: price every codec on the first of them, and
    only the contenders on the rest.
    """
    found = set()
    for codec_id in {p.spec.id for p in points}:
        others = sorted((p for p in points if p.spec.id != codec_id), key=lambda p: p.nbytes)
        mine = [p for p in points if p.spec.id == codec_id]
        if not others or any(
            p.nbytes < MARGIN * _bytes_at(others, p.distortion_nats) for p in mine
        ):
            found.add(codec_id)
    return found


def _bytes_at(points: Sequence[Point], nats: float) -> float:
    """Fewest bytes at which these points do no more harm, on straight lines in log harm."""
    best = math.inf
    for a, b in itertools.pairwise([points[0], *points]):
        if b.distortion_nats > nats:
            continue
        joined = (
            a.spec.id == b.spec.id
            and a.distortion_nats > nats
            and b.distortion_nats > 0
            and nats > 0
        )
        if not joined:
            best = min(best, b.nbytes)
            continue
        slope = (b.nbytes - a.nbytes) / math.log(a.distortion_nats / b.distortion_nats)
        best = min(best, a.nbytes + slope * math.log(a.distortion_nats / nats))
    return best
