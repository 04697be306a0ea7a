"""The one contract that every codec signs, and how a codec is found by its id.

Nothing here knows a codec by name: an id is the name of a file in `waterfill.codecs`, or of an entry
point of another package.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import numpy as np

from waterfill.types import (
    DTYPES,
    Array,
    Encoded,
    FormatError,
    Integers,
    Spec,
    SpecError,
    TensorInfo,
    Tunable,
    Weighting,
)

__all__ = [
    "Codec",
    "Inner",
    "codec",
    "codec_ids",
    "find_codec",
    "make_codec",
    "parse_spec",
    "read_spec",
]


class Inner(str):
    """The text of a codec that another one wraps: ``integer:bits=3,group=64``."""

    __slots__ = ()

    @property
    def codec(self) -> Codec:
        """The codec it names."""
        return parse_spec(self)


class Codec:
    """The contract. Subclasses are frozen dataclasses made by the `codec` decorator.

    A codec must be deterministic: same input, same bytes, on every machine when decoding.
    """

    id: ClassVar[str]
    version: ClassVar[int]
    oldest: ClassVar[int] = 1  # version that `decode` still reads
    lossy: ClassVar[bool] = True
    # Names of what `encode` returns, at most: the planner counts what each costs in the header.
    parts: ClassVar[tuple[str, ...]] = ("codes",)
    # Those of them that do not grow with the rows: the planner prices tall matrices by a few rows.
    shared: ClassVar[tuple[str, ...]] = ()
    # Whether the planner weighs it where nobody named a codec; `auto` weighs all there are.
    usual: ClassVar[bool] = False

    @classmethod
    def ladder(cls, info: TensorInfo) -> Iterator[Self]:
        """Operating points of this codec worth pricing for such a tensor, cheapest first."""
        raise NotImplementedError

    @property
    def fair_rows(self) -> int:
        """Rows that a sample must have for the price of it to be the price of a tall matrix.

        More than nothing where what all rows share (`shared`) is fitted to them: it fits a few too well.
        """
        return 0

    def between(self, other: Self, t: float) -> Self | None:
        """A codec at fraction t (0..1) of the way to another rung; None if rungs are discrete."""
        return None

    def encode(
        self, x: Array, info: TensorInfo, weighting: Weighting
    ) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Stored bits (shape and dtype of `info`) -> parts and a little JSON."""
        raise NotImplementedError

    def decode(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo
    ) -> Array:
        """Inverse of `encode`: bits of shape `info.shape`; FormatError on bytes that lie.

        A codec overrides this, or `decode_into`, or both where each has a way of its own.
        """
        if type(self).decode_into is Codec.decode_into:
            raise NotImplementedError
        out = np.empty(info.shape, DTYPES[info.dtype])
        self.decode_into(parts, extra, info, out)
        return out

    def decode_into(
        self, parts: Mapping[str, bytes], extra: Mapping[str, Any], info: TensorInfo, out: Array
    ) -> None:
        """As `decode`, into the caller's array: C-contiguous, `info.shape`, the dtype of `DTYPES`.

        A codec that can do so without an array of its own overrides this. After an error what is
        in `out` means nothing.
        """
        bits = self.decode(parts, extra, info)
        if bits.shape != out.shape or bits.dtype != out.dtype:
            raise FormatError(
                f"{info.name}: decoded to {bits.dtype}{bits.shape}, not {out.dtype}{out.shape}"
            )
        out[...] = bits

    def integers(
        self,
        parts: Mapping[str, bytes],
        extra: Mapping[str, Any],
        info: TensorInfo,
        outline: bool = False,
    ) -> Integers | None:
        """What was encoded as integers times scales; None where values are nothing of the kind.

        An `outline` leaves the levels out and costs next to nothing.
        """
        return None

    @property
    def names(self) -> tuple[str, ...]:
        """Those of `parts` that `encode` returns under these settings."""
        return self.parts

    def layers(
        self, sizes: Mapping[str, int], extra: Mapping[str, Any], info: TensorInfo
    ) -> Sequence[tuple[int, float]] | None:
        """Prefixes that decode by themselves, for files that can be cut; None where there are none.

        Parameters
        ----------
        sizes : bytes of each part, perhaps cut before

        Returns
        -------
        (bytes, nats of harm) of each prefix, shortest first; the last is all there is. Between two of
        them `truncate` may cut too.
        """
        return None

    def at(self, count: int) -> Self:
        """These settings with so many layers: what `encode` gives is a prefix of more layers' bytes."""
        return self

    def truncate(
        self, sizes: Mapping[str, int], extra: Mapping[str, Any], info: TensorInfo, nbytes: int
    ) -> Mapping[str, int]:
        """How much of each part to keep in at most so many bytes: the longest prefix that decodes.

        No less is kept than the first of `layers`. What is kept of a part is its beginning; a part
        that is not named is left out.
        """
        return sizes

    def tunable(self, one: Encoded) -> Tunable | None:
        """What was encoded as codes and numbers that tuning may change; None where there are none."""
        return None

    def retuned(self, tunable: Tunable, one: Encoded) -> dict[str, bytes]:
        """Parts as of `encode`, from what `tunable` made of the same and tuning has changed since.

        Parameters
        ----------
        tunable : with other codes, and other numbers where they are learned; float32, finite
        one : as it was encoded; its `extra` stays
        """
        raise NotImplementedError

    def __str__(self) -> str:
        """For people: the id and the options that differ from their defaults."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        own = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        return str(Spec(self.id, own, self.version))

    @property
    def spec(self) -> Spec:
        """This codec as data, every option included, of codecs inside too."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        config = {f.name: getattr(self, f.name) for f in fields}
        inner = {k: Inner(v.codec.spec) for k, v in config.items() if isinstance(v, Inner)}
        return Spec(self.id, config | inner, self.version)


