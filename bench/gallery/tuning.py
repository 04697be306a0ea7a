"""Tuning codes and scales on text, against leaving them: ``python -m bench.gallery tuning``.

KL(original || decoded) on held-out text, as in `bench.quality`: the same plan and the same budget of
bytes, tuned and not. What PV-Tuning (Malinovskii et al. 2024) claims over straight-through estimation
and over tuning scales alone is measured too, on the smallest model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

from bench.gallery import ordering
from bench.harness import Row
from bench.measure import Measured, Subject

SMALL, LARGE = "stories260K", "english-7m"
CODECS = {
    SMALL: (
        "integer:bits=2,group=64",
        "integer:bits=3,group=64",
        "codebook:bits=3,group=64",
        "vector:bits=2.0",
    ),
    LARGE: ("integer:bits=2,group=64", "integer:bits=3,group=64"),
}
CLAIMS = (
    ("pv < untuned", "pv", None),
    ("pv <= scales and codebooks alone", "pv", "v"),
    ("pv <= straight-through estimation", "pv", "ste"),
)
ROOM = 1.01  # of what untuned codes take, for all: rare codes may take a little more


def rows(quick: bool) -> Iterator[Row]:
    """Each claim at two and three bits; half as long, and the small model alone, if `quick`."""
    for model in (SMALL,) if quick else (SMALL, LARGE):
        subject = Subject(model, 8192 if quick else 16384)
        for codec in CODECS[model][:2] if quick else CODECS[model]:
            options = {"codec": {"*": codec}, "propagate": False, "tune_steps": 32 if quick else 64}
            planned = partial(subject.planned, **options)  # type: ignore[arg-type]
            size = int(ROOM * planned("first", bits=16.0).nbytes)

            @cache
            def made(
                tune: str | None, planned: partial[Measured] = planned, size: int = size
            ) -> Measured:
                return planned(tune or "untuned", size=size, tune=tune)

            for claim, tune, other in CLAIMS if model == SMALL else CLAIMS[:1]:
                one, two = made(tune), made(other)
                # Tuning that made nothing better leaves the file as it was.
                same = other is not None and two.kl_nats == made(None).kl_nats
                yield _row(
                    f"{model}, {codec}: {claim}", one, two, f"; {other} came to nothing" * same
                )


def _row(claim: str, one: Measured, two: Measured, more: str) -> Row:
    note = (
        f"{one.kl_nats:.4g} / {two.kl_nats:.4g} nats (held-out, stderr {one.kl_nats_stderr:.2g}), "
        f"{one.nbytes:,} / {two.nbytes:,} bytes{more}"
    )
    return ordering(claim, one.kl_nats / two.kl_nats, note)
