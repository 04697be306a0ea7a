"""A stored cache into memory: at once, or layer by layer while bytes arrive.

A file that another model, tokenizer, text or position made is refused, in a sentence that says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from waterfill.coding.cachegen_file import PartStream, Reader
from waterfill.coding.cachegen_header import Header, Part, parts_of
from waterfill.coding.cachegen_layer import LayerDecoder, positions_of, read_ids, wanted_at
from waterfill.coding.cachegen_rows import Turn
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.held.lying import fill, within
from waterfill.runtime.cache.layer import CodedLayer, CodedSlidingLayer
from waterfill.runtime.cache.naming import as_argument
from waterfill.runtime.cache.stored.fingerprint import model_fingerprint, tokenizer_fingerprint
from waterfill.runtime.cache.stored.words import (
    DTYPE_NAMES,
    Pair,
    from_words,
    rotation_of,
    same_rotation,
    words_of,
)
from waterfill.types import BudgetError, WaterfillError

if TYPE_CHECKING:
    from waterfill.runtime.cache.cache import KVCache

__all__ = ["CacheStream", "load"]

NUMBERS = 1 << 22  # of chunks of a file that are taken at once


class CacheStream:
    """Makes a cache of a stored one's bytes as they come.

    Parameters
    ----------
    cache : empty, of the model that will go on from it
    model : that model
    level : name of a level; None: the finest
    token_ids : int (tokens,) or (batch, tokens) that must begin with the stored ones; None: not looked at
    tokenizer : that must be the stored one, where the file names one; None: not looked at
    positions : int64 (tokens,) or (batch or 1, tokens) that must be the stored ones; None: not looked at
    name : of the file, for messages
    """

    def __init__(
        self,
        cache: KVCache,
        model: Any,
        *,
        level: str | None = None,
        token_ids: Any = None,
        tokenizer: Any = None,
        positions: Any = None,
        name: str = "stream",
    ) -> None:
        self.cache, self.name, self._level = cache, name, level
        self.model, self.device = model_fingerprint(model), model.device
        self.tokenizer = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        self._given = None if token_ids is None else _rows(token_ids)
        self._positions = None if positions is None else _rows(positions)
        self.token_ids: torch.Tensor | None = None
        self._stream = PartStream(self._wanted, name)
        self._header: Header | None = None
        self._decoders: dict[int, LayerDecoder] = {}
        self._ready = 0
        self._turns: dict[Any, Turn] = {}  # the same for all layers

    @property
    def header(self) -> Header | None:
        """What the file says it holds; None before that has come."""
        return self._header

    def feed(self, data: bytes | bytearray | memoryview) -> list[int]:
        """More bytes; the model's layers that are complete with them."""
        before = self._ready
        for part, found in self._stream.feed(data):
            self.take(part, found)
        if self._header is None:
            return []
        return [layer.index for layer in self._header.layers[before : self._ready]]

    def finish(self) -> KVCache:
        """The cache, once all bytes have come; FormatError if some are missing."""
        self._stream.close()
        return self.cache

    def _wanted(self, header: Header, part: Part) -> bool:
        if self._header is None:
            self.open(header)
        return wanted_at(self.level)(header, part)

    def open(self, header: Header) -> None:
        """Take a header, and refuse what does not fit."""
        _check(header, self)
        try:
            self.level = header.number(self._level)
        except KeyError as error:
            raise WaterfillError(f"{self.name}: {error.args[0]}") from None
        self._header = header
        cache = self.cache
        if cache.budget.nbytes is not None and header.tokens > cache.tokens:
            raise BudgetError(
                f"{self.name} has {header.tokens:,} tokens, and this cache was planned for {cache.tokens:,}"
            )
        cache.track.runs = [(start, torch.tensor(offsets)) for start, offsets in header.runs]
        cache.track.tokens = header.tokens

    def take(self, part: Part, data: bytes) -> None:
        """Take a part that is wanted; they come in the file's order."""
        header = self._header
        assert header is not None
        if part.kind == "ids":
            self.token_ids = _check_ids(torch.from_numpy(read_ids(data, header)), self)
            return
        assert part.layer is not None
        if part.kind == "chunk":
            self.take_chunks([part], lambda _: data)
            return
        decoder = self._decoder(part.layer)
        if part.kind == "table":
            decoder.table(data)
        elif part.kind == "first":
            self._begin(part.layer)
            first = decoder.first(data)
            if first is not None:
                self._restore(part.layer, _tensors(first, header.dtype))
        else:
            assert part.level is not None
            decoder.models(data, part.level)
            if not header.chunks(decoder.layer):
                self._finish(part.layer)

    def take_chunks(self, parts: Sequence[Part], read: Callable[[Part], bytes]) -> None:
        """As `take`, of consecutive chunks of a layer, each read when it is its turn."""
        number = parts[0].layer
        assert number is not None
        decoder = self._decoder(number)
        header, layer = decoder.header, decoder.layer
        spans = [header.span(layer, _chunk(part)) for part in parts]
        start, stop = spans[0][0], spans[-1][1]

        def write(runs: list[Pair]) -> None:
            words = [(words_of(keys), words_of(values)) for keys, values in runs]
            for part, (first, last) in zip(parts, spans, strict=True):
                low, high, data = first - start, last - start, read(part)
                assert part.level is not None
                if header.levels[part.level].step is None:
                    pair = _tensors(decoder.exact(data, _chunk(part)), header.dtype)
                    fill(pair, within(runs, low, high))
                else:
                    keys, values = zip(*within(words, low, high), strict=True)
                    turn = self._turn(decoder, _chunk(part))
                    decoder.coded_to(data, part.level, turn, (keys, values))

        self._layer(number).receive(header.batch, stop - start, write)
        if _chunk(parts[-1]) == header.chunks(layer)[-1]:
            self._finish(number)

    def _decoder(self, number: int) -> LayerDecoder:
        header = self._header
        assert header is not None
        if number not in self._decoders:
            self._decoders[number] = LayerDecoder(header, header.layers[number])
        return self._decoders[number]

    def _finish(self, number: int) -> None:
        """A layer is complete."""
        self._ready = number + 1
        del self._decoders[number]

    def _turn(self, decoder: LayerDecoder, chunk: int) -> Turn:
        key = decoder.layer.rotation, decoder.header.span(decoder.layer, chunk)
        if key not in self._turns:
            self._turns[key] = decoder.turn(chunk)
        return self._turns[key]

    @torch.no_grad()
    def recompute(self, stop: int) -> None:
        """Have the model read the tokens from those that are here up to `stop`."""
        header, cache, ids = self._header, self.cache, self.token_ids
        assert header is not None and ids is not None
        start = cache.get_seq_length()
        positions = torch.from_numpy(positions_of(header, 0, stop))
        padded = bool((positions < 0).any())
        model = cache.model
        model(
            input_ids=ids[:, start:stop].to(model.device),
            attention_mask=(positions >= 0).long().to(model.device) if padded else None,
            position_ids=positions[:, start:].clamp_min(0).expand(len(ids), -1).to(model.device),
            **as_argument(model, cache),
            use_cache=True,
        )

    def _facts(self, index: int) -> LayerFacts:
        facts = self.cache.facts[index]
        assert facts is not None
        return facts

    def _begin(self, number: int) -> None:
        assert self._header is not None
        one = self._header.layers[number]
        self._layer(number).resume(self._facts(one.index).dtype, self.device, one.start)

    def _restore(self, number: int, pair: Pair) -> None:
        self._layer(number).restore(*(x.to(self.device) for x in pair))

    def _layer(self, number: int) -> CodedLayer | CodedSlidingLayer:
        assert self._header is not None
        found = self.cache.layers[self._header.layers[number].index]
        assert isinstance(found, (CodedLayer, CodedSlidingLayer))
        return found


