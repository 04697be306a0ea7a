"""The nouns. Rate is bytes in the file; distortion is nats per token of KL(original || compressed).

Exceptions
----------
::

    WaterfillError              what a user can mend; the message says how
    ├── FormatError             bytes that are not what they claim to be
    ├── BudgetError             a size that cannot be met
    └── SpecError               a codec string or option that does not parse
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DTYPES",
    "BudgetError",
    "Encoded",
    "FormatError",
    "Integers",
    "Plan",
    "Point",
    "Record",
    "Spec",
    "SpecError",
    "TensorInfo",
    "Term",
    "Tunable",
    "WaterfillError",
    "Weighting",
    "is_shape",
    "to_float32",
]

Floats = NDArray[np.float32]
Array = NDArray[Any]


class WaterfillError(Exception):
    """Something a user can mend; the message says what and how."""


class FormatError(WaterfillError):
    """Bytes that are not what they claim to be."""


class BudgetError(WaterfillError):
    """A size that cannot be met; the message states the nearest that can."""


class SpecError(WaterfillError):
    """A codec string, pattern or option that does not parse."""


# What safetensors calls a dtype -> how its bits are held in numpy. Types that numpy lacks travel
# as unsigned integers of their width; `to_float32` and `from_float32` know what the bits mean.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
ROWS = 1024  # of a matrix whose error is weighed at a time: a tall one is not copied
TOGETHER = 1 << 15  # numbers that are rounded at a time
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
FEWEST = 256  # weights: of fewer, what a codec must say beside its codes is most of it


def is_shape(shape: Sequence[int]) -> bool:
    """Whether an array may have this shape, as far as a file is concerned; few machines hold the largest."""
    # Even an array of nothing must not have axes that no array has.
    fits = len(shape) <= 32 and all(0 <= d < 2**48 for d in shape)
    return fits and math.prod(d or 1 for d in shape) < 2**60


def to_float32(bits: Array, dtype: str) -> Floats:
    """Values of a stored array as float32 (F64 is rounded; BF16 and F16 are exact)."""
    if dtype == "BF16":
        return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
    if dtype not in FLOAT_DTYPES:
        raise SpecError(f"dtype {dtype} holds no weights that can be rounded")
    with np.errstate(over="ignore"):
        return bits.astype(np.float32)


def from_float32(values: Floats, dtype: str) -> Array:
    """Float32 values rounded (to nearest, ties to even) to the storage form of `dtype`."""
    if dtype == "BF16":
        values = np.ascontiguousarray(values, np.float32)
        out = np.empty(values.shape, np.uint16)
        flat, into = values.reshape(-1), out.reshape(-1)
        # A few at a time: the steps between then stay in a cache.
        for first in range(0, flat.size, TOGETHER):
            part = slice(first, first + TOGETHER)
            into[part] = _to_bfloat16(flat[part])
        return out
    if dtype not in FLOAT_DTYPES:
        raise SpecError(f"dtype {dtype} holds no weights that can be rounded")
    with np.errstate(over="ignore"):
        return values.astype(DTYPES[dtype])


def _to_bfloat16(values: Floats) -> Array:
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(values)
    if nan.any():
        # Rounding would carry a NaN's mantissa into its sign: keep it a NaN, made quiet.
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor without reading it.

    A fused expert tensor (experts, rows, columns) is handled one expert at a time: each slice is
    an item of its own, named ``tensor[index]``, with the slice's shape.

    Attributes
    ----------
    name : str
        Name in the checkpoint, with ``[index]`` appended for a slice.
    shape : tuple of int
        Shape as stored (of the slice, for a slice).
    dtype : str
        A key of `DTYPES`.
    kind : str
        linear | embedding | conv | expert | norm | other.
    group : str
        The tensor this one repeats bit for bit (stored once), or "".
    index : int or None
        Which slice of its tensor along the first axis, or None for the whole.
    transposed : bool
        True where the stored matrix is (inputs, outputs), as in GPT-2's Conv1D.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str = "other"
    group: str = ""
    index: int | None = None
    transposed: bool = False

    @property
    def tensor(self) -> str:
        """Name of the checkpoint tensor that this is, or is a slice of."""
        return self.name if self.index is None else self.name.rsplit("[", 1)[0]

    @property
    def size(self) -> int:
        """Number of parameters."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def nbytes(self) -> int:
        """Bytes as stored in the original checkpoint."""
        return self.size * DTYPES[self.dtype].itemsize

    @property
    def worth_rounding(self) -> bool:
        """Whether a lossy codec should offer to take it: a matrix of floats, and no small one."""
        return self.dtype in FLOAT_DTYPES and len(self.shape) >= 2 and self.size >= FEWEST

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(outputs m, inputs n) of the matrix a codec sees; a vector is one row."""
        if len(self.shape) < 2:
            return 1, self.size
        if self.transposed:
            return self.size // max(self.shape[0], 1), self.shape[0]
        return self.shape[0], self.size // max(self.shape[0], 1)

    def matrix(self, bits: Array) -> Floats:
        """Stored bits -> float32 (m, n)."""
        values = to_float32(bits, self.dtype)
        m, n = self.matrix_shape
        return np.ascontiguousarray(
            values.reshape(n, m).T if self.transposed else values.reshape(m, n)
        )

    def unmatrix(self, matrix: Floats) -> Array:
        """Float32 (m, n) -> bits of the stored shape and dtype."""
        return self.arrange(from_float32(matrix, self.dtype))

    def arrange(self, matrix: Array) -> Array:
        """Matrix (m, n) -> the stored shape, in the same dtype."""
        return np.ascontiguousarray(matrix.T if self.transposed else matrix).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Weighting:
    """Local model of harm: ``distortion = 1/2 sum_i r_i e_i S e_i^T`` nats per token.

    With S the second moment of the layer's inputs and r_i the second moment of the loss gradient
    at output i (the diagonal of the Kronecker-factored Fisher matrix, Martens & Grosse 2015), this
    is KL(original || compressed) to second order.

    Attributes
    ----------
    second_moment : float32 (n, n), float32 (n,) for a diagonal, or None for the identity
    row_weights : float32 (m,) or a float for all rows alike
    """

    second_moment: Floats | None = None
    row_weights: Floats | float = 1.0

    def distortion(self, x: Floats, y: Floats) -> float:
        """Predicted nats per token of replacing matrix x (m, n) by y (m, n)."""
        per_row = np.empty(len(x))
        for first in range(0, len(x), ROWS):
            part = slice(first, first + ROWS)
            error = x[part].astype(np.float32, copy=False) - y[part]
            if self.second_moment is None:
                weighted = error
            elif self.second_moment.ndim == 1:
                weighted = error * self.second_moment
            else:
                weighted = error @ self.second_moment
            per_row[part] = np.einsum("ij,ij->i", error, weighted, dtype=np.float64)
        return float(0.5 * np.sum(per_row * self.row_weights))


@dataclass(frozen=True)
class Spec:
    """A codec and its configuration as data; JSON in files, a string for people."""

    id: str
    config: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1

    def __str__(self) -> str:
        options = ",".join(f"{k}={_show(v)}" for k, v in self.config.items())
        return f"{self.id}:{options}" if options else self.id

    def to_json(self) -> list[Any]:
        """``[id, version, config]``."""
        return [self.id, self.version, dict(self.config)]

    @classmethod
    def from_json(cls, value: Any) -> Spec:
        """Inverse of `to_json`; raises FormatError on any other shape."""
        match value:
            case [str(name), int(version), dict(config)]:
                return cls(name, config, version)
        raise FormatError(f"not a codec specification: {json.dumps(value)[:80]}")


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return repr(value)
    text = str(value)
    return f"({text})" if "," in text or "=" in text else text


@dataclass(frozen=True)
class Encoded:
    """A tensor as coded: named byte strings and a little JSON.

    Attributes
    ----------
    spec : Spec
    info : TensorInfo
    parts : mapping of part name to bytes
    extra : JSON-able mapping that `Codec.decode` gets back
    """

    spec: Spec
    info: TensorInfo
    parts: Mapping[str, bytes]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts; the container adds its index entry on top."""
        return sum(len(p) for p in self.parts.values())


