"""What a model takes in memory while it is loaded and while it generates: seen from outside.

A child process loads and runs; between two phases it waits for the parent, which meanwhile reads
the child's memory about a thousand times a second. Counted is RssAnon + RssShmem: what the process
has allocated. Pages of mapped files (RssFile: libraries, and weights that transformers leaves in
their file) are the kernel's to drop, and are not counted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bigmodel import artifact
from bench.models import source_of

PROMPT, NEW = 32, 8


@dataclass(frozen=True)
class Way:
    """One way to load a model: plain transformers where `codec` is empty, else an artifact."""

    codec: str = ""
    residency: str = ""

    def path(self, model: str | Path) -> Path:
        """The folder it loads."""
        if self.codec:
            return artifact(model, self.codec)
        return Path(str(source_of("demo").path)) if model == "demo" else Path(model)

    def load(self, path: Path) -> Any:
        """The model."""
        if self.codec:
            import waterfill

            return waterfill.load_model(path, residency=self.residency)
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


@dataclass(frozen=True)
class Phase:
    """Memory of the child in one phase, in bytes.

    Attributes
    ----------
    peak : most at any time in it
    end : what it has as the phase ends
    file : mapped files as it ends
    seconds : that the child says its work took
    """

    peak: int
    end: int
    file: int
    seconds: float


def phases(way: Way, model: Path, watched: bool = True) -> dict[str, Phase]:
    """Phases of a fresh process: base (libraries at work), load, generate.

    Parameters
    ----------
    watched : False leaves the child alone, so that its time is right and peaks are not
    """
    names = [str(way.path("demo")), str(way.path(model))]
    command = "from bench.footprint import child; child()"
    with subprocess.Popen(
        [sys.executable, "-c", command, way.codec, way.residency, *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin and process.stdout
        found: dict[str, Phase] = {}
        peak = 0
        while True:
            ready, _, _ = select.select([process.stdout], [], [], 0.001 if watched else None)
            if not ready:
                peak = max(peak, memory(process.pid)[0])
                continue
            line = process.stdout.readline()
            if not line:
                break
            said = json.loads(line)
            now, file = memory(process.pid)
            found[said["phase"]] = Phase(max(peak, now), now, file, said["seconds"])
            peak = 0
            process.stdin.write(b"\n")
            process.stdin.flush()
    if process.returncode or "generate" not in found:
        raise RuntimeError(f"{way}: the process failed in the phase after {list(found)}")
    return found


def memory(pid: int) -> tuple[int, int]:
    """Bytes that a process has allocated and that are in memory, and those of files it has mapped."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = {key: 1024 * int(kib) for key, kib in re.findall(r"^Rss(\w+):\s+(\d+) kB", text, re.M)}
    return found.get("Anon", 0) + found.get("Shmem", 0), found.get("File", 0)


def child() -> None:
    """The process that is watched: codec, residency, demo, model on its command line."""
    codec, residency, demo, path = sys.argv[1:]
    way = Way(codec, residency)
    start = time.perf_counter()
    _warm_up(way, Path(demo), Path(path))
    _tell("base", start)
    start = time.perf_counter()
    model = way.load(Path(path))
    for tensor in model.state_dict().values():
        if hasattr(tensor, "flatten"):
            tensor.flatten()[:: 4096 // tensor.element_size()].sum()  # each page once
    _tell("load", start)
    start = time.perf_counter()
    _generate(model, NEW)
    _tell("generate", start)


def _warm_up(way: Way, demo: Path, path: Path) -> None:
    """All that does not grow with the model: libraries, threads, their caches; the model on meta."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _generate(way.load(demo), 4)
    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _generate(model: Any, new: int) -> None:
    import torch

    model.generation_config.eos_token_id = None
    ids = torch.arange(2, 2 + PROMPT)[None]
    model.generate(ids, do_sample=False, max_new_tokens=new, pad_token_id=0)


def _tell(phase: str, start: float) -> None:
    seconds = time.perf_counter() - start
    gc.collect()
    sys.stdout.write(json.dumps({"phase": phase, "seconds": seconds}) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()
