"""llama.cpp: a model as GGUF, and a process of its own that generates.

``python -m bench.peers.llama`` builds llama-cpp-python from its sources, with all that this
machine's processor can do; the bench does so by itself unless it is `--quick`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.peers.make import HERE, HOME, Skipped, environment

TYPES = ("Q4_0", "Q4_K_M")


def gguf_files(model: Path, new: bool = True) -> dict[str, Path]:
    """Type -> GGUF file of a Llama checkpoint, converted at first need.

    Raises
    ------
    Skipped
        Where llama-cpp-python is not here and cannot be built within 15 minutes, or `new` is False
        and it has not been.
    """
    venv = environment("llama", new)
    if isinstance(venv, Skipped):
        raise venv
    folder = HOME / "llama" / model.name
    files = {kind: folder / f"{kind}.gguf" for kind in TYPES}
    if not folder.is_dir():
        sys.stderr.write(f"converting {model.name} to GGUF ...\n")
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        script = [venv / "bin" / "python", HERE / "llama_convert.py", model, partial, *TYPES]
        done = subprocess.run(script, capture_output=True, text=True)
        if done.returncode:
            raise Skipped(f"llama.cpp could not convert: {done.stderr.strip()[-160:]}")
        partial.rename(folder)
    return files


class Process:
    """llama.cpp with one model loaded, in a process of its own; a context manager."""

    def __init__(self, file: Path, threads: int) -> None:
        venv = environment("llama")
        if isinstance(venv, Skipped):
            raise venv
        self._process = subprocess.Popen(
            [venv / "bin" / "python", HERE / "llama_decode.py", file, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()

    def seconds(self, prompt: list[int], new: int) -> float:
        """Seconds of ``new - 1`` decode steps, sampling included, after prompt and first token."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("llama.cpp ended without an answer")
        return float(json.loads(answer)["seconds"])


if __name__ == "__main__":
    found = environment("llama")
    sys.stdout.write(f"{found}\n")
    raise SystemExit(isinstance(found, Skipped))
