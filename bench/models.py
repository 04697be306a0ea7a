"""Real models, calibrated once and kept under out/, for the benches that need them."""

from __future__ import annotations

from pathlib import Path

from bench.harness import shared_data
from waterfill.calibrate import Statistics, calibrate
from waterfill.sources import Source, open_source

WORK = Path("out") / "bench"
# english-7m degrades beyond 256 tokens of context (perplexity 52 at 256, 135 at 1024), so it is
# calibrated and measured there.
WINDOW = {"english-7m": 256, "stories260K": 512, "demo": 512}
# english-7m writes its own: of the texts at hand none is like what it was trained on, and every
# method that calibrates does better by it (docs/sensitivity.md).
SELF = "self"
TEXTS = {"english-7m": SELF, "stories260K": "tinystories.txt", "demo": "c4.txt"}
HELD_OUT = {
    "english-7m": "english_heldout.txt",
    "stories260K": "tinystories.txt",
    "demo": "wikitext2_valid.txt",
}


def source_of(name: str) -> Source:
    """The model of this name: demo, or a folder of ../shared/data/models."""
    return open_source("demo" if name == "demo" else str(shared_data() / "models" / name))


def text_of(name: str, held_out: bool = False) -> Path:
    """The text a model is calibrated on, or measured on: never the same."""
    if name == "stories260K":
        return _half(shared_data() / "text" / TEXTS[name], held_out)
    return shared_data() / "text" / (HELD_OUT if held_out else TEXTS)[name]


def _half(text: Path, second: bool) -> Path:
    """The first or second half of a text, cut at a space."""
    data = text.read_bytes()
    middle = data.index(b" ", len(data) // 2)
    path = WORK / f"{text.stem}-{'second' if second else 'first'}-half.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[middle:] if second else data[:middle])
    return path


def statistics_of(name: str, tokens: int = 32768) -> Statistics:
    """Calibrate, or open what an earlier bench left for the same model."""
    source = source_of(name)
    alone = TEXTS[name] == SELF
    label = SELF if alone else text_of(name).stem
    folder = WORK / f"{name}-{label}-{tokens}-{source.fingerprint()[:8]}"
    if (folder / "statistics.json").exists():
        return Statistics.open(folder)
    texts = SELF if alone else [text_of(name)]
    return calibrate(source, folder, texts, tokens=tokens, window=WINDOW[name])
