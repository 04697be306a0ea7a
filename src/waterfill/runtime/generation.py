"""A compressed model that writes: text piece by piece as it comes, and what it took.

>>> writer = open_writer("out/small")                        # doctest: +SKIP
>>> text = writer.write(writer.encode("Once upon a time"))   # doctest: +SKIP
>>> for piece in text:                                       # doctest: +SKIP
...     print(piece, end="", flush=True)
>>> text.timings.decode_tokens_per_second                    # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from waterfill.container import Reader
from waterfill.runtime.artifact import folder_of
from waterfill.runtime.cache.naming import as_argument
from waterfill.runtime.torch_model import load_model, quiet_transformers
from waterfill.sources.text import load_tokenizer
from waterfill.types import WaterfillError

CONTEXT_OF_DECODING = 5  # tokens before a piece that tell whether it begins with a space
MOST_TOKENS = 512  # of an answer, if not said otherwise

Inputs = Mapping[str, Any]  # what a tokenizer returns: names to tensors of shape (1, tokens)
Message = Mapping[str, str]  # role and content


@dataclass(frozen=True)
class Sampling:
    """How much is written, and how each token is chosen.

    Attributes
    ----------
    tokens : at most so many; None: up to MOST_TOKENS or the end of the context
    temperature : 0 takes the likeliest token; None with `top_p` None: as the model's own
        generation_config.json says
    top_p : only among the likeliest tokens that together have this probability
    seed : of the draws; None: another one each time
    stop : texts that end the answer, and are not part of it
    """

    tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        if self.temperature is None and self.top_p is None:
            return {}
        if self.temperature == 0:
            return {"do_sample": False}
        # Floats: transformers takes no 2 for 2.0.
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        top_p = 1.0 if self.top_p is None else float(self.top_p)
        return {"do_sample": True, "temperature": temperature, "top_p": top_p}


@dataclass(frozen=True)
class Timings:
    """What a continuation took: the prompt and its first token apart from the tokens after it."""

    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """None where there was only one token, or none."""
        return (self.tokens - 1) / max(self.decode_seconds, 1e-9) if self.tokens > 1 else None


@dataclass(frozen=True)
class Writer:
    """A model in memory and its tokenizer.

    Attributes
    ----------
    cache : arguments of `KVCache` for what is written; None: transformers' own cache. With tokens
        (None: the model's context) among them, one cache is planned for all texts in turn
    """

    model: Any
    tokenizer: Any
    cache: Mapping[str, Any] | None = None
    _spare: list[Any] = field(default_factory=list, repr=False, compare=False)

    @property
    def context(self) -> int | None:
        """Tokens that the model takes at once, prompt and answer together; None: no limit."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @property
    def has_template(self) -> bool:
        """Whether its tokenizer says how a conversation is written."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def encode(self, text: str) -> Inputs:
        """A prompt as tokens; WaterfillError if there are none."""
        inputs = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        if inputs["input_ids"].shape[1] == 0:
            raise WaterfillError("the prompt is empty")
        return dict(inputs)

    def encode_chat(self, messages: list[Message]) -> Inputs:
        """A conversation as tokens, by the template of the tokenizer, ready for the next answer.

        Raises
        ------
        WaterfillError
            If there is no template, or it refuses these messages.
        """
        if not self.has_template:
            raise WaterfillError("this model has no chat template: it can only continue a text")
        try:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # whatever a template can provoke
            raise WaterfillError(f"the chat template refuses the messages: {error}") from error
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def room(self, inputs: Inputs) -> int | None:
        """Tokens of the context that are left for an answer; None: no limit."""
        if self.context is None:
            return None
        # An encoder reads the prompt apart from what the decoder writes.
        given = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return max(0, int(self.context) - given)

    def take_cache(self, tokens: int) -> Any:
        """An empty cache for a text of so many tokens; BudgetError if none can be so small."""
        from waterfill.runtime.cache.cache import KVCache

        assert self.cache is not None
        if "tokens" in self.cache and self._spare:
            return self._spare.pop()
        with quiet_transformers():
            return KVCache(self.model, **{"tokens": tokens, **self.cache})

    def give_back(self, cache: Any) -> None:
        """A cache whose text is done may hold the next one."""
        if self.cache is not None and "tokens" in self.cache:
            self._spare.append(cache)

    def write(self, inputs: Inputs, sampling: Sampling = Sampling()) -> Continuation:
        """Continue a prompt.

        Parameters
        ----------
        inputs : from `encode` or `encode_chat`
        sampling : how

        Returns
        -------
        Continuation, to be iterated over once; nothing runs before that

        Raises
        ------
        WaterfillError
            If the model cannot write, or prompt and answer are longer than its context.
        """
        if not self.model.can_generate():
            raise WaterfillError(f"{type(self.model).__name__} cannot continue a text")
        given, room = inputs["input_ids"].shape[1], self.room(inputs)
        tokens = sampling.tokens
        if tokens is None:
            tokens = MOST_TOKENS if room is None else min(MOST_TOKENS, room)
        if room is not None and (tokens > room or tokens == 0):
            more = f" and {tokens} more were asked for" if tokens else ", which leaves no room"
            raise WaterfillError(
                f"this model takes {self.context} tokens at once; the prompt has {given}{more}"
            )
        return Continuation(self, inputs, sampling, tokens)


def open_writer(path: str | Path, cache: Mapping[str, Any] | None = None, **options: Any) -> Writer:
    """Open an artifact to write with.

    Parameters
    ----------
    path : artifact folder
    cache : arguments of `waterfill.KVCache`, for the cache of each text; None: transformers' own
    **options : of `waterfill.load_model`: residency, memory, size, dtype, trust_remote_code

    Raises
    ------
    WaterfillError
        As `waterfill.load_model`, or if the artifact has no tokenizer.
    """
    folder = folder_of(path)
    # A folder that is no artifact is said to be none, before its tokenizer is missed.
    Reader(folder).close()
    with quiet_transformers():
        trust = options.get("trust_remote_code", False)
        tokenizer = load_tokenizer(folder, trust)
        return Writer(load_model(folder, **options), tokenizer, cache)


@dataclass
class Continuation:
    """Text that is being written: an iterator of its pieces.

    Closing the iterator, or leaving its loop, stops the model at its next token.

    Attributes
    ----------
    timings : of what was written so far; whole when the loop is over
    cache : its keys and values, where the writer names a size for them; until the next text, where
        the writer has one for all
    finish : "length" if the number of tokens ended it, else "stop"; "" before the end
    """

    writer: Writer
    inputs: Inputs
    sampling: Sampling
    tokens: int
    finish: str = ""
    cache: Any = field(init=False, default=None, repr=False)
    _listener: _Listener = field(init=False, repr=False)
    _start: float = field(init=False, default=0.0, repr=False)
    _ended: bool = field(init=False, default=False, repr=False)  # by the model, not by a stop text

    def __post_init__(self) -> None:
        self._listener = _Listener(self.writer.tokenizer)

    @property
    def ids(self) -> list[int]:
        """Tokens written so far."""
        listened = self._listener
        return listened.ids[len(listened.ids) - len(listened.times) :]

    @property
    def timings(self) -> Timings:
        at = [self._start, *self._listener.times]
        first, last = at[min(1, len(at) - 1)], at[-1]
        given = self.inputs["input_ids"].shape[1]
        return Timings(given, len(at) - 1, first - at[0], last - first)

    def __iter__(self) -> Generator[str, None, None]:
        with contextlib.closing(self._pieces()) as pieces:
            yield from until(pieces, self.sampling.stop)
        self.finish = "length" if self._cut_off() else "stop"

    def open_cache(self) -> None:
        """Plan the cache now, where the writer names a size for it; BudgetError if none can be so small."""
        if self.writer.cache is not None and self.cache is None:
            given = self.inputs["input_ids"].shape[1]
            self.cache = self.writer.take_cache(given + self.tokens)
            self.cache.reset()

    def _pieces(self) -> Generator[str, None, None]:
        pieces = self._listener.pieces
        thread = threading.Thread(target=self._generate, daemon=True)
        with quiet_transformers():
            thread.start()
            try:
                while (piece := pieces.get()) is not None:
                    if isinstance(piece, BaseException):
                        raise piece
                    yield piece
                self._ended = True
            finally:
                self._listener.closed = True
                thread.join()

    def _cut_off(self) -> bool:
        ends = self.writer.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return self._ended and len(self.ids) >= self.tokens and self.ids[-1] not in ends

    def _generate(self) -> None:
        import torch

        model, listener = self.writer.model, self._listener
        options: dict[str, Any] = {"max_new_tokens": self.tokens, "num_beams": 1}
        options |= self.sampling.options()
        if model.generation_config.pad_token_id is None:
            ends = model.generation_config.eos_token_id
            options["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        try:
            if self.writer.cache is not None:
                self.open_cache()
                options |= as_argument(model, self.cache)
                if self.cache.guard is not None:
                    options["logits_processor"] = [self.cache.guard]
            self._start = time.perf_counter()
            inputs = {name: tensor.to(model.device) for name, tensor in self.inputs.items()}
            model.generate(**inputs, **options, streamer=listener)
        except _Closed:
            pass
        except BaseException as error:  # raised again in the thread that waits for the text
            listener.pieces.put(error)
        finally:
            if self.cache is not None:
                self.writer.give_back(self.cache)
            listener.pieces.put(None)


def until(pieces: Iterable[str], stops: tuple[str, ...]) -> Generator[str, None, None]:
    """Pieces of text up to the first of some texts; what may be the beginning of one waits."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [at for stop in stops if (at := held.find(stop)) >= 0]:
            if min(found):
                yield held[: min(found)]
            return
        longest = max((len(stop) for stop in stops), default=1) - 1
        begun = [k for k in range(1, longest + 1) if any(s.startswith(held[-k:]) for s in stops)]
        clear = len(held) - min(max(begun, default=0), len(held))
        if clear:
            yield held[:clear]
        held = held[clear:]
    if held:
        yield held


class _Closed(Exception):
    """Nobody listens any more."""


class _Listener:
    """What `generate` calls a streamer: it turns tokens into text as soon as that is settled.

    Decoding a piece together with the tokens before it keeps the space that begins a word, which
    tokenizers drop at the start of a text; a character whose bytes are not complete waits.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self.times: list[float] = []
        self.ids: list[int] = []
        self.closed = False
        self._settled: int | None = None  # ids whose text has gone out; None before the prompt
        self._before = 0  # ids that need not be looked at any more

    def put(self, value: Any) -> None:
        if self.closed:
            raise _Closed
        self.ids.extend(value.flatten().tolist())
        if self._settled is None:
            self._settled = len(self.ids)
            self._before = max(0, self._settled - CONTEXT_OF_DECODING)
            return
        self.times.append(time.perf_counter())
        self._send(self._new_text())

    def end(self) -> None:
        self._send(self._new_text(), last=True)

    def _new_text(self) -> str:
        known = self._decode(self.ids[self._before : self._settled])
        return self._decode(self.ids[self._before :])[len(known) :]

    def _send(self, text: str, last: bool = False) -> None:
        if text and (last or not text.endswith("\ufffd")):
            assert self._settled is not None
            self._before, self._settled = self._settled, len(self.ids)
            self.pieces.put(text)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
