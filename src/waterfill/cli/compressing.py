"""The verbs that make an artifact, or say what it would be: compress, calibrate, plan."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from typing import Any

from waterfill.cli.grammar import Verb, count, force, named, path, size_options, trust
from waterfill.cli.printing import short, table, warn
from waterfill.types import Record

TOKENS = 32768  # of calibration text, if not said otherwise
TUNE_STEPS = 64
MINUTES = 10.0  # of a search that runs the model


def compress(args: argparse.Namespace) -> Any:
    """Make a smaller model of exactly the size you name."""
    from waterfill.pipeline import compress

    record = compress(
        args.model,
        args.out,
        size=args.size,
        bits=args.bits,
        ratio=args.ratio,
        plan=args.plan,
        lossless=args.lossless,
        keep=args.keep,
        codec=dict(args.codec),
        allocate=args.allocate,
        minutes=args.minutes or MINUTES,
        calibration=calibration(args.calibrate),
        tokens=args.tokens or TOKENS,
        propagate=not args.no_propagate,
        tune=args.tune,
        tune_steps=args.tune_steps or TUNE_STEPS,
        force=args.force,
        trust_remote_code=args.trust_remote_code,
        command=args.command_line,
        progress=args.progress.nbytes if args.lossless else args.progress,
    )
    warn(record.about["warnings"])
    if not args.json:
        (_say_lossless if args.lossless else _say_budget)(args, record)
    return record.to_json()


def _say_lossless(args: argparse.Namespace, record: Record) -> None:
    original = record.about["original_nbytes"]
    print(
        f"{args.out}: {record.nbytes:,} bytes, {record.nbytes / max(original, 1):.1%} "
        f"of the original {original:,} bytes"
    )
    print("  exact: every bit of every tensor was compared; the files come back byte for byte")
    print(f"next: waterfill decompress {shlex.quote(str(args.out))} -o DIR")


def _say_budget(args: argparse.Namespace, record: Record) -> None:
    about, predicted = record.about, record.predicted
    budget, original = about["budget_nbytes"], about["original_nbytes"]
    print(
        f"{args.out}: {record.nbytes:,} bytes of {budget:,} allowed ({100 * record.nbytes / budget:.2f} %)"
    )
    print(
        f"  {record.bits_per_weight:.3f} bits per weight over {about['params']:,} parameters, every byte counted"
    )
    print(f"  {record.nbytes / original:.1%} of the original {original:,} bytes")
    if about["lossless"]:
        print(
            "  lossless: the size allowed is more than exact coding needs, so nothing was changed"
        )
    else:
        print(f"  predicted harm: {predicted['kl_nats']:.4g} nats of KL per token")
        if "kl_nats_calibration" in predicted:
            print(
                f"  on {predicted['tokens_calibration']:,} tokens of the calibration text: "
                f"{predicted['kl_nats_calibration']:.4g}"
            )
        if "kl_nats_untuned" in predicted:
            print(f"  before it was tuned: {predicted['kl_nats_untuned']:.4g}")
    print(
        f"next: waterfill eval {shlex.quote(str(args.out))} --against {shlex.quote(args.model)} --text FILE"
    )


def _compress_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=named, help="folder in Hugging Face layout, hub id, or demo")
    p.add_argument("-o", "--out", type=path, required=True, metavar="OUT")
    _budget(p, or_plan=True)
    p.add_argument(
        "--calibrate",
        nargs="+",
        type=named,
        metavar="FILE|STATS|self",
        help="text files, a statistics folder, or self; default: a packaged text",
    )
    p.add_argument("--tokens", type=count, help=f"calibration tokens (default {TOKENS})")
    p.add_argument(
        "--minutes",
        type=minutes,
        metavar="M",
        help=f"of search, for --allocate evolutionary (default {MINUTES:g}); it goes on after an interrupt",
    )
    p.add_argument(
        "--no-propagate",
        action="store_true",
        help="encode once: do not let blocks make up for what the ones before them lost (faster)",
    )
    p.add_argument(
        "--tune",
        metavar="pv|v|ste",
        help="go on and better codes and scales on the text, at the same size: pv both, v scales alone, "
        "ste by straight-through estimation. Takes some 20 bytes of memory a weight, and codecs that "
        "have such: integer, float, power, codebook, vector (docs/tuning.md)",
    )
    p.add_argument(
        "--tune-steps",
        type=count,
        metavar="N",
        help=f"of about 2,048 tokens each (default {TUNE_STEPS}); time goes with them",
    )
    force(p, "OUT")
    trust(p)


def _compress_misuse(args: argparse.Namespace) -> str:
    from waterfill.plan.allocation import find_allocator

    if args.plan and args.allocate:
        return "a --plan has an allocation of its own: leave --allocate out, or name a size"
    if args.minutes and not (args.allocate and find_allocator(args.allocate).starts_from):
        return "--minutes is for an allocator that searches: --allocate evolutionary"
    if args.tune_steps and not args.tune:
        return "--tune-steps says how long to tune: add --tune pv, or leave it out"
    if not args.lossless:
        return ""
    options = {
        "--calibrate": args.calibrate,
        "--tokens": args.tokens,
        "--no-propagate": args.no_propagate,
        "--tune": args.tune,
        "--keep": args.keep,
        "--codec": args.codec,
        "--allocate": args.allocate,
    }
    given = [name for name, value in options.items() if value]
    if not given:
        return ""
    return (
        f"--lossless keeps every bit and reads no text, so {' and '.join(given)} would do nothing: "
        f"leave {'it' if len(given) == 1 else 'them'} out, or name a --size, --bits or --ratio instead of --lossless"
    )


def calibrate(args: argparse.Namespace) -> Any:
    """Run text through a model once and keep what every later plan needs."""
    from waterfill.pipeline import calibrate_to, warnings_of

    statistics = calibrate_to(
        args.model,
        args.out,
        "self" if args.self_text else args.text,
        tokens=args.tokens,
        method=args.method,
        seed=args.seed,
        force=args.force,
        trust_remote_code=args.trust_remote_code,
        progress=args.progress,
    )
    warn(warnings_of(statistics))
    if not args.json:
        weighted = sum(
            i.kind in ("linear", "embedding", "conv", "expert") for i in statistics.infos.values()
        )
        print(f"{args.out}: statistics of {weighted} weight matrices")
        for key, value in statistics.protocol.items():
            print(f"  {key}: {short(value)}")
        print(f"next: waterfill plan {shlex.quote(str(args.out))} --bits 3")
    return {
        "path": str(args.out),
        "protocol": dict(statistics.protocol),
        "notes": dict(statistics.notes),
    }


def _calibrate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=named)
    p.add_argument("-o", "--out", type=path, required=True, metavar="STATS")
    text = p.add_mutually_exclusive_group()
    text.add_argument(
        "--text", nargs="+", type=path, metavar="FILE", help="default: a packaged text"
    )
    text.add_argument(
        "--self", dest="self_text", action="store_true", help="let the model sample its own text"
    )
    p.add_argument("--tokens", type=count, default=TOKENS)
    p.add_argument(
        "--method",
        choices=("fisher", "differences", "none"),
        default="fisher",
        help="how sensitivities are found (default fisher)",
    )
    p.add_argument("--seed", type=int, default=0)
    force(p, "STATS")
    trust(p)


def plan(args: argparse.Namespace) -> Any:
    """Say what a size would cost, without encoding."""
    from waterfill import pipeline
    from waterfill.plan.allocation import DEFAULT

    priced = pipeline.price_statistics(
        args.statistics, args.keep, dict(args.codec), write=not args.dry_run, progress=args.progress
    )
    result = pipeline.plan_json(
        priced, size=args.size, bits=args.bits, ratio=args.ratio, allocate=args.allocate or DEFAULT
    )
    if args.out and not args.dry_run:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not args.json:
        rows = [
            (
                r["name"],
                r["codec"],
                f"{r['nbytes']:,.0f}",
                f"{r['bits_per_weight']:.2f}",
                f"{r['predicted_nats']:.2e}",
            )
            for r in result["choices"]
        ]
        table(("tensor", "codec", "bytes", "bits", "nats"), rows)
        print(
            f"budget {result['budget_nbytes']:,} bytes, {result['bits_per_weight']:.3f} bits per weight"
        )
        print(
            f"predicted harm: {result['predicted_nats']:.4g} nats of KL per token; nothing was encoded"
        )
        if args.out and not args.dry_run:
            print(f"next: waterfill compress MODEL --plan {shlex.quote(str(args.out))} -o OUT")
    return result


def _plan_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("statistics", type=path, metavar="STATS")
    _budget(p)
    p.add_argument("-o", "--out", type=path, metavar="PLAN", help="write the plan as JSON")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing at all, not even the price list kept in STATS",
    )


def calibration(values: Sequence[str] | None) -> Any:
    """What --calibrate was given, as `waterfill.compress` takes it."""
    if not values:
        return None
    return "self" if list(values) == ["self"] else list(values)


def _budget(p: argparse.ArgumentParser, or_plan: bool = False) -> None:
    from waterfill.plan.allocation import DEFAULT, allocators

    one = size_options(p)
    if or_plan:
        one.add_argument(
            "--lossless",
            action="store_true",
            help="as small as exact coding gets: every bit kept, any safetensors files, no text",
        )
        one.add_argument(
            "--plan",
            type=path,
            metavar="PLAN|OUT",
            help="sizes and codecs as `waterfill plan -o PLAN` chose them, or as in an artifact",
        )
    p.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="GLOB",
        help="keep these tensors exact (repeatable)",
    )
    p.add_argument(
        "--allocate",
        choices=allocators(),
        help=f"how the budget is spent over the tensors (default {DEFAULT}); see docs/planning.md",
    )
    p.add_argument("--codec", action="append", default=[], type=_pair, metavar="[GLOB=]SPEC",
                   help="a codec id, with options (integer:bits=3) or without, or auto: the best of all; "
                   "the last match wins, no GLOB is all")  # fmt: skip


def _pair(text: str) -> tuple[str, str]:
    glob, sep, spec = text.partition("=")
    if glob and (not sep or ":" in glob):  # no tensor's name has a colon, every option follows one
        glob, spec = "*", text
    if not glob or not spec:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write GLOB=SPEC, for example '*.mlp.*=integer:bits=4'"
        )
    return glob, spec


def minutes(text: str) -> float:
    """A time that a search may take."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no time in minutes; try 30")
    return value


VERBS = (
    Verb(
        "compress",
        compress,
        _compress_options,
        (
            "waterfill compress demo -o out/small --bits 3",
            "waterfill compress meta-llama/Llama-3.2-1B -o out/llama --size 600MB --calibrate wiki.txt",
            "waterfill compress demo -o out/exact --lossless",
            "waterfill compress demo -o out/planned --plan plan.json",
            "waterfill compress ./model -o out/m --ratio 20% --keep '*lm_head*' --codec '*.down_proj*=integer:bits=4'",
        ),
        misuse=_compress_misuse,
        resumes=True,
    ),
    Verb(
        "calibrate",
        calibrate,
        _calibrate_options,
        (
            "waterfill calibrate demo -o out/stats",
            "waterfill calibrate ./model --text wiki.txt code.txt --tokens 65536 -o out/stats",
        ),
        resumes=True,
    ),
    Verb(
        "plan",
        plan,
        _plan_options,
        (
            "waterfill plan out/stats --size 2MB -o plan.json",
            "waterfill plan out/stats --bits 2.5 --dry-run --json",
        ),
    ),
)