C = TypeVar("C", bound=Codec)
_REGISTRY: dict[str, type[Codec]] = {}
_ID = re.compile(r"^[a-z][a-z0-9_]*$")
MAX_DEPTH = 6  # codecs one in another: the work of reading and of coding doubles or more with each


@dataclass_transform(frozen_default=True)
def codec(id: str, version: int = 1) -> Callable[[type[C]], type[C]]:
    """Class decorator, outermost: freezes the class as a dataclass, names and registers it."""

    def register(cls: type[C]) -> type[C]:
        frozen = dataclass(frozen=True)(cls)
        if not _ID.match(id):
            raise SpecError(f"codec id {id!r} must be lower-case letters, digits and _")
        if id in _REGISTRY and _REGISTRY[id].__module__ != cls.__module__:
            raise SpecError(f"two codecs claim the id {id!r}")
        frozen.id, frozen.version = id, version
        _REGISTRY[id] = frozen
        return frozen

    return register


def codec_ids() -> list[str]:
    """Ids of every codec that can be found: the gallery, entry points, and those made in this process."""
    outside = {e.name for e in importlib.metadata.entry_points(group="waterfill.codecs")}
    return sorted(_gallery() | outside | _REGISTRY.keys())


def _gallery() -> set[str]:
    package = importlib.import_module("waterfill.codecs")
    return {m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}


def find_codec(id: str) -> type[Codec]:
    """The codec class of this id, imported at first use; SpecError if there is none."""
    if id in _REGISTRY:
        return _REGISTRY[id]
    known = codec_ids()
    if id not in known:
        raise SpecError(f"no codec is called {id!r}; known: {', '.join(known)}")
    # The gallery first: an installed package cannot change what a built-in id means.
    if id in _gallery():
        importlib.import_module(f"waterfill.codecs.{id}")
    else:
        next(iter(importlib.metadata.entry_points(group="waterfill.codecs", name=id))).load()
    if id not in _REGISTRY:
        raise SpecError(f"the package that offers the codec {id!r} does not register it")
    return _REGISTRY[id]


def make_codec(spec: Spec) -> Codec:
    """A codec from its specification; SpecError names what does not fit."""
    return _make(spec, 1)


def _make(spec: Spec, depth: int) -> Codec:
    # Before what is inside is looked at: a file may name any number of them.
    if depth > MAX_DEPTH:
        raise SpecError(f"more than {MAX_DEPTH} codecs, one in another")
    cls = find_codec(spec.id)
    if spec.version < cls.oldest:
        raise FormatError(
            f"codec {spec.id} version {spec.version} cannot be read: this waterfill knows "
            f"versions {cls.oldest} to {cls.version}"
        )
    if spec.version > cls.version:
        raise FormatError(
            f"codec {spec.id} version {spec.version} is newer than this waterfill knows "
            f"({cls.version}); upgrade waterfill to read it"
        )
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in spec.config.items():
        if key not in known:
            raise SpecError(
                f"{spec.id} has no option {key!r}; it has: {', '.join(known) or 'none'}"
            )
        want = type(known[key].default)
        if want is Inner and isinstance(value, str):
            continue
        if want is float and isinstance(value, int) and not isinstance(value, bool):
            continue
        if type(value) is not want:
            raise SpecError(f"{spec.id}: {key} must be {want.__name__}, not {value!r}")
    inner = {k: v for k, v in spec.config.items() if isinstance(known[k].default, Inner)}
    made = {k: Inner(_make(read_spec(v), depth + 1)) for k, v in inner.items()}
    return cls(**{**spec.config, **made})


def parse_spec(text: str) -> Codec:
    """``integer:bits=3,group=128,solver=successive`` -> codec. Inverse of ``str(codec.spec)``.

    A codec inside another stands in parentheses: ``lowrank:rank=8,inner=(integer:bits=3,group=64)``.
    """
    return make_codec(read_spec(text))


def read_spec(text: str) -> Spec:
    """As `parse_spec`, but with only the options that the text names."""
    name, _, rest = text.strip().partition(":")
    cls = find_codec(name)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    config: dict[str, Any] = {}
    for item in filter(None, (s.strip() for s in _split(rest))):
        key, sep, value = item.partition("=")
        if not sep or key not in known:
            raise SpecError(f"{text!r}: {item!r} is not an option; {name} has: {', '.join(known)}")
        config[key] = _read(value, known[key].default, text)
    return Spec(name, config, cls.version)


def _split(text: str) -> list[str]:
    """Apart at the commas that stand in no parentheses."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    if depth:
        raise SpecError(f"{text!r}: a parenthesis is not closed, or never opened")
    return items


def _read(value: str, default: Any, text: str) -> Any:
    if isinstance(default, Inner):
        # Read when the codec is made, once: each level twice would be twice as long for each level.
        return Inner(value[1:-1] if value.startswith("(") and value.endswith(")") else value)
    if isinstance(default, bool):
        if value not in ("yes", "no"):
            raise SpecError(f"{text!r}: say yes or no, not {value!r}")
        return value == "yes"
    try:
        return type(default)(value)
    except ValueError as error:
        raise SpecError(f"{text!r}: {value!r} is not {type(default).__name__}") from error
