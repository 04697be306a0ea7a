"""Records -> one HTML page that needs nothing else: no network, no library, no server.

The page's numbers and its ledger are written here, so they are there without JavaScript; the
pictures are drawn in the browser from the JSON that the page carries.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from waterfill.report import words
from waterfill.report.headline import headline, is_exact, lead, prediction
from waterfill.report.pages import asset, fill, write_whole
from waterfill.types import Record, WaterfillError

__all__ = ["render", "write"]

COLUMNS = (
    "name",
    "kind",
    "codec",
    "shape",
    "params",
    "nbytes",
    "original_nbytes",
    "bits_per_weight",
    "predicted_nats",
    "why",
)
CONTAINER = "(container)"


def render(records: Sequence[Record]) -> str:
    """The page as text.

    Parameters
    ----------
    records : Record
        Each gets a chapter; in each one's rate-distortion picture the others are further points.
    """
    if not records:
        raise WaterfillError("a report needs at least one record")
    filters = {
        "count": words.count,
        "size": words.size,
        "figure": words.figure,
        "nats": words.nats,
        "breaks": _breaks,
    }
    chapters = [_chapter(record, i) for i, record in enumerate(records)]
    title = " · ".join(dict.fromkeys(c["model"] for c in chapters))
    return fill(
        "template.html",
        filters,
        title=title,
        chapters=chapters,
        js=asset("report.js"),
        data=_json([c["data"] for c in chapters]),
    )


def _breaks(text: str) -> Any:
    """Escaped, with places where a long name may go on in the next line."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(\.(?=[A-Za-z])|,)", r"\1<wbr>", str(escape(text))))


def write(records: Sequence[Record], path: str | Path) -> Path:
    """Render into a file, whole or not at all; returns its path."""
    return write_whole(Path(path), render(records))


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, and that every JSON parser takes."""
    text = json.dumps(
        _finite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False, default=str
    )
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as null and floats cut to what a picture can show."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _chapter(record: Record, number: int) -> dict[str, Any]:
    """All that the template shows of one record."""
    about, metrics = record.about, record.metrics
    rows = [
        {c: row.get(c, "" if c in ("name", "kind", "codec", "why") else None) for c in COLUMNS}
        for row in record.ledger
    ]
    for row in rows:
        row["family"] = _family(row)
        row["shape_text"] = f" {words.TIMES} ".join(str(n) for n in row["shape"] or ())
    shared = _set_options(rows)
    total = _total(rows, record)
    layers = [r for r in metrics.get("layers") or () if isinstance(r, Mapping)]
    drawn = [
        r for r in layers if all(_positive(r.get(k)) for k in ("predicted_nats", "measured_nats"))
    ]
    measured = {k: metrics.get(k) for k in ("kl_nats", "kl_nats_stderr")}
    model = str(about.get("model") or record.name)
    return {
        "id": f"r{number}",
        "name": record.name,
        "model": model,
        "nbytes": record.nbytes,
        "lead": lead(record, total),
        "figures": headline(record, total),
        "prediction": prediction(record, layers),
        "has_layers": bool(drawn),
        "has_curve": bool(record.curve),
        "is_exact": is_exact(record) and not record.metrics,
        "rows": rows,
        "shared": shared,
        "total": total,
        "kinds": sorted({str(r["kind"]) for r in rows if r["kind"]}),
        "command": str(about.get("command") or ""),
        "facts": _facts(record),
        "protocol": words.flat(metrics.get("protocol") or {}),
        "calibration": words.flat(
            about.get("calibration") or about.get("calibration_protocol") or {}
        ),
        "data": {
            "id": f"r{number}",
            "name": record.name,
            "nbytes": record.nbytes,
            "bits_per_weight": record.bits_per_weight,
            "budget_nbytes": about.get("budget_nbytes"),
            "params": total["params"],
            "predicted_nats": record.predicted.get("kl_nats"),
            # Tensors together do more than their sum; that was looked at once the file was there.
            "predicted_whole": record.predicted.get(
                "kl_nats_calibration", record.predicted.get("kl_nats")
            ),
            "measured": measured,
            "curve": [
                [p.get(k) for k in ("nbytes", "bits_per_weight", "predicted_nats")]
                for p in record.curve
            ],
            "layers": [
                [r.get(k) for k in ("name", "predicted_nats", "measured_nats")] for r in layers
            ],
            "columns": [*COLUMNS, "family"],
            "rows": [[r[c] for c in (*COLUMNS, "family")] for r in rows],
        },
    }


def _family(row: Mapping[str, Any]) -> str:
    """Codec without its options; what a bar or dot is coloured by."""
    if row["name"] == CONTAINER:
        return "container"
    codec = str(row["codec"])
    return "tied" if codec.startswith("same as ") else codec.partition(":")[0] or "unknown"


def _set_options(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Give each row the options of its codec; those that a codec's rows all share are said once.

    Returns (codec, its shared options). Long numbers are cut to four digits for the eye; the
    page's JSON keeps them whole.
    """
    families: dict[str, list[tuple[dict[str, Any], list[str]]]] = {}
    for row in rows:
        row["options"] = ""
        if row["family"] not in ("tied", "container"):
            text = re.sub(
                r"\d+\.\d{5,}(e-?\d+)?", lambda m: f"{float(m[0]):.4g}", str(row["codec"])
            )
            options = [o for o in text.partition(":")[2].split(",") if o]
            families.setdefault(row["family"], []).append((row, options))
    shared = []
    for family, members in families.items():
        common = [o for o in members[0][1] if all(o in options for _, options in members)]
        common = common if len(members) > 1 else []
        for row, options in members:
            row["options"] = ",".join(o for o in options if o not in common)
        if common:
            shared.append((family, ", ".join(common)))
    return shared


def _positive(value: Any) -> bool:
    return words.is_number(value) and value > 0


def _sum(values: Iterable[Any]) -> float:
    return sum(v for v in values if words.is_number(v))


def _total(rows: Sequence[Mapping[str, Any]], record: Record) -> dict[str, Any]:
    """The last row of the ledger; `agrees` is whether the rows make up the whole file."""
    nbytes, params = int(_sum(r["nbytes"] for r in rows)), int(_sum(r["params"] for r in rows))
    before = _sum(r["original_nbytes"] for r in rows)
    return {
        "tensors": sum(r["name"] != CONTAINER for r in rows),
        "nbytes": nbytes,
        "agrees": nbytes == record.nbytes,
        "params": params or record.about.get("params"),
        "original_nbytes": record.about.get("original_nbytes") or int(before),
        "bits_per_weight": record.bits_per_weight,
        "predicted_nats": _sum(r["predicted_nats"] for r in rows),
    }


def _facts(record: Record) -> list[tuple[str, str]]:
    """Where the file comes from: versions, dates, and a digest of what was chosen."""
    hidden = ("command", "calibration", "calibration_protocol")
    facts = words.flat({k: v for k, v in record.about.items() if k not in hidden})
    if "plan_digest" not in record.about:
        chosen = [[r.get("name"), r.get("codec"), r.get("nbytes")] for r in record.ledger]
        facts.append(
            ("ledger digest", hashlib.sha256(json.dumps(chosen, default=str).encode()).hexdigest())
        )
    return [(key.replace("_", " "), value) for key, value in facts]
