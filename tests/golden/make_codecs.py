"""Write golden files for codec settings that have none yet. Existing ones are never touched."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from waterfill.registry import parse_spec
from waterfill.types import TensorInfo, Weighting, from_float32


def main(texts: list[str]) -> None:
    folder = Path(__file__).parent / "codecs"
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(2026)
    info = TensorInfo("golden", (40, 36), "BF16", "linear")
    bits = from_float32(random.normal(0, 0.02, info.shape).astype(np.float32), "BF16")
    inputs = random.normal(size=(200, 36)) * np.linspace(0.2, 3, 36)
    moment = (inputs.T @ inputs / 200).astype(np.float32)
    weighting = Weighting(moment, np.linspace(0.1, 10, 40).astype(np.float32))
    for text in texts:
        path = folder / (text.replace(":", "-").replace(",", "-").replace("=", "_") + ".json")
        if path.exists():
            continue
        chosen = parse_spec(text)
        parts, extra = chosen.encode(bits, info, weighting)
        decoded = chosen.decode(parts, extra, info)
        stored = {
            "codec": chosen.spec.to_json(),
            "shape": list(info.shape),
            "dtype": info.dtype,
            "extra": extra,
            "parts": {k: v.hex() for k, v in parts.items()},
            "decoded": decoded.tobytes().hex(),
        }
        path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
