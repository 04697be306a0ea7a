"""Compress and measure once: files and figures are kept under out/bench while the code is the same."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.models import SELF, TEXTS, WINDOW, WORK, source_of, statistics_of, text_of
from waterfill import evaluate
from waterfill.calibrate.text import read_windows, write_itself
from waterfill.container import FILE_NAME
from waterfill.pipeline import compress
from waterfill.pipeline.evolving import MINUTES
from waterfill.pipeline.tuning import TUNE_STEPS
from waterfill.plan.allocation import DEFAULT
from waterfill.runtime.torch_model import load_model, load_original
from waterfill.sources.text import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKENS, SEED = 32768, 0  # of calibration, for all


@dataclass(frozen=True)
class Measured:
    """One compressed model: bytes of its weights file, and harm on held-out text."""

    model: str
    method: str
    nbytes: int
    bits_per_weight: float
    kl_nats: float
    kl_nats_stderr: float
    perplexity: float
    top1_agreement: float


def digest_of_code() -> str:
    """Digest of the code that decides what is in a file and how large it is."""
    digest = hashlib.sha256()
    folders = [
        ROOT / "cpp",
        *(ROOT / "src/waterfill" / f for f in ("codecs", "coding", "pipeline", "plan")),
    ]
    # What runs after the statistics; those have a digest of their own.
    for name in ("batches", "missing", "propagation", "tunables", "tuning"):
        digest.update((ROOT / f"src/waterfill/calibrate/{name}.py").read_bytes())
    for path in sorted(
        p for f in folders for p in f.rglob("*") if p.suffix in (".py", ".cpp", ".h")
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def remember(model: Any) -> Any:
    """The model, answering a window it has seen from memory: the original is asked very often."""
    forward = model.forward
    seen: dict[tuple[bytes, str], Any] = {}

    @functools.wraps(forward)
    def remembered(*, input_ids: Any, **options: Any) -> Any:
        key = (input_ids.numpy().tobytes(), str(options))
        if key not in seen:
            seen[key] = forward(input_ids=input_ids, **options)
        return seen[key]

    model.forward = remembered
    return model


class Subject:
    """One model: compressed in many ways, each measured against the original.

    Parameters
    ----------
    name : see `bench.models`
    tokens : of held-out text, at most
    """

    def __init__(self, name: str, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        source = source_of(name)
        assert source.path is not None
        self.path = Path(source.path)
        statistics = statistics_of(name, TOKENS)
        self.params = sum(i.size for i in statistics.infos.values() if not i.group)
        self.folder = WORK / "quality" / f"{name}-{statistics.digest[:8]}-{digest_of_code()}"
        for old in self.folder.parent.glob(f"{name}-*"):
            if old != self.folder:
                shutil.rmtree(old)
        # Prices are kept beside the statistics, so these need a copy for each state of the code.
        self.statistics = self.folder / "statistics"
        if not self.statistics.exists():
            self.statistics.parent.mkdir(parents=True, exist_ok=True)
            partial = self.folder / "statistics.part"
            shutil.rmtree(partial, ignore_errors=True)
            skip = shutil.ignore_patterns("prices-*")
            shutil.copytree(statistics.folder, partial, ignore=skip)
            partial.rename(self.statistics)

    @functools.cached_property
    def original(self) -> Any:
        """The uncompressed model in float32."""
        return remember(load_original(self.path, False))

    @functools.cached_property
    def windows(self) -> evaluate.Windows:
        """Held-out text."""
        return evaluate.text_windows(
            [text_of(self.name, held_out=True)],
            load_tokenizer(self.path),
            window=WINDOW[self.name],
            max_positions=evaluate.max_positions(self.original),
            max_tokens=self.tokens,
        )

    def calibration(self) -> NDArray[np.int64]:
        """The very tokens that our statistics come from, (windows, window)."""
        source, window = source_of(self.name), WINDOW[self.name]
        if TEXTS[self.name] == SELF:
            return write_itself(load_original(self.path, False), TOKENS, window, SEED).ids
        return read_windows(source, [text_of(self.name)], TOKENS, window, None).ids

    def planned(
        self,
        method: str,
        *,
        size: int | None = None,
        bits: float | None = None,
        codec: Mapping[str, str] | None = None,
        keep: Sequence[str] = (),
        propagate: bool = True,
        allocate: str = DEFAULT,
        minutes: float = MINUTES,
        tune: str | None = None,
        tune_steps: int = TUNE_STEPS,
    ) -> Measured:
        """Compressed by waterfill; parameters as of `waterfill.compress`."""
        out = self.artifact(
            size=size, bits=bits, codec=codec, keep=keep, propagate=propagate, allocate=allocate,
            minutes=minutes, tune=tune, tune_steps=tune_steps,
        )  # fmt: skip
        if not out.exists():
            compress(
                str(self.path), out, size=size, bits=bits, codec=codec, keep=keep,
                calibration=self.statistics, propagate=propagate, allocate=allocate, minutes=minutes,
                tune=tune, tune_steps=tune_steps,
            )  # fmt: skip
        nbytes = (out / FILE_NAME).stat().st_size
        return self._measured(method, nbytes, out, lambda: load_model(out, dtype="float32"))

    def artifact(
        self,
        *,
        size: int | None = None,
        bits: float | None = None,
        codec: Mapping[str, str] | None = None,
        keep: Sequence[str] = (),
        propagate: bool = True,
        allocate: str = DEFAULT,
        minutes: float = MINUTES,
        tune: str | None = None,
        tune_steps: int = TUNE_STEPS,
    ) -> Path:
        """Where `planned` leaves what it made under these options."""
        given = [
            size,
            bits,
            dict(codec or {}),
            list(keep),
            propagate,
            allocate,
            minutes,
            tune,
            tune_steps,
        ]
        options = json.dumps(given)
        return self.folder / hashlib.sha256(options.encode()).hexdigest()[:12]

    def decoded(self, method: str, folder: Path, nbytes: int) -> Measured:
        """Compressed by others: ``folder/plain`` is what their file of `nbytes` decodes to."""
        return self._measured(
            method, nbytes, folder, lambda: load_original(folder / "plain", False)
        )

    def _measured(
        self, method: str, nbytes: int, folder: Path, load: Callable[[], Any]
    ) -> Measured:
        kept = folder / f"measured-{self.tokens}.json"
        if not kept.exists():
            found = evaluate.compare(self.original, load(), self.windows)
            names = ("kl_nats", "kl_nats_stderr", "perplexity", "top1_agreement")
            kept.write_text(json.dumps({k: found[k] for k in names}))
        bits = 8 * nbytes / self.params
        return Measured(self.name, method, nbytes, bits, **json.loads(kept.read_text()))


def curves(measured: Sequence[Measured]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Model -> method -> points by size: ready to be drawn."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for one in sorted(set(measured), key=lambda m: m.nbytes):
        point = asdict(one)
        methods = found.setdefault(point.pop("model"), {})
        methods.setdefault(point.pop("method"), []).append(point)
    return found
