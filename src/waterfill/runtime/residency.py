"""How the weights of a model lie in memory: what each way takes, and the fastest that fits.

Three ways, chosen at load. *dense*: a tensor of the original dtype. *packed*: low-bit integers, as
kernels read them. *coded*: entropy-coded, decoded within the product; what a codec cannot give as integers
stays as it is in the file and is decoded as a whole for each use. A tensor for which a way is
not open, or does not pay, is dense.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waterfill.coding.codebook import ENTRIES, CodebookMatrix
from waterfill.coding.coded import CodedMatrix
from waterfill.coding.packed import PackedMatrix
from waterfill.container import Entry, Reader
from waterfill.plan import hull
from waterfill.plan.budget import parse_size
from waterfill.registry import make_codec
from waterfill.runtime.arrays import damage_of
from waterfill.types import (
    DTYPES,
    FLOAT_DTYPES,
    BudgetError,
    Integers,
    Point,
    Spec,
    TensorInfo,
    WaterfillError,
)

__all__ = [
    "MATRICES",
    "RESIDENCIES",
    "Estimate",
    "Row",
    "check",
    "choose",
    "estimate",
    "forms_for",
    "matrix_class",
    "rows_of",
]

RESIDENCIES = ("dense", "packed", "coded")
MATRICES: Mapping[str, Any] = {"packed": PackedMatrix, "coded": CodedMatrix}
TABLE_BITS = 4  # of the codes where levels are looked up
# Decoded at a time where many vectors meet a packed or coded weight; coded rows begin in such steps.
TILE_ROWS = 1024


@dataclass(frozen=True)
class Speeds:
    """What a product with one vector runs at, on one thread: only the ratios matter.

    As ``python -m bench.matvec`` and ``python -m bench.lossless`` measured them on a Zen 4 server with
    AVX-512; torch's own product with dense weights.
    """

    dense_weights: float = 4.6e9  # per second, bfloat16 and float32 alike
    packed_nbytes: float = 21e9
    coded_weights: float = 4.7e9
    streamed_nbytes: float = 5.5e9  # decoded; the dense product comes on top


SPEEDS = Speeds()
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Row:
    """A tensor and what it would take in memory.

    Attributes
    ----------
    name : str
    shape : tuple of int
        As a matrix.
    dense : int
        Bytes, of all copies that a model keeps.
    packed, coded : int or None
        Bytes, or None where that way is not open.
    streamed : bool
        Whether *coded* means decoded as a whole for each use, not within the product.
    products : int
        With how many vectors it is multiplied for one token; 0 if only looked up.
    itemsize : int
        Bytes of a decoded weight.
    """

    name: str
    shape: tuple[int, ...]
    dense: int
    packed: int | None = None
    coded: int | None = None
    streamed: bool = False
    products: int = 1
    itemsize: int = 4

    def nbytes(self, residency: str) -> int | None:
        """Bytes in one form, or None."""
        found: int | None = getattr(self, residency)
        return found

    def scratch(self, residency: str) -> int:
        """Bytes of the shared buffer that it needs."""
        if residency == "dense":
            return 0
        whole = residency == "coded" and self.streamed
        rows = self.shape[0] if whole else min(self.shape[0], TILE_ROWS)
        return rows * math.prod(self.shape[1:]) * self.itemsize

    def seconds(self, residency: str) -> float:
        """Roughly, for one token."""
        m, n = self.shape[0] if self.shape else 1, math.prod(self.shape[1:])
        if residency == "dense":
            return self.products * m * n / SPEEDS.dense_weights
        if residency == "packed":
            return self.products * (self.packed or 0) / SPEEDS.packed_nbytes
        if self.streamed:
            decoded = max(self.products, 1) * m * n * self.itemsize
            return decoded / SPEEDS.streamed_nbytes + self.seconds("dense")
        looked_up = min(m, TILE_ROWS) / 2  # a row is reached through those before it
        return (self.products * m or looked_up) * n / SPEEDS.coded_weights


@dataclass(frozen=True)
class Estimate:
    """Memory for the weights of an artifact, before anything is decoded."""

    rows: tuple[Row, ...]

    def nbytes(self, forms: str | Mapping[str, str]) -> int:
        """Bytes of all weights and of the buffer they share, in one residency or one for each tensor."""
        chosen = forms_for(self.rows, forms) if isinstance(forms, str) else forms
        total = scratch = 0
        for row in self.rows:
            form = chosen.get(row.name, "dense")
            total += row.nbytes(form) or 0
            scratch = max(scratch, row.scratch(form))
        return total + scratch

    @property
    def least_nbytes(self) -> int:
        """The least that any choice takes."""
        return min(
            limit + sum(min(r.nbytes(f) or 0 for f in _options(r, limit)) for r in self.rows)
            for limit in _limits(self.rows)
        )


def check(residency: str) -> str:
    """The residency, or WaterfillError if it is none."""
    if residency not in RESIDENCIES:
        raise WaterfillError(f"residency is {', '.join(RESIDENCIES)}; not {residency!r}")
    return residency


def estimate(path: str | Path, dtype: str | None = None) -> Estimate:
    """What a model would take in memory in each residency; nothing is decoded.

    Taken from the artifact alone: weights that transformers joins into one tensor (experts) count
    as dense, as they are loaded. The KV cache and activations are not in it, nor torch itself.

    Parameters
    ----------
    path : artifact folder or its weights file
    dtype : safetensors name of the dtype that dense weights are loaded in; default as stored
    """
    with Reader(path) as reader:
        tied = _tied(reader.path.parent)
        uses: dict[str, int] = {}
        for name, entry in reader.entries.items():
            if _may_stay(entry.info):
                root = entry.info.group or name
                product = entry.info.kind != "embedding" or (tied and root == name)
                uses[root] = uses.get(root, 0) + product
        return Estimate(tuple(rows_of(reader, uses, dtype, tied)))


def _may_stay(info: TensorInfo) -> bool:
    """Whether this is the weight of a module of its own, as far as its name and kind tell."""
    if info.index is not None or len(info.shape) != 2 or not info.name.endswith(".weight"):
        return False
    # A lossless artifact knows no kinds.
    expert = info.kind == "other" and _EXPERT.search(info.name)
    return info.kind in ("linear", "embedding", "other") and not expert


def _tied(path: Path) -> bool:
    """Whether config.json has the output weights tied to the embedding."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        inner = config.get("text_config", config)
        return bool(inner.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    except (OSError, ValueError, AttributeError):
        return False


def rows_of(
    reader: Reader, uses: Mapping[str, int], dtype: str | None = None, tied: bool = True
) -> Iterator[Row]:
    """A row per tensor that is stored, aliases counted in.

    Parameters
    ----------
    uses : tensors that may stay packed or coded -> products per token
    dtype : as of `estimate`
    tied : whether tensors that repeat another share its memory when dense
    """
    copies: dict[str, int] = {}
    for name, entry in reader.entries.items():
        copies[entry.info.group or name] = (
            1 if tied else copies.get(entry.info.group or name, 0) + 1
        )
    for name, entry in reader.entries.items():
        info = entry.info
        if info.group:
            continue
        wide = dtype is not None and info.dtype in FLOAT_DTYPES
        itemsize = DTYPES[dtype if wide and dtype else info.dtype].itemsize
        dense = copies[name] * info.size * itemsize
        if name in uses and len(info.shape) == 2 and info.size and info.dtype in FLOAT_DTYPES:
            yield _row(reader, entry, dense, uses[name], itemsize)
        else:
            yield Row(name, info.shape, dense, itemsize=itemsize)


def _row(reader: Reader, entry: Entry, dense: int, products: int, itemsize: int) -> Row:
    info = entry.info
    outline = integers_of(reader, info.name, outline=True)
    packed = coded = None
    if outline is not None:
        packed = matrix_class("packed", outline).expected_nbytes(outline, entry.nbytes)
        coded = CodedMatrix.expected_nbytes(outline, entry.nbytes)
    streamed = coded is None
    return Row(
        info.name,
        info.matrix_shape,
        dense,
        packed if packed is not None and packed < dense else None,
        entry.nbytes if streamed else coded,
        streamed,
        products,
        itemsize,
    )


def matrix_class(form: str, integers: Integers) -> Any:
    """What holds a matrix in a form: packed, few levels that need many bits are codes of a table."""
    if form == "packed" and 0 < integers.entries <= ENTRIES and integers.bits > TABLE_BITS:
        return CodebookMatrix
    return MATRICES[form]


def integers_of(reader: Reader, name: str, outline: bool = False) -> Integers | None:
    """What a tensor holds as integers; FormatError if it is damaged."""
    encoded = reader.read(name)
    with damage_of(name):
        codec = make_codec(encoded.spec)
        return codec.integers(encoded.parts, encoded.extra, encoded.info, outline)


def forms_for(rows: Iterable[Row], residency: str) -> dict[str, str]:
    """Tensor -> its form in one residency: dense where the form is not open or saves nothing."""
    check(residency)
    return {row.name: residency for row in rows if _pays(row, residency)}


def _pays(row: Row, form: str) -> bool:
    nbytes = row.nbytes(form)
    return form != "dense" and nbytes is not None and nbytes < row.dense


def choose(rows: Iterable[Row], memory: str | int) -> dict[str, str]:
    """Tensor -> the form that makes the model fastest within a memory, by the planner's water level.

    Parameters
    ----------
    rows : of `rows_of` or an `Estimate`
    memory : bytes, or text such as ``1.2GB``, for weights and the buffer they share

    Raises
    ------
    BudgetError
        If no choice fits; it states the least that does.
    """
    rows = tuple(rows)
    nbytes = parse_size(memory) if isinstance(memory, str) else int(memory)
    within = (_fastest(rows, nbytes, limit) for limit in _limits(rows))
    fitting = [forms for forms in within if forms is not None]
    if not fitting:
        least = Estimate(rows).least_nbytes
        raise BudgetError(
            f"the weights need at least {least:,} bytes of memory, and {nbytes:,} were allowed"
        )
    return min(fitting, key=lambda forms: sum(r.seconds(forms[r.name]) for r in rows))


def _limits(rows: Iterable[Row]) -> list[int]:
    """Sizes that the shared buffer may have."""
    return sorted({0, *(row.scratch(f) for row in rows for f in RESIDENCIES if _pays(row, f))})


def _options(row: Row, limit: int) -> list[str]:
    """Forms that save something and need no larger buffer; dense always."""
    return ["dense", *(f for f in RESIDENCIES if _pays(row, f) and row.scratch(f) <= limit)]


def _fastest(rows: tuple[Row, ...], nbytes: int, limit: int) -> dict[str, str] | None:
    """The best choice of forms beside a buffer of `limit` bytes; None if none fits."""
    if not rows:
        return {}
    options = {row.name: _options(row, limit) for row in rows}
    prices = {
        row.name: [
            Point(row.nbytes(form) or 0, row.seconds(form), Spec(form))
            for form in options[row.name]
        ]
        for row in rows
    }
    curves = hull.curves(prices)
    room = nbytes - limit
    if hull.smallest(curves) > room:
        return None
    taken, _, picked = hull.at_level(curves, hull.solve_level(curves, room))
    forms = {
        name: curves.ends[int(segment)][0].spec.id
        for name, segment in zip(options, picked, strict=True)
    }
    return _spend(rows, options, forms, room - int(taken.sum()))


def _spend(
    rows: tuple[Row, ...], options: Mapping[str, list[str]], forms: dict[str, str], left: int
) -> dict[str, str]:
    """Use the bytes that one level for all leaves over, where they save most time for a byte."""
    steps = []
    for row in rows:
        now = forms[row.name]
        for form in options[row.name]:
            saved = row.seconds(now) - row.seconds(form)
            more = (row.nbytes(form) or 0) - (row.nbytes(now) or 0)
            if saved > 0 and more <= left:
                steps.append((saved / max(more, 1), row.name, form, more))
    done: set[str] = set()
    for _, name, form, more in sorted(steps, reverse=True):
        if name not in done and more <= left:
            forms[name], left = form, left - more
            done.add(name)
    return forms
