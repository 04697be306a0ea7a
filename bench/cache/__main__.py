"""``python -m bench.cache [NAME ...] [--json FILE] [--quick]``: all claims, or some modules' only."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator

import bench.cache
from bench.harness import Row, main

PROTOCOL = (
    "KL of the next token against the same model with an exact cache, same text, teacher-forced: a prompt of 64 "
    "tokens, then 16 at a time, so that what is older comes from the cache; held-out windows of the model's full "
    "context; bytes are all that the cache holds at a window's end (codes, scales, tables, exact tokens, positions)"
)
ALL = sorted(m.name for m in pkgutil.iter_modules(bench.cache.__path__) if m.name[0] != "_")


def run(names: list[str], quick: bool) -> Iterator[Row]:
    """Rows of each module."""
    for name in names:
        yield from importlib.import_module(f"bench.cache.{name}").rows(quick)


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if word in ALL]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in ALL]
    main("cache", PROTOCOL, lambda quick: run(chosen or ALL, quick))
