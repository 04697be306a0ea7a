"""The contract that every way to hold keys and values signs, and how one is found by its id.

A method is a frozen value that can be written down (``channel:bits=4``). Opened on a layer it becomes a
`Coder`: plain functions from exact blocks to coded ones and back, with whatever tables they need. What
changes over time is with the store, never here.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform

import torch

from waterfill.coding.cached_blocks import Blocks
from waterfill.runtime.cache.facts import LayerFacts
from waterfill.runtime.cache.fitting.statistics import LayerStatistics
from waterfill.types import Spec, SpecError, WaterfillError

if TYPE_CHECKING:
    from waterfill.runtime.cache.fitting.planning import Budget
    from waterfill.runtime.cache.held.store import Store
    from waterfill.runtime.cache.held.track import Track

__all__ = [
    "BLOCK",
    "Coded",
    "Coder",
    "Method",
    "Tier",
    "find_method",
    "in_blocks",
    "in_order",
    "make_method",
    "method",
    "method_ids",
    "parse_method",
]

BLOCK = 32  # tokens that are coded at once

Coded = Mapping[str, torch.Tensor]  # part -> (batch, blocks, ...), the same shape for each block


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """(batch, heads, blocks * BLOCK, width) as (batch, blocks, heads, BLOCK, width)."""
    batch, heads, tokens, width = x.shape
    return x.reshape(batch, heads, tokens // BLOCK, BLOCK, width).transpose(1, 2)


def in_order(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `in_blocks`."""
    return x.transpose(1, 2).flatten(2, 3)


class Coder:
    """A method on one layer: no state that changes.

    Attributes
    ----------
    wants_saliency : whether `encode` is to be told how much attention each token receives
    position_free : whether keys are coded before their rotation, so that `decode` takes other positions too
    """

    wants_saliency: ClassVar[bool] = False
    position_free: ClassVar[bool] = False

    @property
    def tables(self) -> Mapping[str, torch.Tensor]:
        """What is held once, whatever the number of tokens; counted with the cache."""
        return {}

    @property
    def nbytes(self) -> int:
        """Bytes of the tables: all that is held beside codes but for a few hundred bytes of objects."""
        return sum([t.numel() * t.element_size() for t in self.tables.values()])

    def encode(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        saliency: torch.Tensor | None = None,
    ) -> Coded:
        """Code whole blocks.

        Parameters
        ----------
        keys, values : (batch, heads, blocks * BLOCK, width), as attention would get them
        positions : int64 (batch or 1, blocks * BLOCK)
        saliency : float32 (batch, heads, blocks * BLOCK), mean attention of late queries; None: unknown
        """
        raise NotImplementedError

    def decode(self, coded: Coded, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of coded blocks, (batch, heads, blocks * BLOCK, width), in the layer's dtype."""
        raise NotImplementedError

    def views(self, coded: Coded) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values where they lie, (batch, heads, blocks, BLOCK, width); None: they are not held so.

        What is written there is what will be decoded.
        """
        return None

    @property
    def blocks(self) -> Blocks | None:
        """How kernels may read the parts; None: they cannot."""
        return None


@dataclass(frozen=True)
class Tier:
    """Blocks of an age, newest tier first: how they are coded, and how many before the next tier."""

    method: Method
    tokens: int | None = None


class Method:
    """The contract. Subclasses are frozen dataclasses made by the `method` decorator."""

    id: ClassVar[str]
    calibrated: ClassVar[bool] = False  # whether it needs statistics of the model's own cache
    usual: ClassVar[bool] = False  # whether `auto` weighs it
    evicts: ClassVar[bool] = False  # whether it forgets tokens, and has no blocks: see `evicting`

    @classmethod
    def ladder(cls, facts: LayerFacts, statistics: LayerStatistics | None) -> Iterator[Self]:
        """Operating points worth pricing for a layer, cheapest first."""
        raise NotImplementedError

    def open(self, facts: LayerFacts, statistics: LayerStatistics | None) -> Coder:
        """Ready to code blocks of a layer."""
        raise NotImplementedError

    def store(
        self,
        facts: LayerFacts,
        coders: list[tuple[Coder, int | None]],
        track: Track,
        budget: Budget,
    ) -> Store:
        """What a layer remembers in, empty."""
        # The store is made of coders, so it comes after this module.
        from waterfill.runtime.cache.held.store import Store

        return Store(facts, coders, track, budget.sinks, budget.recent, budget.recent_room)

    def tiers(self) -> tuple[Tier, ...]:
        """How blocks age, newest first; most methods leave them as they are."""
        return (Tier(self),)

    @classmethod
    def known(cls, statistics: LayerStatistics | None) -> LayerStatistics:
        """Statistics that the method cannot do without; WaterfillError says how to make them."""
        if statistics is None:
            raise WaterfillError(
                f"{cls.id} needs statistics of the cache: waterfill calibrate-cache makes them"
            )
        return statistics

    def within(self, option: str, least: float, most: float) -> None:
        """SpecError if an option is not from `least` to `most`."""
        value = getattr(self, option)
        if not least <= value <= most:
            raise SpecError(f"{self.id}: {option} must be {least:g} to {most:g}, not {value}")

    def between(self, other: Self, t: float) -> Self | None:
        """A method at fraction t (0..1) of the way to another rung; None if rungs are discrete."""
        return None

    @property
    def spec(self) -> Spec:
        """This method as data."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return Spec(self.id, {f.name: getattr(self, f.name) for f in fields})

    def __str__(self) -> str:
        """For people: the id and the options that differ from their defaults."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        own = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        return str(Spec(self.id, own))


M = TypeVar("M", bound=Method)
_REGISTRY: dict[str, type[Method]] = {}


@dataclass_transform(frozen_default=True)
def method(cls: type[M]) -> type[M]:
    """Class decorator: freezes the class as a dataclass; its file's name is its id."""
    frozen = dataclass(frozen=True)(cls)
    frozen.id = cls.__module__.rpartition(".")[2]
    _REGISTRY[frozen.id] = frozen
    return frozen


def method_ids() -> list[str]:
    """Ids of every method there is."""
    package = importlib.import_module("waterfill.runtime.cache.methods")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def find_method(id: str) -> type[Method]:
    """The class of this id, imported at first use; SpecError if there is none."""
    if id not in _REGISTRY:
        if id not in method_ids():
            raise SpecError(
                f"no cache method is called {id!r}; known: auto, {', '.join(method_ids())}"
            )
        importlib.import_module(f"waterfill.runtime.cache.methods.{id}")
    return _REGISTRY[id]


def parse_method(text: str) -> Method:
    """``channel:bits=4`` -> method; SpecError says what does not fit."""
    name, _, rest = text.strip().partition(":")
    cls = find_method(name)
    known: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    config = {}
    for item in filter(None, rest.split(",")):
        key, sep, value = item.partition("=")
        if not sep or key not in known:
            has = ", ".join(known) or "none"
            raise SpecError(f"{text!r}: {item!r} is not an option; {name} has: {has}")
        try:
            config[key] = type(known[key])(value)
        except ValueError as error:
            raise SpecError(f"{text!r}: {value!r} is not {type(known[key]).__name__}") from error
    return cls(**config)


def make_method(spec: Spec) -> Method:
    """A method from its specification."""
    return find_method(spec.id)(**spec.config)
