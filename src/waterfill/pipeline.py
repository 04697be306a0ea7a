"""The stairs: calibrate -> price -> plan -> encode -> verify, as one run that can be resumed.

Every step leaves its product in a work folder beside the output: statistics, prices, encoded
pieces. A run that was interrupted finds them again; a run that succeeds removes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from waterfill import __version__
from waterfill.calibrate import Statistics, calibrate
from waterfill.container import FILE_NAME, Reader, file_nbytes, payload_nbytes, write
from waterfill.plan.budget import budget_nbytes
from waterfill.plan.fill import Coded, fill
from waterfill.plan.hull import Curves, at_level, curves, point_on, smallest, solve_level
from waterfill.plan.price import Rules, price
from waterfill.runtime import artifact
from waterfill.runtime.pieces import Pieces
from waterfill.sources import Source, open_source
from waterfill.types import (
    Array,
    BudgetError,
    Encoded,
    Plan,
    Point,
    Record,
    Spec,
    TensorInfo,
    WaterfillError,
    Weighting,
    make_codec,
)

Progress = Callable[[str, int, int], None]
Texts = Sequence[Path] | Literal["self"] | None


def _quiet(stage: str, done: int, total: int) -> None:
    """The default progress: none."""


@dataclass(frozen=True)
class Priced:
    """A model with its statistics and every tensor's operating points: ready for any budget."""

    source: Source
    statistics: Statistics
    curves: Curves
    why: Mapping[str, str]

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the order of the checkpoint."""
        return self.statistics.infos

    @property
    def params(self) -> int:
        """Parameters, a repeated tensor counted once."""
        return sum(i.size for i in self.infos.values() if not i.group)

    @property
    def original_nbytes(self) -> int:
        """Bytes of the original's tensors as stored."""
        return sum(i.nbytes for i in self.infos.values())


def read(source: Source, info: TensorInfo) -> Array:
    """Stored bits of a tensor or slice."""
    return source.read(info.name) if info.index is None else source.read_slice(info.tensor, info.index)


def prepare(
    source: Source, statistics: Statistics, rules: Rules, cache: Path, progress: Progress = _quiet
) -> Priced:
    """Price every tensor, reading prices already in `cache` (one JSON line each)."""
    cache.mkdir(parents=True, exist_ok=True)
    rules.check(statistics.infos)
    key = hashlib.sha256(f"{__version__} {statistics.digest} {rules}".encode()).hexdigest()[:16]
    path = cache / f"prices-{key}.jsonl"
    prices = dict(_read_prices(path))
    own = {name: info for name, info in statistics.infos.items() if not info.group}
    why: dict[str, str] = {}
    with path.open("a", encoding="utf-8") as file:
        for done, (name, info) in enumerate(own.items()):
            weighting = statistics.weighting(name)
            candidates, why[name] = rules.candidates(info, weighting is not None)
            if not why[name]:
                reason = "" if weighting is not None else "kept exact: takes part in no matrix product"
                why[name] = statistics.notes.get(name) or reason or "water level"
            if name not in prices:
                prices[name] = price(read(source, info), info, weighting, candidates)
                points = [[p.nbytes, p.distortion_nats, p.spec.to_json()] for p in prices[name]]
                file.write(json.dumps([name, points]) + "\n")
                file.flush()
            progress("pricing", done + 1, len(own))
    largest_first = sorted(own, key=lambda n: -own[n].size)
    return Priced(source, statistics, curves({n: prices[n] for n in largest_first}), why)


