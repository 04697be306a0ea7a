"""From running sums to one weighting per item of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waterfill.calibrate.names import Placement
from waterfill.calibrate.sums import Sums
from waterfill.calibrate.tallies import Use

__all__ = ["Evidence", "Role", "Square", "combine", "product_role"]

Vector = NDArray[np.float64]
PRIOR = 2.0  # look-ups that the mean over all rows counts for in each
FLOOR = 0.2  # of a count, given to tokens that the text never showed


@dataclass(frozen=True)
class Square:
    """A second moment by reference: the sums under `keys` averaged, or `values`, or the identity.

    Attributes
    ----------
    keys : keys of `Sums`; their mean is meant
    values : float64 (n, n), where it was combined of several
    """

    keys: tuple[str, ...] = ()
    values: Vector | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Role:
    """One way in which a matrix takes part: harm = 1/2 sum_i rows_i e_i square e_i^T.

    Attributes
    ----------
    kind : linear | expert | conv | embedding
    transposed : whether the matrix in the file is (inputs, outputs)
    rows : float64 (m,)
    square : Square of (n, n)
    notes : list of str
    """

    kind: str
    transposed: bool
    rows: Vector
    square: Square
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What the sums know, per parameter of the running model.

    Attributes
    ----------
    sums : Sums
    tokens : number of tokens that were run
    gradients : whether there was a backward pass
    """

    sums: Sums
    tokens: int
    gradients: bool

    @cached_property
    def _about(self) -> dict[str, Any]:
        return self.sums.all()

    @cached_property
    def uses(self) -> Mapping[tuple[str, int], list[tuple[Use, str]]]:
        """(parameter, slice) -> its uses, each with the key of its inputs."""
        found: dict[tuple[str, int], list[tuple[Use, str]]] = {}
        for about in self._about.values():
            if "use" in about:
                use = Use(*about["use"])
                found.setdefault((use.parameter, use.slice), []).append((use, about["inputs"]))
        return found

    @cached_property
    def slices(self) -> Mapping[str, list[int]]:
        """Parameter of experts -> the slices that took part."""
        found: dict[str, list[int]] = {}
        for (parameter, index), uses in self.uses.items():
            if uses[0][0].kind == "expert":
                found.setdefault(parameter, []).append(index)
        return {name: sorted(indices) for name, indices in found.items()}

    def square(self, square: Square) -> Vector | None:
        """float64 (n, n) per token of the text; None for the identity."""
        if square.values is not None or not square.keys:
            return square.values
        total: Vector | None = None
        for key in square.keys:
            held = self.sums.read(key)
            # An embedding's moment is that of gradients: per look-up, its rows are per token.
            per = self.tokens if key.startswith("inputs ") else max(float(held["tokens"].sum()), 1)
            mean = held.pop("sum")
            mean /= per * len(square.keys)
            total = mean if total is None else np.add(total, mean, out=total)
        return total

    def rows(self, use: Use, inputs: str) -> Vector | None:
        """(outputs,) mean over positions of the squared output gradient; None if there was none."""
        size = use.stop - use.start
        if not self.gradients:
            return np.full(size, 1.0 / size)
        held = self.sums.read(key_of(use))
        if "rows" not in held or not held["rows"].any():
            return None
        return np.asarray(held["rows"] / self.positions(inputs))

    def positions(self, inputs: str) -> float:
        """How many input vectors the sums under a key hold."""
        return max(float(self.sums.read(inputs)["positions"]), 1.0)

    def embedding(self, parameter: str) -> Role | None:
        """Role of a look-up table: rows by frequency, columns by the gradient at its output."""
        key = f"embedding {parameter}"
        held = self.sums.read(key)
        if not held:
            return None
        counts = held["tokens"].astype(np.float64)
        seen = float(counts.sum())
        rows = (counts + FLOOR) / (seen + FLOOR * len(counts)) * seen / self.tokens
        never = int((counts == 0).sum())
        notes = (f"{never} of {len(counts)} rows never looked up",) if never else ()
        if "sum" in held:
            # Some rows matter more each time they are looked up (rare words more than commas).
            # What few look-ups say of a row is drawn towards the mean of all.
            mean = float(held["energy"].sum()) / max(seen, 1)
            each = (held["energy"] + PRIOR * mean) / ((counts + PRIOR) * (mean or 1.0))
            total = rows.sum()
            rows = rows * each
            rows *= total / (rows.sum() or 1.0)
            return Role("embedding", False, rows, Square((key,)), notes)
        return Role("embedding", False, rows / int(self._about[key]["width"]), Square(), notes)


def key_of(use: Use) -> str:
    """Key of a use's row sums."""
    return f"rows {use.parameter}[{use.slice}] {use.axis} {use.start}:{use.stop}"