@dataclass(frozen=True, eq=False)
class Integers:
    """A matrix (m, n) as integers times scales, for kernels that compute with the integers.

    Element (i, j) is ``(levels[i, j] * columns[j]) * rows[i, j // group]``, both products in float32, then
    rounded to the dtype of the tensor: bit for bit what the codec decodes to.

    Attributes
    ----------
    levels : int8, int16 or int32 (m, n), or None
        None in an outline, which is read without decoding.
    columns : float32 (n,)
    rows : float32 (m, ceil(n / group))
    group : int
        Columns that share a row's scale.
    states : int
        Levels are those of a trellis path of so many states (1: any integer); see
        `waterfill.coding.trellis`.
    spread : float32 (n,)
        Standard deviation that the coder expects of each column's levels.
    bits : int
        Every level fits in so many, as a signed number; 0 where there is no such bound.
    entries : int
        Levels are of so many numbers at most; 0 where there is no such bound.
    """

    levels: Array | None
    columns: Floats
    rows: Floats
    group: int
    states: int
    spread: Floats
    bits: int = 0
    entries: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs m, inputs n)."""
        return len(self.rows), len(self.columns)

    def values(self, first: int = 0, last: int | None = None) -> Floats:
        """Float32 (last - first, n) of some rows, not yet rounded to the tensor's dtype."""
        if self.levels is None:
            raise ValueError("an outline has no levels")
        rows = np.repeat(self.rows[first:last], self.group, axis=1)[:, : len(self.columns)]
        with np.errstate(over="ignore", under="ignore"):
            values: Floats = self.levels[first:last].astype(np.float32)
            values *= self.columns
            values *= rows
        return values