def _read_prices(path: Path) -> Iterator[tuple[str, list[Point]]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            name, points = json.loads(line)
        except ValueError:
            continue  # the line that an interrupt cut off; it is priced again
        yield name, [Point(b, d, Spec.from_json(s)) for b, d, s in points]


def overhead_nbytes(infos: Iterable[TensorInfo], about: Mapping[str, Any]) -> int:
    """Header and index bytes to expect: real entries with made-up checksums and sizes."""
    random = np.random.default_rng(0)
    described = []
    for info in infos:
        entry: dict[str, Any] = {
            "name": info.name,
            "codec": ["trellis", 1, {"step": float(random.random())}],
            "dtype": info.dtype,
            "shape": list(info.shape),
            "kind": info.kind,
            "parts": {"codes": [int(random.integers(info.size + 1)), int(random.integers(2**32))]},
            "note": {"why": "water level", "nats": float(f"{random.random():.4g}")},
        }
        described.append(entry)
    header_and_index = file_nbytes(described, about) - sum(map(payload_nbytes, described))
    return header_and_index


def plan(priced: Priced, budget: int) -> Plan:
    """Choose an operating point for every tensor; nothing is encoded.

    Raises
    ------
    BudgetError
        If the budget is smaller than the cheapest plan; the message states the smallest possible.
    """
    c = priced.curves
    overhead = overhead_nbytes(priced.infos.values(), _about(priced))
    least = smallest(c) + overhead
    if budget < least:
        raise BudgetError(
            f"{budget:,} bytes is too small: the smallest this model can be is about {int(least * 1.01):,} "
            f"bytes ({8 * least * 1.01 / priced.params:.2f} bits per weight)"
        )
    level = solve_level(c, budget - overhead)
    nbytes, nats, pick = at_level(c, level)
    chosen = zip(c.names, pick, nbytes, strict=True)
    choices = {name: point_on(c, int(s), float(b)) for name, s, b in chosen}
    return Plan(choices, priced.why, budget, float(nats.sum()), level)


def predicted_curve(priced: Priced, budget: int) -> tuple[dict[str, float], ...]:
    """Predicted rate-distortion points of the whole model around a budget."""
    overhead = overhead_nbytes(priced.infos.values(), _about(priced))
    points = []
    for octave in np.linspace(-1.25, 1.25, 21):
        target = budget * 2.0**octave - overhead
        if target < smallest(priced.curves):
            continue
        nbytes, nats, _ = at_level(priced.curves, solve_level(priced.curves, target))
        total = float(nbytes.sum()) + overhead
        points.append(
            {"nbytes": total, "bits_per_weight": 8 * total / priced.params, "predicted_nats": float(nats.sum())}
        )
    return tuple(p for i, p in enumerate(points) if i == 0 or p["nbytes"] > points[i - 1]["nbytes"] * 1.001)


def _about(priced: Priced) -> dict[str, Any]:
    return {"waterfill": __version__, "model": priced.source.name}


def encode_tensor(
    bits: Array, info: TensorInfo, weighting: Weighting | None, point: Point
) -> tuple[Encoded, float]:
    """Encode, decode again, and measure: the coded tensor and its predicted nats."""
    chosen = make_codec(point.spec)
    parts, extra = chosen.encode(bits, info, weighting or Weighting())
    decoded = chosen.decode(parts, extra, info)
    nats = 0.0
    if chosen.lossy:
        nats = (weighting or Weighting()).distortion(info.matrix(bits), info.matrix(decoded))
    elif not np.array_equal(decoded.reshape(-1).view(np.uint8), bits.reshape(-1).view(np.uint8)):
        raise WaterfillError(f"{info.name}: {point.spec} did not give back the same bits; please report this")
    return Encoded(chosen.spec, info, parts, extra), nats


def encode(
    priced: Priced, budget: int, out: Path, pieces: Pieces, progress: Progress = _quiet
) -> dict[str, Coded]:
    """Encode every tensor to fill the budget and write the weights file into folder `out`."""
    plan(priced, budget)
    about = _about(priced)
    described: dict[tuple[str, Spec], dict[str, Any]] = {}
    done = 0

    def one(name: str, point: Point) -> int:
        nonlocal done
        entry = pieces.get(name, point)
        if entry is None:
            info = priced.infos[name]
            weighting = priced.statistics.weighting(name)
            encoded, nats = encode_tensor(read(priced.source, info), info, weighting, point)
            note = {"why": priced.why[name]} | ({"nats": float(f"{nats:.4g}")} if nats else {})
            entry = pieces.put(name, point, encoded, note)
        described[name, _key(point)] = entry
        done += 1
        progress("encoding", min(done, len(priced.curves.names)), len(priced.curves.names))
        return payload_nbytes(entry)

    def entries(coded: Mapping[str, Coded]) -> list[dict[str, Any]]:
        return [
            _repeat(info) if info.group else described[name, _key(coded[name].point)]
            for name, info in priced.infos.items()
        ]

    overhead = overhead_nbytes(priced.infos.values(), about)
    coded = fill(priced.curves, budget, overhead, one, lambda coded: file_nbytes(entries(coded), about))
    payloads = (
        () if info.group else pieces.payload(name, coded[name].point) for name, info in priced.infos.items()
    )
    nbytes = write(out / FILE_NAME, entries(coded), payloads, about)
    if nbytes > budget:
        raise BudgetError(
            f"the codecs asked for have no setting that fits: {nbytes:,} bytes where {budget:,} are allowed"
        )
    return coded


def _key(point: Point) -> Any:
    return json.dumps(point.spec.to_json())


def _repeat(info: TensorInfo) -> dict[str, Any]:
    from waterfill.container import describe

    return describe(Encoded(Spec("raw"), info, {}, {}), {"why": f"same as {info.group}"})


def compress(
    model: str | Path | Any,
    out: str | Path,
    *,
    size: str | int | None = None,
    bits: float | None = None,
    ratio: str | float | None = None,
    keep: Sequence[str] = (),
    codec: Mapping[str, str] | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
    tokens: int = 32768,
    force: bool = False,
    trust_remote_code: bool = False,
    command: str = "waterfill.compress(...)",
    progress: Progress = _quiet,
) -> Record:
    """Compress a model to a folder whose weights file has the size you name, and not a byte more.

    Parameters
    ----------
    model : folder in Hugging Face layout, hub id, ``"demo"``, or a transformers model in memory
    out : folder to make
    size, bits, ratio : the budget, exactly one of them: bytes (``"250MB"``), average bits per weight
        with every byte counted, or the share of the original (``"20%"``)
    keep : globs of tensors to keep exact
    codec : glob -> codec id or specification such as ``"integer:bits=3,group=128"``
    calibration : text files, a statistics folder, ``"self"``, or None for the packaged text
    tokens : calibration tokens
    force : replace `out` if it exists

    Returns
    -------
    Record

    Raises
    ------
    WaterfillError
        With a message that says what to do; nothing is left at `out`.
    """
    out = Path(out)
    artifact.refuse_existing(out, force)
    source = open_source(model, trust_remote_code=trust_remote_code)
    work = out.with_name(out.name + ".work")
    try:
        statistics = statistics_for(source, work, calibration, tokens, progress)
        rules = Rules(tuple(keep), tuple((codec or {}).items()))
        priced = prepare(source, statistics, rules, work, progress)
        budget = budget_nbytes(
            params=priced.params, original_nbytes=priced.original_nbytes, size=size, bits=bits, ratio=ratio
        )
        pieces = Pieces(work / "pieces", f"{source.fingerprint()} {statistics.digest} {__version__}")
        with artifact.new_folder(out, force) as folder:
            encode(priced, budget, folder, pieces, progress)
            record = _finish(priced, budget, folder, command, out.name)
    except OSError as error:
        raise artifact.explain(error, out) from error
    shutil.rmtree(work, ignore_errors=True)
    return record


def statistics_for(
    source: Source,
    work: Path,
    calibration: str | Path | Sequence[str | Path] | None,
    tokens: int,
    progress: Progress,
) -> Statistics:
    """Statistics as the user asked: a folder made before, or a calibration run (resumed if begun)."""
    texts: Texts = None
    if calibration == "self":
        texts = "self"
    elif calibration is not None:
        paths = [calibration] if isinstance(calibration, (str, Path)) else list(calibration)
        texts = [Path(p) for p in paths]
        if len(texts) == 1 and (texts[0] / "statistics.json").exists():
            statistics = Statistics.open(texts[0])
            statistics.check(source)
            return statistics
    return calibrate(
        source, work / "statistics", texts, tokens=tokens, progress=lambda d, t, w: progress(w, d, t)
    )


def _finish(priced: Priced, budget: int, folder: Path, command: str, name: str) -> Record:
    """Check the file as written, then put around it what an artifact needs."""
    source = priced.source
    with Reader(folder / FILE_NAME) as reader:
        for _ in reader.verify():
            pass
        rows = artifact.ledger(reader)
        nbytes = reader.nbytes
    predicted = sum(r["predicted_nats"] for r in rows)
    lossless = all(r["predicted_nats"] == 0 for r in rows)
    about = {
        **_about(priced),
        "local": Path(str(source.path)).exists(),
        "command": command,
        "budget_nbytes": budget,
        "original_nbytes": priced.original_nbytes,
        "params": priced.params,
        "lossless": lossless,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "calibration": dict(priced.statistics.protocol),
    }
    record = Record(
        name=name,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / max(priced.params, 1),
        predicted={"kl_nats": predicted},
        ledger=tuple(rows),
        curve=predicted_curve(priced, budget),
        about=about,
    )
    for file in source.files_beside:
        if file.name not in ("README.md", "config.json"):
            shutil.copyfile(file, folder / file.name)
    artifact.write_config(folder, source.config)
    stored = {**dataclasses.asdict(record), "ledger": ()}
    artifact.write_record(folder, stored)
    artifact.write_card(folder, stored)
    return record
