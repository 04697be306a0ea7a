"""Plans on disk: written for people and programs to read or change, and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waterfill.calibrate import Statistics
from waterfill.pipeline.compare import record_of
from waterfill.pipeline.planning import Priced, plan
from waterfill.plan.allocation import DEFAULT
from waterfill.plan.budget import budget_nbytes
from waterfill.plan.price import Rules, takes
from waterfill.registry import make_codec, parse_spec
from waterfill.sources.folder import read_json
from waterfill.types import FormatError, Plan, Point, SpecError, WaterfillError

VERSION = 1


@dataclass(frozen=True)
class SavedPlan:
    """A plan and what it was made under.

    Attributes
    ----------
    path : where it was read
    plan : Plan
    rules : what the user had fixed by hand
    statistics, digest : the folder it was priced with and what it held; None and "" if unknown
    allocate : name of the allocator that chose
    """

    path: Path
    plan: Plan
    rules: Rules
    statistics: Path | None
    digest: str
    allocate: str


def plan_json(
    priced: Priced,
    *,
    size: str | int | None = None,
    bits: float | None = None,
    ratio: str | float | None = None,
    allocate: str = DEFAULT,
) -> dict[str, Any]:
    """A plan as JSON: one row per tensor, in the order of the checkpoint.

    Parameters
    ----------
    size, bits, ratio : the budget, exactly one of them
    allocate : see `waterfill.plan.allocation`
    """
    budget = budget_nbytes(
        params=priced.params,
        original_nbytes=priced.original_nbytes,
        size=size,
        bits=bits,
        ratio=ratio,
    )
    chosen = plan(priced, budget, allocate)
    rows = [
        {
            "name": name,
            "codec": str(make_codec(chosen.choices[name].spec)),
            "nbytes": chosen.choices[name].nbytes,
            "bits_per_weight": 8 * chosen.choices[name].nbytes / max(info.size, 1),
            "predicted_nats": chosen.choices[name].distortion_nats,
            "why": chosen.why[name],
        }
        for name, info in priced.infos.items()
        if not info.group
    ]
    return {
        "version": VERSION,
        "model": priced.source.name,
        "statistics": str(priced.statistics.folder.resolve()),
        "statistics_digest": priced.statistics.digest,
        "keep": list(priced.rules.keep),
        "codec": [list(pair) for pair in priced.rules.codecs],
        "allocate": allocate,
        "budget_nbytes": budget,
        "bits_per_weight": 8 * budget / max(priced.params, 1),
        "predicted_nats": chosen.predicted_nats,
        "water_level_nats_per_byte": chosen.water_level,
        "choices": rows,
    }


def read_plan(path: Path) -> SavedPlan:
    """The plan in a file of `plan_json`, or the one that an artifact was made by.

    Raises
    ------
    WaterfillError
        If there is none; FormatError and SpecError say what is wrong with it.
    """
    if path.is_dir():
        record = record_of(path).to_json()
        budget = record["about"].get("budget_nbytes", record["nbytes"])
        rows = [r for r in record["ledger"] if r["codec"] and not r["codec"].startswith("same as")]
        table: Mapping[str, Any] = {"version": VERSION, "budget_nbytes": budget, "choices": rows,
                                    "allocate": record["about"].get("allocate", DEFAULT)}  # fmt: skip
    else:
        table = read_json(path)
    if not isinstance(table.get("choices"), list):
        raise FormatError(f"{path} holds no plan; `waterfill plan STATS -o PLAN` writes one")
    if table.get("version") != VERSION:
        raise FormatError(f"{path} is a plan of version {table.get('version')}, not {VERSION}")
    try:
        choices = {str(r["name"]): _point(r) for r in table["choices"]}
        why = {str(r["name"]): str(r["why"]) for r in table["choices"]}
        budget = budget_nbytes(params=0, original_nbytes=0, size=int(table["budget_nbytes"]))
        keep = tuple(str(glob) for glob in table.get("keep", ()))
        codecs = tuple((str(glob), str(text)) for glob, text in table.get("codec", ()))
        statistics = Path(table["statistics"]) if table.get("statistics") else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{path} is not as a plan should be: it lacks or garbles {error}"
        ) from error
    nats = sum(point.distortion_nats for point in choices.values())
    level = float(table.get("water_level_nats_per_byte") or 0.0)
    read = Plan(choices, why, budget, nats, level)
    digest = str(table.get("statistics_digest", ""))
    allocate = str(table.get("allocate", DEFAULT))
    return SavedPlan(path, read, Rules(keep, codecs), statistics, digest, allocate)


def _point(row: Mapping[str, Any]) -> Point:
    return Point(float(row["nbytes"]), float(row["predicted_nats"]), parse_spec(row["codec"]).spec)


def statistics_of(saved: SavedPlan) -> Path | None:
    """The statistics that a plan was made from, if they are what they were then."""
    if saved.statistics is None:
        return None
    remedy = "plan again, or name statistics with --calibrate"
    if not saved.statistics.exists():
        raise WaterfillError(
            f"{saved.path} was made from the statistics in {saved.statistics}, which is gone; {remedy}"
        )
    if Statistics.open(saved.statistics).digest != saved.digest:
        raise WaterfillError(
            f"{saved.statistics} holds other statistics now than {saved.path} was made from; {remedy}"
        )
    return saved.statistics


def check_fits(saved: SavedPlan, priced: Priced) -> None:
    """WaterfillError unless a plan has a choice for each tensor of a model, and one it can take."""
    own = {name: info for name, info in priced.infos.items() if not info.group}
    absent = [name for name in own if name not in saved.plan.choices]
    foreign = [name for name in saved.plan.choices if name not in own]
    what = f"{saved.path} is no plan for {priced.source.name}"
    if absent:
        raise WaterfillError(f"{what}: it says nothing of {absent[0]}{_more(absent)}")
    if foreign:
        raise WaterfillError(f"{what}, which has no {foreign[0]}{_more(foreign)} to code")
    for name, info in own.items():
        spec = saved.plan.choices[name].spec
        if not takes(spec.id, info, priced.statistics.is_weighted(name)):
            raise SpecError(f"{what}: the codec {spec.id} cannot take {name}")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