@dataclass(frozen=True, eq=False)
class Term:
    """Blocks of a matrix, each of them an entry of a table.

    Attributes
    ----------
    codes : int32 (M, N), not negative
        Which entry each block is. M blocks reach down all rows and N across all columns; what of
        the last ones sticks out counts for nothing.
    table : float32 (books, entries, height, width)
        With blocks of height and width 1 an entry is a number, else a vector or a tile. Entries that
        a book lacks are NaN.
    book : int32, broadcast to the shape of `codes`
        Which of the books a block is taken from.
    """

    codes: Array
    table: Floats
    book: Array


@dataclass(frozen=True, eq=False)
class Tunable:
    """A coded matrix (m, n) as what tuning may change of it: codes, and numbers beside them.

    Element (i, j) is ``sum of the terms * columns[j] * scales[i, j // group]``.

    Attributes
    ----------
    shape : (outputs m, inputs n)
    terms : tuple of Term
    scales : float32 (m, ceil(n / group)), or (1, ceil(n / group)) where all rows share them
    group : int
        Columns that share a scale.
    columns : float32 (n,)
    learned : names of what may change beside the codes: ``scales``, ``columns``, ``tables``
    fixed : float32 (m, n), or None
        Elements that stay as they are, whatever their code; NaN for all others.
    coded : bool
        Codes are entropy coded: rare ones take more bytes.
    """

    shape: tuple[int, int]
    terms: tuple[Term, ...]
    scales: Floats
    group: int
    columns: Floats
    learned: frozenset[str]
    fixed: Floats | None = None
    coded: bool = False

    def values(self) -> Floats:
        """Float32 (m, n), not rounded to a dtype; a codec's own products may differ in the last bits."""
        m, n = self.shape
        whole = np.zeros(self.shape, np.float32)
        for term in self.terms:
            books = np.broadcast_to(term.book, term.codes.shape)
            blocks = term.table[books, term.codes].transpose(0, 2, 1, 3)
            rows, height, columns, width = blocks.shape
            whole += blocks.reshape(rows * height, columns * width)[:m, :n]
        whole = whole * self.columns * np.repeat(self.scales, self.group, axis=1)[:, :n]
        return whole if self.fixed is None else np.where(np.isnan(self.fixed), whole, self.fixed)


@dataclass(frozen=True)
class Point:
    """One operating point of one tensor: bytes, nats per token, and what makes it."""

    nbytes: float
    distortion_nats: float
    spec: Spec


@dataclass(frozen=True)
class Plan:
    """What each tensor will be coded with, to meet one budget.

    Attributes
    ----------
    choices : tensor name -> Point
    why : tensor name -> the reason in a few words
    budget_nbytes : int
        Bytes the weights file may have.
    predicted_nats : float
    water_level : float
        Nats per byte that one more byte would save: the slope at which every tensor of a plan by the
        hull stopped.
    """

    choices: Mapping[str, Point]
    why: Mapping[str, str]
    budget_nbytes: int
    predicted_nats: float
    water_level: float


@dataclass(frozen=True)
class Record:
    """One result, as JSON: what a report is drawn from.

    Attributes
    ----------
    name : str
    nbytes : int
        Size of the weights file.
    bits_per_weight : float
    metrics : measured figures (perplexity, kl_nats, top1_agreement, ...) with their protocol
    predicted : predicted figures (kl_nats, ...)
    ledger : a row per tensor
    curve : predicted rate-distortion points of the whole model around this budget
    about : command line, versions, texts
    """

    name: str
    nbytes: int
    bits_per_weight: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)
    ledger: tuple[Mapping[str, Any], ...] = ()
    curve: tuple[Mapping[str, Any], ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A plain dict, ready for json.dumps."""
        return dataclasses.asdict(self)
