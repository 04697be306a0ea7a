"""The verbs for the KV cache: calibrate-cache, cache."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

from waterfill.cli.grammar import Verb, bits, checked, count, force, named, path, trust
from waterfill.cli.printing import short, table
from waterfill.cli.running import cache_method
from waterfill.types import BudgetError

TOKENS = 16384  # of calibration text, if not said otherwise
BITS = (2.0, 3.0, 4.0)


def calibrate_cache(args: argparse.Namespace) -> Any:
    """Learn from text what errors in a model's KV cache cost, once, into a small file."""
    from waterfill.pipeline import calibrate_cache_to
    from waterfill.report.words import flat

    result = calibrate_cache_to(
        args.model,
        args.out,
        "self" if args.self_text else args.text,
        tokens=args.tokens,
        window=args.window,
        seed=args.seed,
        force=args.force,
        trust_remote_code=args.trust_remote_code,
        progress=args.progress,
    )
    if not args.json:
        print(
            f"{result['path']}: {result['nbytes']:,} bytes, statistics of {result['layers']} layers"
        )
        for key, value in flat({k: v for k, v in result["protocol"].items() if k != "probe"}):
            print(f"  {key}: {short(value)}")
        words = ["waterfill", "cache", args.model, "--bits", "2", "3", "4"]
        if not result["beside"]:
            words += ["--statistics", result["path"]]
        print(f"next: {shlex.join(words)}")
    return result


def _calibrate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "model", type=named, metavar="OUT", help="artifact, model folder, hub id, or demo"
    )
    p.add_argument(
        "-o",
        "--out",
        type=path,
        metavar="FILE",
        help="default: cache.safetensors in OUT, where it is found",
    )
    text = p.add_mutually_exclusive_group()
    text.add_argument(
        "--text", nargs="+", type=path, metavar="FILE", help="default: a packaged text"
    )
    text.add_argument(
        "--self", dest="self_text", action="store_true", help="let the model sample its own text"
    )
    p.add_argument(
        "--tokens",
        type=count,
        default=TOKENS,
        metavar="N",
        help=f"of text in all (default {TOKENS})",
    )
    p.add_argument("--window", type=count, metavar="N", help="tokens at once (default: up to 1024)")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    force(p, "FILE")
    trust(p)


def cache(args: argparse.Namespace) -> Any:
    """Measure what a KV cache of a size costs: bytes per token, KL, speed, beside an exact one."""
    from waterfill.pipeline import measure_caches
    from waterfill.report import cache_remarks, cache_rows, write_cache

    for made in (args.out, args.report):
        if made:
            made.parent.mkdir(parents=True, exist_ok=True)
    result = measure_caches(
        args.model,
        methods=args.methods,
        sizes=args.sizes or (),
        bits=args.bits or (() if args.sizes else BITS),
        text=args.text,
        statistics=args.statistics,
        tokens=args.tokens,
        window=args.window,
        stock=not args.no_stock,
        trust_remote_code=args.trust_remote_code,
        progress=args.progress,
    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = write_cache(result, args.report) if args.report else None
    if not args.json:
        table(*cache_rows(result))
        for line in (*cache_remarks(result), _protocol(result)):
            print(line)
        if result["statistics"] is None:
            print(
                "no statistics of this cache, so auto had no methods that need them; "
                f"next: waterfill calibrate-cache {shlex.quote(args.model)}"
            )
        if page:
            print(f"{page}: the picture")
    if not any("nbytes" in cell for cell in result["cells"] if not cell.get("stock")):
        raise BudgetError("no cache was made: name other sizes, bits or methods")
    return result


def _protocol(result: dict[str, Any]) -> str:
    p = result["protocol"]
    return (
        f"{p['windows']} windows of {p['window']} tokens, one row; a prompt of {p['prompt']}, then "
        f"{p['tokens at once']} at once; speed: the last {p['tokens timed']} tokens one by one"
    )


def _cache_options(p: argparse.ArgumentParser) -> None:
    from waterfill.plan.budget import parse_size

    p.add_argument(
        "model", type=named, metavar="OUT", help="artifact, model folder, hub id, or demo"
    )
    p.add_argument(
        "--sizes", nargs="+", type=checked(parse_size), metavar="SIZE",
        help="bytes of a whole cache when a window is full: 1MB 500kB",
    )  # fmt: skip
    p.add_argument(
        "--bits", nargs="+", type=bits, metavar="B",
        help="the same by bits of each number in keys and values, everything counted (default 2 3 4)",
    )  # fmt: skip
    p.add_argument(
        "--methods", nargs="+", type=checked(cache_method), default=["auto"], metavar="METHOD",
        help="auto (default), channel, transform, ...; with options (channel:bits=4) it has a size of its own",
    )  # fmt: skip
    p.add_argument("--text", nargs="+", type=path, metavar="FILE", help="default: a packaged text")
    p.add_argument(
        "--statistics", type=path, metavar="FILE",
        help="that calibrate-cache made; default: the one in OUT, if there is one",
    )  # fmt: skip
    p.add_argument(
        "--tokens", type=count, metavar="N", help="stop after so much text (default 4096)"
    )
    p.add_argument("--window", type=count, metavar="N", help="tokens at once (default: up to 1024)")
    p.add_argument(
        "--no-stock", action="store_true",
        help="leave out transformers' own quantised caches, measured where quanto or hqq is installed",
    )  # fmt: skip
    p.add_argument("-o", "--out", type=path, metavar="JSON", help="write the result into a file")
    p.add_argument("--report", type=path, metavar="HTML", help="draw one self-contained page")
    trust(p)


VERBS = (
    Verb(
        "calibrate-cache",
        calibrate_cache,
        _calibrate_options,
        (
            "waterfill calibrate-cache out/small",
            "waterfill calibrate-cache ./model --text wiki.txt code.txt --tokens 65536",
            "waterfill calibrate-cache demo -o out/demo-cache.safetensors --self",
        ),
    ),
    Verb(
        "cache",
        cache,
        _cache_options,
        (
            "waterfill cache out/small --bits 2 3 4",
            "waterfill cache out/small --sizes 1MB 2MB --methods auto channel transform --text book.txt",
            "waterfill cache demo --statistics out/demo-cache.safetensors --report out/cache.html -o out/cache.json",
        ),
    ),
)
