"""The door tests with other versions of transformers: by hand, for it downloads and takes minutes.

``python -m tests.runtime.transformers_range [5.0.0 5.24.0 ...] [-- pytest options]``

Each version goes into a folder of its own, with its own huggingface_hub and tokenizers where the installed
ones do not suit it; all else is shared. No installed package is changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from packaging.requirements import Requirement

OLDEST, NEWEST = "5.0.0", "5.24.0"
TESTS = (
    "tests/runtime/test_door.py",
    "tests/runtime/test_torch_model.py",
    "tests/runtime/test_modules.py",
    "tests/runtime/cache/test_cache.py",
    "tests/runtime/cache/test_generating.py",
    "tests/runtime/cache/test_rotary.py",
)
ROOT = Path(__file__).parents[2]


def pip(folder: Path, *words: str) -> None:
    """Install into a folder."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(folder)]
    subprocess.run([*command, *words], check=True)


def install(number: str, folder: Path) -> None:
    """One version of transformers, and what of its requirements is not met."""
    pip(folder, "--no-deps", f"transformers=={number}")
    (found,) = (d for d in distributions(path=[str(folder)]) if d.name == "transformers")
    unmet = [need for text in found.requires or () if not met(need := Requirement(text))]
    if unmet:
        pip(folder, *(f"{need.name}{need.specifier}" for need in unmet))


def met(need: Requirement) -> bool:
    """Whether what is installed here will do."""
    try:
        return need.marker is not None or version(need.name) in need.specifier
    except PackageNotFoundError:
        return False


def main(words: list[str]) -> int:
    """Run the tests for each version; the exit status is that of the worst."""
    options = words[words.index("--") + 1 :] if "--" in words else []
    numbers = words[: words.index("--")] if "--" in words else words
    worst = 0
    for number in numbers or (OLDEST, NEWEST):
        with tempfile.TemporaryDirectory() as name:
            install(number, Path(name))
            path = os.pathsep.join([name, os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": path, "WATERFILL_TESTS_TRANSFORMERS": number}
            # 5.24 has another name for it, and takes the old one until 5.40.
            calm = ["-W", "ignore:`past_key_values` is deprecated:FutureWarning"]
            command = [sys.executable, "-m", "pytest", "-q", *calm, *TESTS, *options]
            done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
            word = "FAILED" if done.returncode else "passed"
            sys.stdout.write(f"transformers {number}: {word}\n")
            worst = max(worst, done.returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
