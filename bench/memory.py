"""Peak memory of compress against the model's size. ``python -m bench.memory [--json FILE] [--quick]``"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from bench.bigmodel import Llama, random_llama
from bench.harness import Row, main
from bench.models import WORK

PROTOCOL = (
    "a random Llama (bf16, hidden 1024, feed-forward 2816, vocabulary 8192, 24 blocks, 279 M parameters) is "
    "compressed to 3 bits in a process of its own with 4096 (512) calibration tokens; "
    "peak = ru_maxrss of that process, Python, torch and transformers included; size = 4 bytes a parameter"
)
CHILD = """
import resource, sys
from waterfill.pipeline import compress
record = compress(sys.argv[1], sys.argv[2], bits=3.0, tokens=int(sys.argv[3]), force=True)
print(record.about["params"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


SIZES = Llama(1024, 2816, 24, 16, 4, 8192, 512, tied=True)


def run(quick: bool) -> Iterator[Row]:
    """Peak over size."""
    tokens = 512 if quick else 4096
    model = WORK / f"random-llama-{SIZES.blocks}"
    if not (model / "model.safetensors").exists():
        random_llama(model, SIZES)
    out = subprocess.run(
        [sys.executable, "-c", CHILD, str(model), str(WORK / "memory"), str(tokens)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    params, peak = map(int, out.split())
    yield Row("parameters", params / 1e6, "million", 200, ">=")
    yield Row("size in fp32", 4 * params / 1e6, "MB")
    yield Row("peak memory of compress", peak / 1e6, "MB")
    yield Row("peak / size in fp32", peak / (4 * params), "", 0.6)


if __name__ == "__main__":
    main("memory", PROTOCOL, run)
