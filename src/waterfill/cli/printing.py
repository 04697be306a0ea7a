"""Lines and tables for people."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any


def printable(text: str) -> str:
    """Text from a file, with escapes in place of what would move a terminal's cursor or break a line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def warn(lines: Sequence[str]) -> None:
    """Warnings, on stderr."""
    for line in lines:
        print(f"waterfill: warning: {printable(line)}", file=sys.stderr)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Python's warnings of the body as those of a command."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    warn([str(one.message) for one in caught])


def short(value: Any) -> str:
    """A value as text that fits a line or two."""
    text = json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as their widest cell, those of numbers flush right."""
    cells = [[printable(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = {i for i, h in enumerate(head) if h in ("bytes", "bits", "nats", "changed")}
    for row in cells:
        padded = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())
