"""The street door: one verb, one function; arguments in, printing out, nothing else.

Results go to stdout, progress to stderr (silent when that is not a terminal).
Exit status: 0 done, 1 could not, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from waterfill import __version__
from waterfill.types import WaterfillError

EXAMPLES = {
    "compress": """examples:
  waterfill compress demo -o out/small --bits 3
  waterfill compress meta-llama/Llama-3.2-1B -o out/llama --size 600MB --calibrate wiki.txt
  waterfill compress ./model -o out/m --ratio 20%% --keep '*lm_head*' --codec '*.down_proj*=integer:bits=4'""",
    "calibrate": """examples:
  waterfill calibrate demo -o out/stats
  waterfill calibrate ./model --text wiki.txt code.txt --tokens 65536 -o out/stats""",
    "plan": """examples:
  waterfill plan out/stats --size 2MB
  waterfill plan out/stats --bits 2.5 --dry-run --json""",
    "show": "examples:\n  waterfill show out/small\n  waterfill show out/small --json | jq '.ledger[0]'",
    "eval": "examples:\n  waterfill eval out/small --against demo --text book.txt",
    "decompress": "examples:\n  waterfill decompress out/small -o out/plain",
    "verify": "examples:\n  waterfill verify out/small",
    "generate": "examples:\n  waterfill generate out/small --prompt 'Once upon a time' --tokens 60",
    "report": "examples:\n  waterfill report out/small\n  waterfill report out/small out/smaller -o both.html",
}

Verb = Callable[[argparse.Namespace], Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.command_line = shlex.join(["waterfill", *(sys.argv[1:] if argv is None else argv)])
    try:
        with Bars() as bars:
            args.progress = bars
            result = args.verb(args)
    except KeyboardInterrupt:
        print(
            "waterfill: interrupted; run the same command again to go on from here", file=sys.stderr
        )
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (WaterfillError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"waterfill: {error}", file=sys.stderr)
        return 1
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    return 0


class Bars:
    """Progress with time left on stderr: a terminal and rich, or nothing."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        if sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return
            self._progress = progress.Progress(
                progress.TextColumn("{task.description:<24}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Bars:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are behind us."""
        if self._progress:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total)
            self._progress.update(self._tasks[stage], completed=done, total=total)


def compress(args: argparse.Namespace) -> Any:
    """Make a smaller model of exactly the size you name."""
    from waterfill.pipeline import compress

    record = compress(
        args.model,
        args.out,
        size=args.size,
        bits=args.bits,
        ratio=args.ratio,
        keep=args.keep,
        codec=dict(args.codec),
        calibration=_calibration(args.calibrate),
        tokens=args.tokens,
        force=args.force,
        trust_remote_code=args.trust_remote_code,
        command=args.command_line,
        progress=args.progress,
    )
    if not args.json:
        about = record.about
        budget = about["budget_nbytes"]
        print(
            f"{args.out}: {record.nbytes:,} bytes of {budget:,} allowed ({100 * record.nbytes / budget:.2f} %)"
        )
        print(
            f"  {record.bits_per_weight:.3f} bits per weight over {about['params']:,} parameters, every byte counted"
        )
        print(
            f"  {record.nbytes / about['original_nbytes']:.1%} of the original {about['original_nbytes']:,} bytes"
        )
        if about["lossless"]:
            print(
                "  lossless: the size allowed is more than exact coding needs, so nothing was changed"
            )
        else:
            print(f"  predicted harm: {record.predicted['kl_nats']:.4g} nats of KL per token")
        print(
            f"next: waterfill eval {shlex.quote(str(args.out))} --against {shlex.quote(args.model)} --text FILE"
        )
    return record.to_json()


def calibrate(args: argparse.Namespace) -> Any:
    """Run text through a model once and keep what every later plan needs."""
    from waterfill.calibrate import calibrate
    from waterfill.runtime.artifact import refuse_existing
    from waterfill.sources import open_source

    if not (args.out / "statistics.json").exists() or args.force:
        source = open_source(args.model, trust_remote_code=args.trust_remote_code)
        if not (args.out / "unfinished").exists():
            refuse_existing(args.out, args.force)
        texts = "self" if args.self_text else args.text
        progress = args.progress
        statistics = calibrate(
            source,
            args.out,
            texts,
            tokens=args.tokens,
            method=args.method,
            seed=args.seed,
            progress=lambda done, total, what: progress(what, done, total),
        )
    else:
        refuse_existing(args.out, args.force)
        raise AssertionError
    if not args.json:
        weighted = sum(
            i.kind in ("linear", "embedding", "conv", "expert") for i in statistics.infos.values()
        )
        print(f"{args.out}: statistics of {weighted} weight matrices")
        for key, value in statistics.protocol.items():
            print(f"  {key}: {_short(value)}")
        print(f"next: waterfill plan {shlex.quote(str(args.out))} --bits 3")
    return {
        "path": str(args.out),
        "protocol": dict(statistics.protocol),
        "notes": dict(statistics.notes),
    }


def plan(args: argparse.Namespace) -> Any:
    """Say what a size would cost, without encoding."""
    from waterfill import pipeline

    priced = pipeline.price_statistics(
        args.statistics, args.keep, dict(args.codec), write=not args.dry_run, progress=args.progress
    )
    result = pipeline.plan_json(priced, size=args.size, bits=args.bits, ratio=args.ratio)
    if args.out and not args.dry_run:
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
        _table(("tensor", "codec", "bytes", "bits", "nats"), rows)
        print(
            f"budget {result['budget_nbytes']:,} bytes, {result['bits_per_weight']:.3f} bits per weight"
        )
        print(
            f"predicted harm: {result['predicted_nats']:.4g} nats of KL per token; nothing was encoded"
        )
    return result


def show(args: argparse.Namespace) -> Any:
    """Print the ledger: every tensor, codec, byte, and why."""
    from waterfill.pipeline import show

    result = show(args.artifact)
    if not args.json:
        rows = [
            (r["name"], r["codec"], f"{r['nbytes']:,}", f"{r['bits_per_weight']:.3f}", r["why"])
            for r in result["ledger"]
        ]
        _table(("tensor", "codec", "bytes", "bits", "why"), rows)
        print(
            f"{result['nbytes']:,} bytes, {result['bits_per_weight']:.3f} bits per weight; the rows sum to the file"
        )
    return result


def evaluate(args: argparse.Namespace) -> Any:
    """Measure a compressed model against the original."""
    from waterfill.pipeline import compare

    metrics = compare(
        args.artifact,
        args.against,
        args.text,
        window=args.window,
        stride=args.stride,
        tokens=args.tokens,
        layers=args.layers,
        trust_remote_code=args.trust_remote_code,
        progress=args.progress,
    )
    if not args.json:
        for key in (
            "perplexity_original",
            "perplexity",
            "kl_nats",
            "kl_nats_stderr",
            "kl_nats_p99",
            "top1_agreement",
        ):
            if metrics.get(key) is not None:
                print(f"{key:<22} {metrics[key]:.6g}")
        if metrics.get("predicted_kl_nats") is not None:
            print(f"{'predicted_kl_nats':<22} {metrics['predicted_kl_nats']:.6g}")
        print("protocol:")
        for key, value in metrics["protocol"].items():
            print(f"  {key}: {_short(value)}")
    return metrics


def decompress(args: argparse.Namespace) -> Any:
    """Turn an artifact back into a plain safetensors folder."""
    from waterfill.runtime.artifact import new_folder
    from waterfill.runtime.plain import decompress

    with new_folder(args.out, args.force) as folder:
        decompress(
            args.artifact, folder, lambda done, total, _: args.progress("decoding", done, total)
        )
    nbytes = sum(f.stat().st_size for f in args.out.glob("*.safetensors"))
    if not args.json:
        print(f"{args.out}: {nbytes:,} bytes of plain safetensors")
    return {"path": str(args.out), "nbytes": nbytes}


def verify(args: argparse.Namespace) -> Any:
    """Check every checksum, without decoding."""
    from waterfill.container import Reader

    with Reader(args.artifact) as reader:
        total = len(reader.entries)
        for done, _ in enumerate(reader.verify(), 1):
            args.progress("verifying", done, total)
        if not args.json:
            print(f"{reader.path}: {reader.nbytes:,} bytes, {total} tensors, every checksum holds")
        return {"path": str(reader.path), "nbytes": reader.nbytes, "tensors": total, "ok": True}


def generate(args: argparse.Namespace) -> Any:
    """Continue a prompt with a compressed model."""
    from waterfill.runtime.torch_model import generate

    text, speed = generate(args.artifact, args.prompt, args.tokens, args.seed)
    if not args.json:
        print(text)
        if sys.stderr.isatty():
            print(f"{speed:.1f} tokens/s", file=sys.stderr)
    return {"text": text, "tokens_per_second": speed}


def report(args: argparse.Namespace) -> Any:
    """Draw one self-contained HTML page from one or more artifacts."""
    from waterfill.pipeline import record_of
    from waterfill.report import write

    out = args.out or args.artifacts[0] / "report.html"
    write([record_of(a) for a in args.artifacts], out)
    if not args.json:
        print(f"{out}: {out.stat().st_size:,} bytes, opens in any browser without a network")
    return {"path": str(out), "nbytes": out.stat().st_size}


def codecs(args: argparse.Namespace) -> Any:
    """List the codecs and their options."""
    from waterfill.types import codec_ids, find_codec

    result = []
    for name in codec_ids():
        cls = find_codec(name)
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        result.append(
            {
                "id": name,
                "version": cls.version,
                "lossy": cls.lossy,
                "example": str(cls().spec),
                "about": summary,
            }
        )
        if not args.json:
            print(f"{name:<10} {summary}\n{'':<10} {cls().spec}")
    return result


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    right = {i for i, h in enumerate(head) if h in ("bytes", "bits", "nats")}
    for row in [head, *rows]:
        cells = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _calibration(values: Sequence[str] | None) -> Any:
    if not values:
        return None
    return "self" if list(values) == ["self"] else list(values)


def _pair(text: str) -> tuple[str, str]:
    glob, sep, spec = text.partition("=")
    if not sep or not glob or not spec:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write GLOB=SPEC, for example '*.mlp.*=integer:bits=4'"
        )
    return glob, spec


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


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    from waterfill.plan.budget import parse_ratio, parse_size

    parser = argparse.ArgumentParser(
        prog="waterfill", description="Compress a model to the exact size you name."
    )
    parser.add_argument("--version", action="version", version=f"waterfill {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, call: Verb) -> argparse.ArgumentParser:
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

    def budget(p: argparse.ArgumentParser) -> None:
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
        p.add_argument(
            "--keep",
            action="append",
            default=[],
            metavar="GLOB",
            help="keep these tensors exact (repeatable)",
        )
        p.add_argument("--codec", action="append", default=[], type=_pair, metavar="GLOB=SPEC",
                       help="a codec id, or one setting such as integer:bits=3; the last match wins")  # fmt: skip

    def code(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run Python files that come with the model",
        )

    p = verb("compress", compress)
    p.add_argument("model", help="folder in Hugging Face layout, hub id, or demo")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="OUT")
    budget(p)
    p.add_argument(
        "--calibrate",
        nargs="+",
        metavar="FILE|STATS|self",
        help="text files, a statistics folder, or self; default: a packaged text",
    )
    p.add_argument(
        "--tokens", type=_count, default=32768, help="calibration tokens (default 32768)"
    )
    p.add_argument("--force", action="store_true", help="replace OUT if it exists")
    code(p)

    p = verb("calibrate", calibrate)
    p.add_argument("model")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="STATS")
    text = p.add_mutually_exclusive_group()
    text.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="default: a packaged text"
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

    p = verb("plan", plan)
    p.add_argument("statistics", type=Path, metavar="STATS")
    budget(p)
    p.add_argument("-o", "--out", type=Path, metavar="PLAN", help="write the plan as JSON")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing at all, not even the price list kept in STATS",
    )

    p = verb("show", show)
    p.add_argument("artifact", type=Path, metavar="OUT")

    p = verb("eval", evaluate)
    p.add_argument("artifact", type=Path, metavar="OUT")
    p.add_argument("--against", required=True, metavar="MODEL")
    p.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="default: a packaged text")
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

    p = verb("decompress", decompress)
    p.add_argument("artifact", type=Path, metavar="OUT")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--force", action="store_true", help="replace DIR if it exists")

    p = verb("verify", verify)
    p.add_argument("artifact", type=Path, metavar="OUT")

    p = verb("generate", generate)
    p.add_argument("artifact", type=Path, metavar="OUT")
    p.add_argument("--prompt", required=True)
    p.add_argument("--tokens", type=_count, default=60)
    p.add_argument("--seed", type=int, help="sample with this seed; default: greedy")

    p = verb("report", report)
    p.add_argument("artifacts", type=Path, nargs="+", metavar="OUT")
    p.add_argument("-o", "--out", type=Path, metavar="HTML", help="default: OUT/report.html")

    verb("codecs", codecs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
