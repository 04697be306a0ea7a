"""What one may say at the street door: verbs, options, and what each of them must look like."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from waterfill import __version__
from waterfill.types import WaterfillError

EXAMPLES = {
    "compress": """examples:
  waterfill compress demo -o out/small --bits 3
  waterfill compress meta-llama/Llama-3.2-1B -o out/llama --size 600MB --calibrate wiki.txt
  waterfill compress demo -o out/exact --lossless
  waterfill compress demo -o out/planned --plan plan.json
  waterfill compress ./model -o out/m --ratio 20% --keep '*lm_head*' --codec '*.down_proj*=integer:bits=4'""",
    "calibrate": """examples:
  waterfill calibrate demo -o out/stats
  waterfill calibrate ./model --text wiki.txt code.txt --tokens 65536 -o out/stats""",
    "plan": """examples:
  waterfill plan out/stats --size 2MB -o plan.json
  waterfill plan out/stats --bits 2.5 --dry-run --json""",
    "show": """examples:
  waterfill show out/small
  waterfill show out/small --json | jq '.ledger[0]'
  waterfill show step2.patch""",
    "eval": "examples:\n  waterfill eval out/small --against demo --text book.txt",
    "decompress": """examples:
  waterfill decompress out/small -o out/plain
  waterfill decompress out/exact -o out/back""",
    "diff": "examples:\n  waterfill diff out/step1 out/step2 -o step2.patch",
    "patch": """examples:
  waterfill patch out/step1 step2.patch -o out/step2-again
  waterfill patch out/step1 step2.patch step3.patch -o out/step3""",
    "verify": "examples:\n  waterfill verify out/small\n  waterfill verify step2.patch",
    "generate": "examples:\n  waterfill generate out/small --prompt 'Once upon a time' --tokens 60",
    "report": "examples:\n  waterfill report out/small\n  waterfill report out/small out/smaller -o both.html",
}

TOKENS = 32768  # of calibration text, if not said otherwise

Verb = Callable[[argparse.Namespace], Any]


def _pair(text: str) -> tuple[str, str]:
    glob, sep, spec = text.partition("=")
    if not sep or not glob or not spec:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write GLOB=SPEC, for example '*.mlp.*=integer:bits=4'"
        )
    return glob, spec


def _named(text: str) -> str:
    if not text.strip():
        # A shell variable that is not set; as a path it would be the current folder.
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def _path(text: str) -> Path:
    return Path(_named(text))


def _checked(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """An argparse type that checks the text now and passes it on."""

    def check(text: str) -> str:
        try:
            parse(text)
        except WaterfillError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check


def _bits(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 128:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bits per weight; try 3.2")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def misuse(args: argparse.Namespace) -> str:
    """What is wrong with options that argparse takes one by one; "" if nothing is."""
    if not getattr(args, "lossless", False):
        return ""
    options = {
        "--calibrate": args.calibrate,
        "--tokens": args.tokens,
        "--no-propagate": args.no_propagate,
        "--keep": args.keep,
        "--codec": args.codec,
    }
    given = [name for name, value in options.items() if value]
    if not given:
        return ""
    return (
        f"--lossless keeps every bit and reads no text, so {' and '.join(given)} would do nothing: "
        f"leave {'it' if len(given) == 1 else 'them'} out, or name a --size, --bits or --ratio instead of --lossless"
    )


def build_parser(calls: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """The whole grammar; `calls` has the function of each verb, whose docstring is its help."""
    from waterfill.plan.budget import parse_ratio, parse_size

    parser = argparse.ArgumentParser(
        prog="waterfill", description="Compress a model to the exact size you name."
    )
    parser.add_argument("--version", action="version", version=f"waterfill {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str) -> argparse.ArgumentParser:
        call = calls[name]
        p = verbs.add_parser(
            name,
            help=(call.__doc__ or "").strip(),
            description=(call.__doc__ or "").strip(),
            epilog=EXAMPLES.get(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.set_defaults(verb=call)
        p.add_argument("--json", action="store_true", help="print the result as JSON")
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return p

    def budget(p: argparse.ArgumentParser, or_plan: bool = False) -> None:
        one = p.add_mutually_exclusive_group(required=True)
        one.add_argument(
            "--size",
            type=_checked(parse_size),
            metavar="SIZE",
            help="of the weights file: 250MB, 1.5GiB, 123456",
        )
        one.add_argument(
            "--bits",
            type=_bits,
            metavar="B",
            help="average bits per weight, every byte of the file counted",
        )
        one.add_argument(
            "--ratio",
            type=_checked(parse_ratio),
            metavar="R",
            help="share of the original's bytes: 20%%",
        )
        if or_plan:
            one.add_argument(
                "--lossless",
                action="store_true",
                help="as small as exact coding gets: every bit kept, any safetensors files, no text",
            )
            one.add_argument(
                "--plan",
                type=_path,
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
        p.add_argument("--codec", action="append", default=[], type=_pair, metavar="GLOB=SPEC",
                       help="a codec id, with options (integer:bits=3) or without; the last match wins")  # fmt: skip

    def code(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run Python files that come with the model",
        )

    p = verb("compress")
    p.add_argument("model", type=_named, help="folder in Hugging Face layout, hub id, or demo")
    p.add_argument("-o", "--out", type=_path, required=True, metavar="OUT")
    budget(p, or_plan=True)
    p.add_argument(
        "--calibrate",
        nargs="+",
        type=_named,
        metavar="FILE|STATS|self",
        help="text files, a statistics folder, or self; default: a packaged text",
    )
    p.add_argument("--tokens", type=_count, help=f"calibration tokens (default {TOKENS})")
    p.add_argument(
        "--no-propagate",
        action="store_true",
        help="encode once: do not let blocks make up for what the ones before them lost (faster)",
    )
    p.add_argument("--force", action="store_true", help="replace OUT if it exists")
    code(p)

    p = verb("calibrate")
    p.add_argument("model", type=_named)
    p.add_argument("-o", "--out", type=_path, required=True, metavar="STATS")
    text = p.add_mutually_exclusive_group()
    text.add_argument(
        "--text", nargs="+", type=_path, metavar="FILE", help="default: a packaged text"
    )
    text.add_argument(
        "--self", dest="self_text", action="store_true", help="let the model sample its own text"
    )
    p.add_argument("--tokens", type=_count, default=32768)
    p.add_argument(
        "--method",
        choices=("fisher", "differences", "none"),
        default="fisher",
        help="how sensitivities are found (default fisher)",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--force", action="store_true", help="replace STATS if it exists")
    code(p)

    p = verb("plan")
    p.add_argument("statistics", type=_path, metavar="STATS")
    budget(p)
    p.add_argument("-o", "--out", type=_path, metavar="PLAN", help="write the plan as JSON")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing at all, not even the price list kept in STATS",
    )

    p = verb("show")
    p.add_argument("artifact", type=_path, metavar="OUT", help="what compress made, or a patch")

    p = verb("eval")
    p.add_argument("artifact", type=_path, metavar="OUT")
    p.add_argument("--against", type=_named, required=True, metavar="MODEL")
    p.add_argument("--text", nargs="+", type=_path, metavar="FILE", help="default: a packaged text")
    p.add_argument("--window", type=_count, help="context length in tokens (default: up to 1024)")
    p.add_argument(
        "--stride", type=_count, help="tokens scored per window (default: half a window)"
    )
    p.add_argument("--tokens", type=_count, help="stop after so many tokens of text")
    p.add_argument(
        "--layers",
        action="store_true",
        help="also measure each tensor alone (slow), for the report",
    )
    code(p)

    p = verb("decompress")
    p.add_argument("artifact", type=_path, metavar="OUT", help="what compress made")
    p.add_argument("-o", "--out", type=_path, required=True, metavar="DIR", help="folder to make")
    p.add_argument("--force", action="store_true", help="replace DIR if it exists")

    p = verb("diff")
    p.add_argument(
        "base", type=_named, metavar="BASE", help="folder of *.safetensors, hub id, or demo"
    )
    p.add_argument("new", type=_named, metavar="NEW", help="what BASE became")
    p.add_argument("-o", "--out", type=_path, required=True, metavar="PATCH", help="file to make")
    p.add_argument("--force", action="store_true", help="replace PATCH if it exists")

    p = verb("patch")
    p.add_argument("base", type=_named, metavar="BASE", help="what the first patch was made from")
    p.add_argument("patches", type=_path, nargs="+", metavar="PATCH", help="one, or a chain")
    p.add_argument("-o", "--out", type=_path, required=True, metavar="NEW", help="folder to make")
    p.add_argument("--force", action="store_true", help="replace NEW if it exists")

    p = verb("verify")
    p.add_argument("artifact", type=_path, metavar="OUT", help="what compress made, or a patch")

    p = verb("generate")
    p.add_argument("artifact", type=_path, metavar="OUT", help="what compress made")
    p.add_argument("--prompt", required=True)
    p.add_argument("--tokens", type=_count, default=60)
    p.add_argument("--seed", type=int, help="sample with this seed; default: greedy")

    p = verb("report")
    p.add_argument("artifacts", type=_path, nargs="+", metavar="OUT")
    p.add_argument("-o", "--out", type=_path, metavar="HTML", help="default: OUT/report.html")

    verb("codecs")
    return parser
