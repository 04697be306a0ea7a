"""Which text, and how much damping? ``python -m bench.calibration [--json FILE] [--quick]``"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from bench.harness import Row, main, shared_data
from bench.models import WINDOW, WORK, source_of, text_of
from bench.sensitivity import Texts, statistics_for
from waterfill.pipeline import compare, compress

PROTOCOL = (
    "KL(original || compressed) at 2 and 3 bits (3 with --quick) and equal file size, statistics of 32768 tokens; "
    "english-7m on english_heldout.txt, demo on the packaged evaluation text, 16384 tokens (4096 with --quick); "
    "mix = c4, wiki and technical; self = text the model writes itself. No bars: these are choices, and what they cost"
)


def texts_of(name: str) -> dict[str, Texts]:
    """Calibration texts to compare."""
    folder = shared_data() / "text"
    mix: Texts = [folder / f"{kind}.txt" for kind in ("c4", "wiki", "technical")]
    if name == "demo":
        return {"packaged": None, "self": "self"}
    return {"wiki": [folder / "wiki.txt"], "mix": mix, "packaged": None, "self": "self"}


def harm(name: str, calibration: Path, bits: float, damping: float, tokens: int) -> float:
    """Nats per token on held-out text."""
    out, path = WORK / "calibration", source_of(name).path
    assert path is not None
    shutil.rmtree(out, ignore_errors=True)
    codec = {"*": f"trellis:damping={damping}"}
    compress(str(path), out, bits=bits, calibration=calibration, codec=codec)
    text = None if name == "demo" else [text_of(name, held_out=True)]
    kl: float = compare(out, path, text, window=WINDOW[name], tokens=tokens)["kl_nats"]
    return kl


def run(quick: bool) -> Iterator[Row]:
    """Every text, and every damping on the first and the last of them."""
    for name in ("demo", "english-7m"):
        texts = texts_of(name)
        for bits in (3,) if quick else (2, 3):
            for label, text in texts.items():
                folder = statistics_for(name, label, text, "fisher").folder
                all_of_them = label in ("packaged", "self") and not quick
                for damping in (0.003, 0.01, 0.03, 0.1) if all_of_them else (0.01,):
                    kl = harm(name, folder, bits, damping, 4096 if quick else 16384)
                    what = f"{name}, {bits} bits, text {label}, damping {damping:g}: KL"
                    yield Row(what, kl, "nats/token")


if __name__ == "__main__":
    main("calibration", PROTOCOL, run)
