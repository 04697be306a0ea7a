"""What every bench shares: a table with the bar beside the figure, JSON, and the exit code."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure. `bar` is None for a figure shown for context only."""

    name: str
    measured: float
    unit: str
    bar: float | None = None
    sense: str = "<="
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the bar holds (true for a row without one)."""
        if self.bar is None:
            return True
        return self.measured <= self.bar if self.sense == "<=" else self.measured >= self.bar


def alone(expression: str, setup: str, **environment: str) -> Any:
    """Value of a Python expression, JSON, in a process that does nothing else, with this environment too."""
    code = f"import json; {setup}; print(json.dumps({expression}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1])


def seconds(call: Callable[[], object], repeat: int = 7, warmup: int = 1) -> float:
    """Median wall-clock seconds of one call."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def shared_data() -> Path:
    """The folder of real models and texts beside the checkout; exits 0 with a word if absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        sys.stdout.write("skipped: no ../shared/data beside this checkout\n")
        raise SystemExit(0)
    return folder


def main_of(package: ModuleType, protocol: str) -> None:
    """As `main`, of a package's modules, or of those that are named: ``rows(quick)`` of each."""
    every = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")
    chosen = [word for word in sys.argv[1:] if word in every]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in every]

    def run(quick: bool) -> Iterator[Row]:
        for name in chosen or every:
            yield from importlib.import_module(f"{package.__name__}.{name}").rows(quick)

    main(package.__name__.removeprefix("bench."), protocol, run)


def main(
    name: str,
    protocol: str,
    run: Callable[[bool], Iterable[Row]],
    more: Callable[[], dict[str, object]] = dict,
) -> None:
    """Parse ``[--json FILE] [--quick]``, run, print, and exit 1 where a bar is missed.

    What `more` gives after the run goes into the JSON too.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=protocol)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="same bars, less work")
    args = parser.parse_args()
    sys.stdout.write(f"bench.{name}: {protocol}\n")
    rows = []
    for row in run(args.quick):
        rows.append(row)
        bar = "" if row.bar is None else f"{row.sense} {row.bar:g}"
        verdict = "" if row.bar is None else ("met" if row.met else "MISSED")
        sys.stdout.write(
            f"  {row.name:<60} {row.measured:>12.5g} {row.unit:<12} {bar:<12} {verdict:<7} {row.note}\n"
        )
        sys.stdout.flush()
    missed = [r.name for r in rows if not r.met]
    sys.stdout.write(
        f"{len(rows)} figures, {len(missed)} missed{': ' if missed else ''}{', '.join(missed)}\n"
    )
    if args.json:
        result = {"bench": name, "protocol": protocol, "quick": args.quick}
        result |= {"rows": [asdict(r) for r in rows], **more()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))
    raise SystemExit(1 if missed else 0)
