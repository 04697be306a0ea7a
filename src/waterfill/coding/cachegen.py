"""Transform coding of a layer's keys or values to store or send: the table, and what it takes to use it.

Vectors are coded in the basis of least harm (`waterfill.coding.components`), where one step serves all
components of all heads and layers. The table of a stream has its mean and the rows that components stand
for, as small integers; components are then those that these very rows need, so that coarse tables cost
rate, never accuracy. Transform coding with one water level: Goyal 2001.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from waterfill.coding.components import Basis, components_kept
from waterfill.coding.entropy import decode_ints, encode_ints
from waterfill.coding.models import Alphabet
from waterfill.coding.sections import join, split
from waterfill.types import Floats, FormatError

__all__ = ["LEAST", "Table", "analysis_of", "components", "fit_table", "pack_table", "read_table"]

F64 = NDArray[np.float64]
TOP = 31  # of the integers that rows are made of
LARGEST = np.finfo(np.float32).max / TOP  # unit of rows that are finite
LEAST = 1 / 4  # variance, in squared steps, of a component that is worth its row and its symbols
RIDGE = 1e-9


@dataclass(frozen=True, eq=False)
class Table:
    """Of keys or values of a layer.

    Attributes
    ----------
    mean : float32 (heads, width)
    synthesis : float32 (heads, kept, width); a vector is the mean and its components times these rows
    """

    mean: Floats
    synthesis: Floats

    @cached_property
    def across(self) -> Floats:
        """What components are multiplied with: float32 (heads, width, kept)."""
        return np.ascontiguousarray(self.synthesis.swapaxes(1, 2))

    @property
    def components(self) -> int:
        """Components of all heads."""
        return int(self.synthesis.shape[0] * self.synthesis.shape[1])


def fit_table(mean: Floats, basis: Basis, step: float) -> Table:
    """The table that serves vectors with these moments down to a step.

    Parameters
    ----------
    mean : float32 (heads, width)
    basis : of their covariance and the harm of an error
    step : the finest that will be used, in roots of a nat
    """
    kept = components_kept(basis.variances > LEAST * step * step)
    return _rounded(mean, basis.synthesis[:, :kept])


def _rounded(mean: Floats, rows: F64) -> Table:
    """The table as a file holds it."""
    return _table(*_integers(mean, rows))


def _integers(mean: Floats, rows: F64) -> tuple[NDArray[np.float16], Floats, NDArray[np.int8]]:
    unit = (np.abs(rows).max(axis=2) / TOP).astype(np.float32)
    unit[unit == 0] = 1
    whole = np.rint(rows / unit[:, :, None]).astype(np.int8)
    return np.clip(mean, -6e4, 6e4).astype(np.float16), unit, whole


def _table(mean: NDArray[np.float16], unit: Floats, whole: NDArray[np.int8]) -> Table:
    return Table(mean.astype(np.float32), unit[:, :, None] * whole)


def analysis_of(table: Table, harm: Floats) -> Floats:
    """What vectors less the mean are multiplied with: (heads, width, kept), least harm for these rows."""
    rows = table.synthesis.astype(np.float64)
    weighed = rows @ harm.astype(np.float64)
    gram = weighed @ rows.swapaxes(1, 2)
    ridge = RIDGE * np.trace(gram, axis1=1, axis2=2)[:, None, None] / gram.shape[1] + 1e-300
    solved = np.linalg.solve(gram + ridge * np.eye(gram.shape[1]), weighed)
    return np.ascontiguousarray(solved.swapaxes(1, 2), np.float32)


def pack_table(table: Table) -> bytes:
    """A table made by `fit_table` as bytes, exactly."""
    mean, unit, whole = _integers(table.mean, table.synthesis.astype(np.float64))
    kept = whole.shape[1].to_bytes(2, "little")
    # Every value its own symbol: another alphabet saves next to nothing, and takes long to find.
    alphabet = Alphabet(int(whole.min()), int(whole.max()) - int(whole.min()) + 1, False)
    rows = whole.reshape(-1, whole.shape[2]).astype(np.int32)
    codes = encode_ints(rows, None, alphabet=alphabet)
    return join([kept + mean.tobytes() + unit.tobytes(), codes])


def read_table(data: bytes, heads: int, width: int) -> Table:
    """Inverse of `pack_table`; FormatError on bytes that lie."""
    head, codes = split(data, 2)
    kept = int.from_bytes(head[:2], "little")
    if not 1 <= kept <= width or len(head) != 2 + 2 * heads * width + 4 * heads * kept:
        raise FormatError("the table of a layer has not the size it says")
    mean = np.frombuffer(head, "<f2", heads * width, 2).reshape(heads, width)
    unit = np.frombuffer(head, "<f4", heads * kept, 2 + 2 * heads * width)
    if not np.isfinite(mean).all() or not (np.abs(unit) <= LARGEST).all():
        raise FormatError("the table of a layer is not finite")
    whole = decode_ints(codes, heads * kept, width)
    if np.abs(whole).max() > TOP:
        raise FormatError("the table of a layer has rows of larger integers")
    return _table(
        mean, unit.reshape(heads, kept), whole.reshape(heads, kept, width).astype(np.int8)
    )


def components(x: Floats, analysis: Floats) -> Floats:
    """Of vectors (heads, rows, width): (heads, kept, rows)."""
    found: Floats = np.matmul(analysis.swapaxes(1, 2), x.swapaxes(1, 2))
    return found
