"""``python -m bench.gallery [NAME ...] [--json FILE] [--quick]``: all claims, or some modules' only."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator

import bench.gallery
from bench.harness import Row, main

PROTOCOL = (
    "what papers claim, measured with our code on real layers: ratios of predicted nats (1/2 sum r e S e^T, S and r "
    "of the model's own calibration) at equal grid or at equal bytes of payload, summed over six linear layers of "
    "english-7m unless said otherwise; a ratio of at most 1 reproduces the claim. Bars only where one was set"
)
ALL = sorted(m.name for m in pkgutil.iter_modules(bench.gallery.__path__) if m.name[0] != "_")


def run(names: list[str], quick: bool) -> Iterator[Row]:
    """Rows of each module."""
    for name in names:
        yield from importlib.import_module(f"bench.gallery.{name}").rows(quick)


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if word in ALL]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in ALL]
    main("gallery", PROTOCOL, lambda quick: run(chosen or ALL, quick))
