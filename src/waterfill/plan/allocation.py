"""How a budget may be spent: what every allocator is given, and how one is found by its name.

An allocator is a file of `waterfill.plan.allocators` with one function::

    allocate(curves, budget, context) -> {tensor name: Point}

whose points take no more than `budget` bytes together, as priced, wherever that can be. One that
must measure the model says so with ``STARTS_FROM = "hull"``: the allocator whose file it betters.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from waterfill.plan.hull import Curves
from waterfill.types import Floats, Point, SpecError, TensorInfo

__all__ = ["DEFAULT", "Allocate", "Allocator", "Context", "Trial", "allocators", "find_allocator"]

DEFAULT = "hull"
_HOME = "waterfill.plan.allocators"


class Trial(Protocol):
    """A model at hand: every choice can be encoded for real, and run."""

    @property
    def start(self) -> Mapping[str, Point]:
        """What the file to be bettered was encoded with."""

    @property
    def windows(self) -> int:
        """How many windows of text `harm` can run."""

    @property
    def window(self) -> int:
        """Tokens in each."""

    @property
    def seed(self) -> int:
        """Of all that is drawn."""

    def nbytes(self, name: str, point: Point) -> int:
        """Bytes of a tensor as really encoded."""

    def slack(self, choices: Mapping[str, Point]) -> int:
        """Bytes that a file of these choices leaves of the budget; negative: it is too large."""

    def harms(self, choices: Mapping[str, Point], windows: Sequence[int]) -> list[float]:
        """Nats per token of KL(original || decoded) in each of some windows, by their numbers."""

    def kept(self) -> Mapping[str, Any] | None:
        """What `keep` was given last, here or in a run of the same beginnings; None: nothing yet."""

    def keep(self, state: Mapping[str, Any]) -> None:
        """Keep the state of a search (JSON), for a run that goes on after an interrupt."""

    def is_over(self, generation: int) -> bool:
        """Whether the search must end, with so many generations behind it; tells who watches."""


def _no_weights(_: str) -> Floats:
    raise SpecError("this allocator reads the weights, and there are none at hand")


def _no_model() -> Mapping[str, float]:
    raise SpecError("this allocator runs text through the model, and there is none at hand")


@dataclass(frozen=True)
class Context:
    """What an allocator may look at beside the curves.

    Attributes
    ----------
    infos : tensor name -> TensorInfo
    matrix : tensor name -> its weights, float32 (m, n)
    influence : tensor name -> how much the block it is in changes what passes through, 0 to 2
    trial : None where nothing is to be encoded
    memory : what an allocator has learned of weights or model, which is the same when it is asked again
        for another budget
    """

    infos: Mapping[str, TensorInfo]
    matrix: Callable[[str], Floats] = _no_weights
    influence: Callable[[], Mapping[str, float]] = _no_model
    trial: Trial | None = None
    memory: dict[str, Any] = field(default_factory=dict)


Allocate = Callable[[Curves, float, Context], dict[str, Point]]


@dataclass(frozen=True)
class Allocator:
    """One way to spend a budget.

    Attributes
    ----------
    name : of its file
    allocate : see `waterfill.plan.allocation`
    starts_from : the allocator whose file it betters by measuring the model; "" for those that
        need no model
    """

    name: str
    allocate: Allocate
    starts_from: str = ""


def allocators() -> list[str]:
    """Names of all there are."""
    package = importlib.import_module(_HOME)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def find_allocator(name: str) -> Allocator:
    """The allocator of this name; SpecError if there is none."""
    known = allocators()
    if name not in known:
        raise SpecError(f"no allocator is called {name!r}; known: {', '.join(known)}")
    module = importlib.import_module(f"{_HOME}.{name}")
    return Allocator(name, module.allocate, getattr(module, "STARTS_FROM", ""))
