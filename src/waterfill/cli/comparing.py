"""The verbs that look at methods: compare, codecs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from waterfill.cli.compressing import MINUTES, TOKENS, calibration, minutes
from waterfill.cli.grammar import Verb, checked, count, named, path, trust
from waterfill.cli.printing import table

SIZES = ("2", "2.5", "3", "4")


def compare(args: argparse.Namespace) -> Any:
    """Code a model by many methods at many sizes, and measure each."""
    from waterfill.pipeline import compare_methods
    from waterfill.report import write_comparison

    result = compare_methods(
        args.model,
        args.out,
        methods=args.methods or (),
        sizes=args.sizes,
        text=args.text,
        calibration=calibration(args.calibrate),
        calibration_tokens=args.calibration_tokens,
        window=args.window,
        stride=args.stride,
        tokens=args.tokens,
        activations=args.activations,
        propagate=args.propagate,
        minutes=args.minutes,
        trust_remote_code=args.trust_remote_code,
        progress=args.progress,
    )
    page = write_comparison(result, args.out / "report.html")
    if not args.json:
        _say(result)
        print(f"{page}: the picture; the figures are in {args.out / 'comparison.json'}")
        for best in result["best"][-1:]:
            words = ["waterfill", "compress", args.model, *best["options"]]
            words += ["--codec", best["codec"]]
            print(f"next: {shlex.join(words)} -o OUT")
    return result


def _say(result: Mapping[str, Any]) -> None:
    from waterfill.report import comparison_rows, mixing, remarks

    head, rows = comparison_rows(result)
    print("KL(original || compressed), nats per token; * is the least at its size")
    table(head, rows)
    for line in (*mixing(result), *remarks(result)):
        print(line)


def _compare_options(p: argparse.ArgumentParser) -> None:
    from waterfill.plan.budget import parse_budget

    p.add_argument("model", type=named, help="folder in Hugging Face layout, hub id, or demo")
    p.add_argument("-o", "--out", type=path, required=True, metavar="OUT",
                   help="folder for the figures; run again with more methods or sizes to go on")  # fmt: skip
    p.add_argument("--methods", nargs="+", type=named, metavar="METHOD",
                   help="CODEC[@ALLOCATOR][+TUNING], such as trellis, integer:solver=nearest@uniform or auto, "
                   "the best of all for each tensor; default: every codec, and auto")  # fmt: skip
    p.add_argument("--sizes", nargs="+", type=checked(parse_budget), default=SIZES, metavar="SIZE",
                   help="bits per weight (2.5), bytes (250MB) or a share (20%%); default: "
                   + " ".join(SIZES))  # fmt: skip
    p.add_argument("--calibrate", nargs="+", type=named, metavar="FILE|STATS|self",
                   help="text files, a statistics folder, or self; default: a packaged text")  # fmt: skip
    p.add_argument("--calibration-tokens", type=count, default=TOKENS, metavar="N")
    p.add_argument("--text", nargs="+", type=path, metavar="FILE",
                   help="to measure on; default: a packaged text")  # fmt: skip
    p.add_argument("--window", type=count, help="context length in tokens (default: up to 1024)")
    p.add_argument("--stride", type=count, help="tokens scored per window (default: half a window)")
    p.add_argument("--tokens", type=count, default=16384, help="of text, at most (default 16384)")
    p.add_argument("--activations", metavar="FORM",
                   help="round the inputs of linear layers, simulated: see waterfill eval --help")  # fmt: skip
    p.add_argument("--propagate", action="store_true",
                   help="encode twice, as compress does: blocks make up for what those before them lost")  # fmt: skip
    p.add_argument("--minutes", type=minutes, default=MINUTES, metavar="M",
                   help=f"of search in each cell of @evolutionary (default {MINUTES:g})")  # fmt: skip
    trust(p)


def codecs(args: argparse.Namespace) -> Any:
    """List the codecs: what each is for, its usual rates, its speed here."""
    from waterfill.pipeline import survey

    result = []
    for done, (row, total) in enumerate(survey(), 1):
        args.progress("trying codecs", done, total)
        result.append(row)
    if not args.json:
        rows = [
            (
                r["id"],
                _range(r["bits_per_weight"]),
                _speed(r, "encode"),
                _speed(r, "decode"),
                r["about"],
            )
            for r in result
        ]
        table(("codec", "bits", "encode", "decode", "what"), rows)
        print(
            "bits per weight from its cheapest rung to its dearest, millions of weights a second: "
            "a 256 x 512 Gaussian, bfloat16, on this machine; options: waterfill codecs --json"
        )
    return result


def _range(bits: Sequence[float]) -> str:
    low, high = f"{bits[0]:.1f}", f"{bits[-1]:.1f}"
    return low if low == high else f"{low} to {high}"


def _speed(row: Mapping[str, Any], what: str) -> str:
    return f"{row[f'{what}_weights_per_second'] / 1e6:.3g}"


VERBS = (
    Verb(
        "compare",
        compare,
        _compare_options,
        (
            "waterfill compare demo -o out/compared --methods trellis integer auto --sizes 2 3 4",
            "waterfill compare ./model -o out/compared --sizes 250MB 20% --text book.txt",
            "waterfill compare demo -o out/compared --methods integer@uniform integer@hull",
        ),
        resumes=True,
    ),
    Verb("codecs", codecs, examples=("waterfill codecs", "waterfill codecs --json")),
)
