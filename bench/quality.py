"""Harm at equal file bytes. ``python -m bench.quality [--json FILE] [--quick]``"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from bench.harness import Row, main
from bench.models import WINDOW, WORK, source_of, statistics_of, text_of
from waterfill.pipeline import compare, compress

PROTOCOL = (
    "english-7m calibrated on wiki.txt (32768 tokens, fisher); KL(original || compressed) per token on "
    "english_heldout.txt, windows of 256 tokens, stride 128 (16384 tokens with --quick). Peer: every matrix "
    "integer, group 128, successive rounding, searched clip, from the same statistics. Ours: the planner's free "
    "choice, at the peer's file size"
)


def measure(out: Path, quick: bool) -> float:
    """KL in nats per token on held-out text."""
    model = source_of("english-7m").path
    assert model is not None
    text = [text_of("english-7m", held_out=True)]
    kl: float = compare(
        out, model, text, window=WINDOW["english-7m"], tokens=16384 if quick else None
    )["kl_nats"]
    return kl


def made(name: str, **options: object) -> tuple[Path, int]:
    """Compress english-7m; returns the artifact and its file size."""
    out = WORK / f"quality-{name}"
    shutil.rmtree(out, ignore_errors=True)
    record = compress(
        str(source_of("english-7m").path),
        out,
        calibration=statistics_of("english-7m").folder,
        **options,
    )  # type: ignore[arg-type]
    return out, record.nbytes


def run(quick: bool) -> Iterator[Row]:
    """KL of both, and their ratio, at the peer's 3- and 4-bit file sizes."""
    for bits in (3, 4):
        peer, nbytes = made(
            f"integer{bits}", bits=32, codec={"*": f"integer:bits={bits},group=128"}
        )
        ours, got = made(f"planned{bits}", size=nbytes)
        peer_kl, our_kl = measure(peer, quick), measure(ours, quick)
        note = f"{got:,} of {nbytes:,} bytes"
        yield Row(f"integer {bits} bits, g128, successive: KL", peer_kl, "nats/token")
        yield Row("planned at the same file size: KL", our_kl, "nats/token", note=note)
        yield Row(f"ratio at the {bits}-bit size", our_kl / peer_kl, "", 0.25)


if __name__ == "__main__":
    main("quality", PROTOCOL, run)
