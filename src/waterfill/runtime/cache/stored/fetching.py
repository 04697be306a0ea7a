"""A stored cache over a link, chunk by chunk, each at the level that there is time for.

>>> stream = KVCache.stream(model, token_ids=ids)                         # doctest: +SKIP
>>> with Reader(Path("prefix.kv")) as reader:                             # doctest: +SKIP
...     choices = fetch(reader, stream, carry, deadline=2.0, bandwidth=1e6)
>>> model.generate(ids, past_key_values=stream.cache)                     # doctest: +SKIP
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from waterfill.coding.cachegen_file import Reader
from waterfill.coding.cachegen_header import Header, Part
from waterfill.runtime.cache.stored.link import Choice, offers_of, send
from waterfill.runtime.cache.stored.loading import CacheStream

__all__ = ["fetch"]

Carry = Callable[[bytes], tuple[bytes, float]]


def fetch(
    reader: Reader,
    stream: CacheStream,
    carry: Carry,
    *,
    deadline: float,
    bandwidth: float,
    prefill_tokens_per_second: float | None = None,
) -> list[Choice]:
    """Fill the stream's cache, choosing for each chunk of tokens a level or to compute it again.

    Parameters
    ----------
    reader : of the file, where it lies
    stream : that nothing was fed to
    carry : brings bytes over: them, and the seconds that it took
    deadline : seconds from now until all should be there
    bandwidth : bytes per second, a first guess
    prefill_tokens_per_second : of all rows together, as measured; None: nothing is computed again

    Returns
    -------
    a choice for each chunk

    Raises
    ------
    FormatError
        If what comes is damaged.
    WaterfillError
        If the file was made for another model, tokenizer, text or other positions.
    """
    header = reader.header
    stream.open(header)
    offers, order = offers_of(reader, prefill_tokens_per_second)
    here: set[Part] = set()

    def bring(part: Part) -> tuple[int, float]:
        data, took = carry(reader.read(part))
        reader.check(part, data)
        stream.take(part, data)
        here.add(part)
        return len(data), took

    def transfer(chunk: int, level: int) -> tuple[int, float]:
        nbytes, seconds = 0, 0.0
        for part in _parts(header, chunk, level, bool(stream.cache.get_seq_length())):
            if part not in here:
                more, took = bring(part)
                nbytes, seconds = nbytes + more, seconds + took
        return nbytes, seconds

    def compute(chunk: int) -> float:
        start = time.perf_counter()
        kept = max(layer.first for layer in header.layers)
        stream.recompute(min(header.tokens, max(kept, (chunk + 1) * header.chunk)))
        return time.perf_counter() - start

    _, took = bring(Part("ids"))
    return send(offers, order, deadline - took, bandwidth, transfer, compute)


def _parts(header: Header, chunk: int, level: int, begun: bool) -> Iterator[Part]:
    """What a chunk at a level needs, each layer's own first."""
    for i, layer in enumerate(header.layers):
        if header.levels[level].step is not None:
            yield Part("table", i)
        if not begun:
            yield Part("first", i)
        if chunk in header.chunks(layer):
            yield Part("models", i, level)
            yield Part("chunk", i, level, chunk)
