"""One batch of text through the model, forward and back, into the sums."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from waterfill.calibrate.assemble import key_of
from waterfill.calibrate.loader import Loader
from waterfill.calibrate.lookups import EmbeddingWatch
from waterfill.calibrate.memory import out_of_memory
from waterfill.calibrate.stream import block_names, install_doors
from waterfill.calibrate.sums import Sums
from waterfill.calibrate.tallies import Inputs, Tally, Use
from waterfill.calibrate.watch import Watch
from waterfill.types import Array, WaterfillError

__all__ = ["NoGradient", "Passes", "model_inputs"]

LAST = 1 << 40  # an event after all others of a batch


class NoGradient(Exception):
    """The backward pass of this model does not work; the message says why."""


@dataclass
class Passes:
    """Runs batches through a streamed model.

    Parameters
    ----------
    loader : of the model
    sums : where to add
    gradients : whether to run backward
    seed : of the sampled labels; each batch has a generator of its own
    step : called with the name of each block when it has run
    """

    loader: Loader
    sums: Sums
    gradients: bool
    seed: int
    step: Callable[[str], None]
    watch: Watch = field(default_factory=Watch)
    note: str = ""

    def __post_init__(self) -> None:
        self._at = (0, 0)
        self._leaders: dict[Use, str] = {}
        for about in self.sums.all().values():
            if "use" in about:
                self._leaders[Use(*about["use"])] = about["inputs"]
        self._blocks = set(block_names(self.loader.model))
        install_doors(self.loader, self.watch, lambda: self.gradients, self._leave)

    def run(self, batch: int, ids: NDArray[np.int64]) -> None:
        """Add the batch of this number, ids (windows, window), to the sums."""
        self._at = (batch, 0)
        self.watch.tally = Tally({}, {}, {}, {})
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + batch)
        model = self.loader.model
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            stack.enter_context(self.watch)
            stack.enter_context(EmbeddingWatch(self.watch, self.gradients))
            try:
                out = model(**model_inputs(model, ids))
            except (WaterfillError, KeyboardInterrupt):
                raise
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
                if out_of_memory(error):
                    raise
                raise WaterfillError(
                    f"{type(model).__name__} could not run the text: {error}"
                ) from error
            check_finite(out)
            if self.gradients:
                loss, self.watch.expected, self.note = sampled_loss(out, generator)
                del out  # the logits, of which the graph has what it needs
                if not loss.requires_grad:
                    raise NoGradient("its output does not depend on a look-up table")
                with self._going_back():
                    torch.autograd.backward([loss])
        self._finish()

    @contextmanager
    def _going_back(self) -> Iterator[None]:
        self.watch.backward = True
        try:
            yield
        except (WaterfillError, KeyboardInterrupt):
            raise
        except (RuntimeError, NotImplementedError) as error:
            if out_of_memory(error):
                raise  # a poorer result must not be the answer to a busy machine
            raise NoGradient(f"its backward pass failed ({error})") from error
        finally:
            self.watch.backward = False

    def _leave(self, name: str) -> None:
        if not self.watch.backward:
            for inputs in self.watch.collect():
                self._add_inputs(inputs)
        if name in self._blocks:
            self.step(name)

    def _add_inputs(self, inputs: Inputs) -> None:
        batch, event = self._at
        self._at = (batch, event + 1)
        leader = inputs.uses[0]
        key = self._leaders.get(leader, f"inputs of {key_of(leader)}")
        for use in inputs.uses:
            if self._leaders.setdefault(use, key) != key:
                raise WaterfillError(
                    f"{use.parameter} shares its inputs with other weights in some batches only; "
                    "run one batch (fewer tokens)"
                )

        def make() -> dict[str, Array]:
            total, positions = inputs.moment()
            return {"sum": total, "positions": np.int64(positions)}  # type: ignore[dict-item]

        self.sums.add(key, (batch, event), {}, make)

    def _finish(self) -> None:
        batch, _ = self._at
        tally = self.watch.tally
        for use, leader in self._leaders.items():
            rows = tally.rows.get(use)
            held: dict[str, Array] = {} if rows is None else {"rows": rows}
            self.sums.add(
                key_of(use), (batch, LAST), {"use": list(use), "inputs": leader}, held.copy
            )
        for name, tokens in tally.tokens.items():
            arrays = {"tokens": tokens}
            if name in tally.embedded:
                arrays["sum"] = tally.embedded[name]
                arrays["energy"] = tally.energy[name]
            width = self.loader.jobs[name].outputs[name][-1]
            self.sums.add(f"embedding {name}", (batch, LAST), {"width": width}, arrays.copy)
        self.sums.finish_batch(batch + 1)


def model_inputs(model: Any, ids: NDArray[np.int64]) -> dict[str, Any]:
    """Keyword arguments of a model's forward for token numbers (windows, window)."""
    if model.main_input_name != "input_ids":
        raise WaterfillError(
            f"{type(model).__name__} takes {model.main_input_name}, not text: it cannot be "
            "calibrated here"
        )
    tokens = torch.from_numpy(np.ascontiguousarray(ids))
    inputs: dict[str, Any] = {"input_ids": tokens}
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        inputs["use_cache"] = False
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    return inputs


def check_finite(out: Any) -> None:
    """Refuse an output that has NaN or infinite values."""
    values = getattr(out, "logits", None)
    values = out.last_hidden_state if values is None else values
    if not bool(torch.isfinite(values).all()):
        raise WaterfillError(
            "the model's output on this text is not finite, even in float32; "
            "mend the checkpoint, or give another text"
        )


def sampled_loss(
    out: Any, generator: torch.Generator
) -> tuple[torch.Tensor, NDArray[np.float64] | None, str]:
    """A loss whose squared gradients estimate the Fisher information.

    With logits: cross entropy, in nats summed over positions, with labels drawn from the model's
    own distribution. Without: the last hidden state is taken for the mean of a Gaussian of unit
    variance, and the label drawn from that.

    Returns
    -------
    loss : scalar
    expected : float64 (V,), sum over positions of p (1 - p): what the squared gradients at the
        logits are in the mean over all labels
    note : str
        What is unusual about it, or "".
    """
    logits = getattr(out, "logits", None)
    if logits is None:
        hidden = out.last_hidden_state
        noise = torch.randn(hidden.shape, generator=generator)
        note = "the model has no logits: harm is half the squared error of its last hidden state"
        return (hidden * noise).sum(), None, note
    flat = logits.reshape(-1, logits.shape[-1]).float()
    with torch.no_grad():
        labels = []
        expected = np.zeros(flat.shape[-1])
        for rows in flat.split(512):
            p = rows.softmax(-1)
            labels.append(torch.multinomial(p, 1, generator=generator)[:, 0])
            expected += (p * (1 - p)).sum(0).double().numpy()
    loss = torch.nn.functional.cross_entropy(flat, torch.cat(labels), reduction="sum")
    return loss, expected, ""
