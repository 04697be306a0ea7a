"""What to send of a stored cache over a link, so that it is there by a deadline, as good as can be.

Token by token the prefix is cut in chunks. Each may be sent at one of the file's levels, or computed again
from its token ids, which takes a time of its own and loses nothing. Before each chunk the controller looks
at the bandwidth measured last and takes the best choice that, made for all chunks that are left, would keep
the deadline: CacheGen's (Liu et al. 2023, arXiv 2310.07240, section 5.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from waterfill.coding.cachegen_file import Reader
from waterfill.coding.cachegen_header import Header, Part

__all__ = ["RECOMPUTE", "Choice", "Offer", "choose", "offers_of", "send"]

RECOMPUTE = -1


@dataclass(frozen=True)
class Offer:
    """What a chunk of tokens costs.

    Attributes
    ----------
    nbytes : at each level, of all layers
    seconds : to compute it again; None: that cannot be done
    """

    nbytes: tuple[int, ...]
    seconds: float | None = None


@dataclass(frozen=True)
class Choice:
    """What was done with a chunk, and when it was there, in seconds from the beginning."""

    level: int
    done: float


def offers_of(
    reader: Reader, prefill_tokens_per_second: float | None = None
) -> tuple[list[Offer], tuple[int, ...]]:
    """Offers for the chunks of a stored cache, and its levels, best first.

    What all chunks of a level need (tables, models, first tokens) is counted with the first chunk.

    Parameters
    ----------
    prefill_tokens_per_second : of all rows together, measured; None: nothing is computed again, and so it is
        where a layer with a window has lost its first tokens, which the ones after them would need
    """
    header = reader.header
    count = len(header.levels)
    nbytes = [[0] * count for _ in range(header.count)]
    for part in reader.numbers:
        _add(nbytes, part, reader.part_nbytes(part), header)
    front = reader.nbytes - sum(reader.part_nbytes(part) for part in reader.numbers)
    nbytes[0] = [n + front for n in nbytes[0]]
    order = sorted(range(count), key=lambda i: header.levels[i].step or 0.0)
    offers = []
    speed = None if any(layer.start for layer in header.layers) else prefill_tokens_per_second
    for chunk, each in enumerate(nbytes):
        tokens = min(header.tokens, (chunk + 1) * header.chunk) - chunk * header.chunk
        seconds = None if speed is None else tokens * header.batch / speed
        offers.append(Offer(tuple(each), seconds))
    return offers, tuple(order)


def _add(nbytes: list[list[int]], part: Part, size: int, header: Header) -> None:
    chunk = part.chunk or 0
    if part.level is not None:
        nbytes[chunk][part.level] += size
        return
    for level, one in enumerate(header.levels):
        if part.kind != "table" or one.step is not None:
            nbytes[chunk][level] += size


def choose(left: Sequence[Offer], order: Sequence[int], bandwidth: float, seconds: float) -> int:
    """A level for the first of the chunks that are left, or `RECOMPUTE`.

    The best that, taken for all that are left, is there in time; where none is, the one that is there
    soonest for all that are left.

    Parameters
    ----------
    order : levels, best first; computing again comes before all of them
    bandwidth : bytes per second, as measured
    seconds : until the deadline
    """
    times: dict[int, float] = {}
    if all(offer.seconds is not None for offer in left):
        times[RECOMPUTE] = sum(offer.seconds or 0.0 for offer in left)
    for level in order:
        times[level] = sum(offer.nbytes[level] for offer in left) / bandwidth
    fits = [level for level, time in times.items() if time <= seconds]
    if fits:
        return fits[0]
    return _soonest(left[0], order, bandwidth)


def _soonest(one: Offer, order: Sequence[int], bandwidth: float) -> int:
    """What is there soonest for this chunk alone."""
    smallest = min(order, key=lambda level: one.nbytes[level])
    again = one.seconds
    if again is not None and again < one.nbytes[smallest] / bandwidth:
        return RECOMPUTE
    return smallest


def send(
    offers: Sequence[Offer],
    order: Sequence[int],
    deadline: float,
    bandwidth: float,
    transfer: Callable[[int, int], tuple[int, float]],
    compute: Callable[[int], float],
) -> list[Choice]:
    """Bring all chunks over, one after another, choosing before each.

    Parameters
    ----------
    deadline : seconds from now
    bandwidth : bytes per second, a first guess; later what the last transfer had
    transfer : brings a chunk at a level, (chunk, level) -> bytes, and seconds they took
    compute : computes a chunk again, (chunk) -> seconds it took
    """
    now, done = 0.0, []
    for chunk in range(len(offers)):
        level = choose(offers[chunk:], order, bandwidth, deadline - now)
        if level == RECOMPUTE:
            now += compute(chunk)
        else:
            nbytes, took = transfer(chunk, level)
            now += took
            if took > 0 and nbytes:
                bandwidth = nbytes / took
        done.append(Choice(level, now))
    return done