def product_role(evidence: Evidence, placements: list[Placement]) -> Role | None:
    """Role of a file's matrix in the products that its parameters took part in."""
    parts = []
    for p in placements:
        uses, notes = _uses(evidence, p)
        for use, inputs, rows in uses:
            axis = use.axis if not p.transposed else 1 - use.axis
            out, at = (p.file_rows, p.rows) if axis == 1 else (p.file_columns, p.columns)
            columns, inside = (p.file_columns, p.columns) if axis == 1 else (p.file_rows, p.rows)
            here = (at >= use.start) & (at < use.stop)
            if here.any():
                parts.append((axis, out[here], columns, inside, inputs, rows[at[here] - use.start]))
    if not parts or len({part[0] for part in parts}) > 1:
        return None
    axis = parts[0][0]
    m = 1 + max(int((p.file_rows if axis == 1 else p.file_columns).max()) for p in placements)
    n = 1 + max(int((p.file_columns if axis == 1 else p.file_rows).max()) for p in placements)
    weights = np.zeros(m)
    for _, out, _, _, _, rows in parts:
        np.add.at(weights, out, rows)
    kind = evidence_kind(evidence, placements)
    first = parts[0]
    alike = all(
        p[4] == first[4] and np.array_equal(p[2], first[2]) and np.array_equal(p[3], first[3])
        for p in parts
    )
    if alike and np.array_equal(first[2], first[3]) and len(first[2]) == n:
        return Role(kind, axis == 0, weights, Square(first[4]), notes)
    # In pieces, or in another order: put the squares together, each by the weight of its rows.
    total = sum(float(p[5].sum()) for p in parts) or 1.0
    values = np.zeros((n, n))
    for _, _, columns, inside, inputs, rows in parts:
        square = evidence.square(Square(inputs))
        assert square is not None
        values[np.ix_(columns, columns)] += square[np.ix_(inside, inside)] * rows.sum() / total
    if not alike:
        notes = (*notes, "used in pieces: the second moments of their inputs were averaged")
    return Role(kind, axis == 0, weights, Square(values=values), notes)


def _uses(
    evidence: Evidence, placement: Placement
) -> tuple[list[tuple[Use, tuple[str, ...], Vector]], tuple[str, ...]]:
    """Uses of a placement's parameter: (use, keys of its inputs, rows), and notes."""
    parameter, index = placement.parameter, placement.index or 0
    own = evidence.uses.get((parameter, index), [])
    if own:
        seen = [(use, (inputs,), evidence.rows(use, inputs)) for use, inputs in own]
        return [(use, keys, rows) for use, keys, rows in seen if rows is not None], ()
    siblings = evidence.slices.get(parameter, [])
    if not siblings:
        return [], ()
    pairs = [evidence.uses[parameter, i][0] for i in siblings]
    known = [r for use, inputs in pairs if (r := evidence.rows(use, inputs)) is not None]
    if not known:
        return [], ()
    rows = np.mean(known, axis=0)
    note = f"no token came here: judged by the mean of its {len(siblings)} siblings"
    return [(pairs[0][0], tuple(inputs for _, inputs in pairs), rows)], (note,)


def evidence_kind(evidence: Evidence, placements: list[Placement]) -> str:
    """linear or expert."""
    experts = any(p.parameter in evidence.slices for p in placements)
    return "expert" if experts else "linear"


def combine(evidence: Evidence, roles: list[Role]) -> Role:
    """One role for a matrix that plays several, as a tied embedding does.

    The sum of two Kronecker products is no Kronecker product; the one kept has the right row and
    column marginals, and the right total.
    """
    if len(roles) == 1:
        return roles[0]
    n = next((v.shape[0] for r in roles if (v := evidence.square(r.square)) is not None), 1)
    squares = []
    for role in roles:
        square = evidence.square(role.square)
        squares.append(np.eye(n) if square is None else square)
    traces = [float(np.trace(s)) for s in squares]
    heights = [float(role.rows.sum()) for role in roles]
    total = sum(t * h for t, h in zip(traces, heights, strict=True))
    rows = sum((r.rows * t for r, t in zip(roles, traces, strict=True)), np.zeros(1))
    values = sum((s * h for s, h in zip(squares, heights, strict=True)), np.zeros(1))
    notes = (*(n for r in roles for n in r.notes), "two roles in one: " + _listed(roles))
    # rows sum to `total` and so does the trace: divide once
    return Role(
        roles[0].kind,
        roles[0].transposed,
        np.asarray(rows),
        Square(values=np.asarray(values) / (total or 1.0)),
        notes,
    )


def _listed(roles: list[Role]) -> str:
    names = {"embedding": "look-up table", "linear": "matrix", "expert": "expert", "conv": "filter"}
    return " and ".join(names[r.kind] for r in roles)