def load(path: Path, stream: CacheStream) -> KVCache:
    """All of a file that a stream wants, without reading the rest."""
    with Reader(path) as reader:
        header = reader.header
        stream.open(header)
        wanted = wanted_at(stream.level)
        parts = (part for part in parts_of(header) if wanted(header, part))
        for (kind, _), some in groupby(parts, lambda part: (part.kind, part.layer)):
            if kind == "chunk":
                for together in _batches(header, list(some)):
                    stream.take_chunks(together, reader.read)
            else:
                for part in some:
                    stream.take(part, reader.read(part))
    return stream.cache


def _batches(header: Header, parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """Chunks of a layer, as many at a time as room may be asked for before they are read."""
    layer = parts[0].layer
    assert layer is not None
    numbers = header.batch * header.chunk * header.layers[layer].numbers
    some = max(1, NUMBERS // numbers)
    return (parts[at : at + some] for at in range(0, len(parts), some))


def _chunk(part: Part) -> int:
    assert part.chunk is not None
    return part.chunk


def _rows(values: Any) -> torch.Tensor:
    found = torch.as_tensor(values).to("cpu", torch.int64)
    return found if found.dim() == 2 else found.reshape(1, -1)


def _tensors(pair: tuple[Any, Any], dtype: str) -> Pair:
    return from_words(pair[0], dtype), from_words(pair[1], dtype)


def _check(header: Header, own: CacheStream) -> None:
    """WaterfillError says what a file was not made for."""
    name = own.name
    if header.model != own.model:
        raise WaterfillError(
            f"{name} was stored by another model, which this one cannot go on from"
        )
    known = own.tokenizer is not None and header.tokenizer is not None
    if known and header.tokenizer != own.tokenizer:
        raise WaterfillError(f"{name} was stored with another tokenizer than this one")
    facts = {one.index: one for one in own.cache.facts if one is not None}
    if list(facts) != [layer.index for layer in header.layers]:
        raise WaterfillError(f"{name} has other layers than this model")
    for layer in header.layers:
        one = facts[layer.index]
        shape = one.heads, one.key_width, one.value_width, DTYPE_NAMES.get(one.dtype)
        if (layer.heads, layer.key_width, layer.value_width, header.dtype) != shape:
            raise WaterfillError(
                f"{name}: layer {layer.index} has another shape or dtype than here"
            )
        turned = None if one.rotary is None else rotation_of(one.rotary)
        stored = None if layer.rotation is None else header.rotations[layer.rotation]
        if not same_rotation(turned, stored):
            raise WaterfillError(
                f"{name}: keys of layer {layer.index} turn otherwise in this model"
            )
    if own._positions is not None:
        stored_positions = torch.from_numpy(positions_of(header, 0, header.tokens))
        given = own._positions
        if given.shape[1] != header.tokens or not bool((stored_positions == given).all()):
            raise WaterfillError(f"{name} was stored for other positions than these")


def _check_ids(ids: torch.Tensor, own: CacheStream) -> torch.Tensor:
    given = own._given
    if given is None:
        return ids
    if given.shape[1] < ids.shape[1] or given.shape[0] not in (1, ids.shape[0]):
        raise WaterfillError(
            f"{own.name} holds tokens {tuple(ids.shape)}: ids {tuple(given.shape)} do not begin with them"
        )
    away = (given[:, : ids.shape[1]] != ids).any(0)
    if bool(away.any()):
        at = int(away.int().argmax())
        raise WaterfillError(
            f"{own.name} was stored for another text: token ids differ from token {at} on"
        )
    return ids
