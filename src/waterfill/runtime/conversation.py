"""A conversation with a compressed model: what was said, and what of it still fits."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from waterfill.runtime.generation import Continuation, Inputs, Message, Sampling, Writer
from waterfill.types import WaterfillError

LEAST_ROOM = 4  # at least a quarter of the context is kept for the answer, where no number is named


@dataclass
class Conversation:
    """Messages and answers in turn.

    A model with a chat template gets the messages as its template writes them. One without goes on
    with the plain text of all that was said: no template is made up for it.

    Attributes
    ----------
    writer : the model
    sampling : of every answer
    system : what the conversation begins with; "" for nothing
    messages : role and content of all that was said and is still known
    forgotten : messages that had to go because the context was full, since the last `ask`
    answer : the continuation that was asked for last
    """

    writer: Writer
    sampling: Sampling = field(default_factory=Sampling)
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0
    answer: Continuation | None = None

    def __post_init__(self) -> None:
        if self.system and not self.writer.has_template:
            raise WaterfillError(
                "this model has no chat template, so there is no place for a system message"
            )

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages.clear()

    def ask(self, text: str) -> Generator[str, None, None]:
        """Say something; yields the answer piece by piece.

        What was written stays in the conversation, even where the iterator is left early.

        Raises
        ------
        WaterfillError
            If the message alone is longer than the context; the conversation is as it was before.
        """
        inputs = self._fitting({"role": "user", "content": text})
        self.answer = self.writer.write(inputs, self.sampling)
        pieces: list[str] = []
        try:
            for piece in self.answer:
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "user", "content": text})
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _fitting(self, message: Message) -> Inputs:
        """The conversation with a new message as tokens; the oldest exchanges go until it fits."""
        known = list(self.messages)
        inputs = self._encode([*known, message])
        while not self._fits(inputs):
            if not known:
                raise WaterfillError(
                    f"the context is full: this model takes {self.writer.context} tokens at once, "
                    f"and the message has {inputs['input_ids'].shape[1]}"
                )
            del known[:2]
            inputs = self._encode([*known, message])
        self.forgotten = len(self.messages) - len(known)
        self.messages = known
        return inputs

    def _fits(self, inputs: Inputs) -> bool:
        room = self.writer.room(inputs)
        if room is None or self.writer.context is None:
            return True
        return room >= (self.sampling.tokens or self.writer.context // LEAST_ROOM)

    def _encode(self, messages: list[Message]) -> Inputs:
        if not self.writer.has_template:
            return self.writer.encode("".join(m["content"] for m in messages))
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.writer.encode_chat([*system, *messages])
