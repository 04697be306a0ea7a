"""``python -m tests.golden.make_cache``: writes the stored cache that readers must go on reading.

Run it only for a new version of the format; its files are kept for good.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from tests.coding import cache_arrays
from waterfill.coding.cachegen_layer import read_layers

FOLDER = Path(__file__).parent / "cache"

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "small.kv"
    cache_arrays.write(path, cache_arrays.header())
    levels = {}
    for level in ("fine", "coarse", "exact"):
        pairs = [pair for _, *pair in read_layers(path, level)]
        rounded = [np.round(x * 4096).astype("<i4").tobytes() for pair in pairs for x in pair]
        levels[level] = [hashlib.sha256(x).hexdigest() for x in rounded]
    (FOLDER / "small.json").write_text(json.dumps({"levels": levels}, indent=1) + "\n")
