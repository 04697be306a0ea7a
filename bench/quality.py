"""Harm at equal file bytes. ``python -m bench.quality [--json FILE] [--quick]``"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.harness import Row, main
from bench.measure import Measured, Subject, curves
from bench.peers.make import PEERS, Peer, Skipped, made
from waterfill.types import BudgetError

PROTOCOL = (
    "KL(original || compressed) in nats per token on held-out text, ours against a peer's at the size of "
    "the peer's weights file, every byte of both counted. english-7m: text it writes itself, measured on "
    "english_heldout.txt, windows of 256; stories260K: first and second half of tinystories.txt, 512; demo: "
    "c4.txt and wikitext2_valid.txt, 512; stride half a window; 32768 tokens of calibration, the same for "
    "all that calibrate; 16384 tokens measured (8192, and fewer sizes, with --quick). trellis: the planner's "
    "free choice, propagation included (the peers encode once); WaterSIC: *=trellis:states=1,mmse=0.0 at the "
    "same budget; integer, planned: *=integer at the same budget; integer, uniform: every matrix alike, "
    "successive rounding, searched clip, from the "
    "same statistics; others as pip installs them (bench/peers)"
)
MODELS = ("english-7m", "stories260K", "demo")
SIZES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
UNIFORM = tuple((bits, group) for group in (128, 64) for bits in (2, 3, 4))
WATERSIC = {"*": "trellis:states=1,mmse=0.0"}


def bar_of(model: str, bits: int, group: int) -> float:
    """Ours over uniform integers of this kind, at most."""
    return 0.12 if model == "english-7m" and group == 128 and bits >= 3 else 1.0


class Contest:
    """One model against all peers; every figure taken is kept for the curves."""

    def __init__(self, name: str, quick: bool, log: list[Measured]) -> None:
        self.name, self.quick, self.log = name, quick, log
        self.subject = Subject(name, 8192 if quick else 16384)

    def ours(self, **options: Any) -> Measured:
        """The planner's free choice."""
        method = "trellis, same matrices kept" if "keep" in options else "trellis"
        self.log.append(self.subject.planned(method, **options))
        return self.log[-1]

    def theirs(self, method: str, **options: Any) -> Measured:
        """Under rules for the codec, encoded once, as published."""
        self.log.append(self.subject.planned(method, propagate=False, **options))
        return self.log[-1]

    def row(self, peer: Measured, ours: Measured, bar: float | None, label: str = "") -> Row:
        """Ours over the peer's, with what it was made of."""
        note = (
            f"{ours.kl_nats:.3g} / {peer.kl_nats:.3g} nats, perplexity {ours.perplexity:.4g} / "
            f"{peer.perplexity:.4g}, {ours.nbytes:,} / {peer.nbytes:,} bytes"
        )
        at = f"{peer.bits_per_weight:.2f} bits"
        name = f"{self.name}: KL over {label or peer.method}, {at}"
        return Row(name, ours.kl_nats / peer.kl_nats, "", bar, note=note)

    def planned(self) -> Iterator[Row]:
        """WaterSIC and planned integers, at round numbers of bits."""
        for bits in (1.5, 3.0) if self.quick else SIZES:
            sic = self.theirs("WaterSIC", bits=bits, codec=WATERSIC)
            yield self.row(sic, self.ours(bits=bits), 0.8)
            try:
                peer = self.theirs("integer, planned", bits=bits, codec={"*": "integer"})
            except BudgetError:
                continue  # two bits and a scale are the least that integers take
            yield self.row(peer, self.ours(size=peer.nbytes), 1.0)

    def uniform(self) -> Iterator[Row]:
        """Integers, every matrix alike."""
        kinds = ((3, 128), (4, 128)) if self.quick else UNIFORM
        for bits, group in kinds:
            method = f"integer {bits} bits g{group}, uniform"
            peer = self.theirs(method, bits=32, codec={"*": f"integer:bits={bits},group={group}"})
            yield self.row(peer, self.ours(size=peer.nbytes), bar_of(self.name, bits, group))

    def installed(self) -> Iterator[Row]:
        """What pip installs on a CPU."""
        tokens = self.subject.calibration()
        for peer in PEERS:
            try:
                yield from self.against(peer, tokens)
            except Skipped as why:
                sys.stdout.write(f"  {self.name}: {peer.label} skipped: {why}\n")

    def against(self, peer: Peer, tokens: Any) -> Iterator[Row]:
        """One of them; where it keeps matrices in 16 bits, also with ours keeping the same."""
        result = made(peer, self.subject.path, tokens, new=not self.quick)
        one = self.subject.decoded(peer.label, result.folder, result.nbytes)
        self.log.append(one)
        yield self.row(one, self.ours(size=result.nbytes), 1.0)
        if result.exact and not self.quick:
            same = self.ours(size=result.nbytes, keep=list(result.exact))
            kept = ", ".join(result.exact)
            yield self.row(one, same, None, f"{peer.label}, with {kept} as exact as theirs")


def run(log: list[Measured], quick: bool) -> Iterator[Row]:
    """Every model against every peer."""
    for name in MODELS:
        contest = Contest(name, quick, log)
        yield from contest.planned()
        yield from contest.uniform()
        yield from contest.installed()


if __name__ == "__main__":
    taken: list[Measured] = []
    main("quality", PROTOCOL, partial(run, taken), lambda: {"curves": curves(taken)})
