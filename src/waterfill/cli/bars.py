"""Progress on stderr, for people who watch."""

from __future__ import annotations

import sys
from typing import Any


class Bars:
    """Progress with time left on stderr: a terminal and rich, or nothing."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        if sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return
            self._progress = progress.Progress(
                progress.TextColumn("{task.description:<24}"),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[count]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                # Else rich would send results to stderr where only that is a terminal.
                redirect_stdout=sys.stdout.isatty(),
            )

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are behind us."""
        self._show(stage, done, total, f"{done}/{total}")

    def nbytes(self, stage: str, done: int, total: int) -> None:
        """The same where the steps are bytes."""
        self._show(stage, done, total, f"{done / 1e6:,.1f}/{total / 1e6:,.1f} MB")

    def _show(self, stage: str, done: int, total: int, count: str) -> None:
        if self._progress:
            if not self._tasks:
                self._progress.start()
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total, count=count)
            self._progress.update(self._tasks[stage], completed=done, total=total, count=count)
