"""The street door: one verb, one function; arguments in, printing out, nothing else.

Results go to stdout, progress to stderr (silent when that is not a terminal).
Exit status: 0 done, 1 could not, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from waterfill.grammar import TOKENS, build_parser, misuse
from waterfill.types import WaterfillError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    parser = build_parser(VERBS)
    args = parser.parse_args(argv)
    if wrong := misuse(args):
        parser.error(wrong)
    args.command_line = shlex.join(["waterfill", *(sys.argv[1:] if argv is None else argv)])
    try:
        with Bars() as bars:
            args.progress = bars
            result = args.verb(args)
        if args.json:
            print(json.dumps(result, indent=1))
        sys.stdout.flush()
    except KeyboardInterrupt:
        resumes = args.verb in (compress, calibrate)
        hint = "; run the same command again to go on from here" if resumes else ""
        return _failed(f"interrupted{hint}")
    except BrokenPipeError:
        # The reader (head, less) has seen enough; the interpreter must not flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        return _failed(_one_line(error))
    return 0


def printable(text: str) -> str:
    """Text from a file, with escapes in place of what would move a terminal's cursor or break a line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _failed(message: str) -> int:
    print(f"waterfill: {printable(message)}", file=sys.stderr)
    return 1


def _one_line(error: Exception) -> str:
    """What went wrong in one line, and where it should not have been possible, how to see more."""
    message = " ".join(str(error).split())
    if isinstance(error, WaterfillError):
        return message
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"unexpected {type(error).__name__}: {message} (--debug shows where)"


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
                progress.TextColumn("{task.fields[count]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                # Else rich would send results to stderr where only that is a terminal.
                redirect_stdout=sys.stdout.isatty(),
            )

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are behind us."""
        self._show(stage, done, total, f"{done}/{total}")

    def nbytes(self, stage: str, done: int, total: int) -> None:
        """The same where the steps are bytes."""
        self._show(stage, done, total, f"{done / 1e6:,.1f}/{total / 1e6:,.1f} MB")

    def _show(self, stage: str, done: int, total: int, count: str) -> None:
        if self._progress:
            if not self._tasks:
                self._progress.start()
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total, count=count)
            self._progress.update(self._tasks[stage], completed=done, total=total, count=count)


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
        calibration=_calibration(args.calibrate),
        tokens=args.tokens or TOKENS,
        propagate=not args.no_propagate,
        force=args.force,
        trust_remote_code=args.trust_remote_code,
        command=args.command_line,
        progress=args.progress.nbytes if args.lossless else args.progress,
    )
    _warn(record.about["warnings"])
    about = record.about
    if not args.json and args.lossless:
        print(
            f"{args.out}: {record.nbytes:,} bytes, {record.nbytes / max(about['original_nbytes'], 1):.1%} "
            f"of the original {about['original_nbytes']:,} bytes"
        )
        print("  exact: every bit of every tensor was compared; the files come back byte for byte")
        print(f"next: waterfill decompress {shlex.quote(str(args.out))} -o DIR")
    elif not args.json:
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
            if "kl_nats_calibration" in record.predicted:
                whole = record.predicted
                print(
                    f"  on {whole['tokens_calibration']:,} tokens of the calibration text: "
                    f"{whole['kl_nats_calibration']:.4g}"
                )
        print(
            f"next: waterfill eval {shlex.quote(str(args.out))} --against {shlex.quote(args.model)} --text FILE"
        )
    return record.to_json()


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
    _warn(warnings_of(statistics))
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
        _table(("tensor", "codec", "bytes", "bits", "nats"), rows)
        print(
            f"budget {result['budget_nbytes']:,} bytes, {result['bits_per_weight']:.3f} bits per weight"
        )
        print(
            f"predicted harm: {result['predicted_nats']:.4g} nats of KL per token; nothing was encoded"
        )
        if args.out and not args.dry_run:
            print(f"next: waterfill compress MODEL --plan {shlex.quote(str(args.out))} -o OUT")
    return result


def show(args: argparse.Namespace) -> Any:
    """Print the ledger: every tensor, codec, byte, and why."""
    from waterfill.container import PATCH, format_of
    from waterfill.pipeline import show

    if format_of(args.artifact) == PATCH:
        return _show_patch(args)
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


def _show_patch(args: argparse.Namespace) -> Any:
    from waterfill.pipeline import show_patch

    result = show_patch(args.artifact)
    if not args.json:
        rows = [
            (
                r["name"],
                r["mode"],
                f"{r['nbytes']:,}",
                "" if r["changed"] is None else f"{r['changed']:.2%}",
            )
            for r in result["ledger"]
        ]
        _table(("tensor", "mode", "bytes", "changed"), rows)
        print(f"{result['nbytes']:,} bytes; from {result['base'][:8]} to {result['result'][:8]}")
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
        if metrics.get("calibration_kl_nats") is not None:
            print(f"{'calibration_kl_nats':<22} {metrics['calibration_kl_nats']:.6g}")
        print("protocol:")
        for key, value in metrics["protocol"].items():
            print(f"  {key}: {_short(value)}")
    return metrics


def decompress(args: argparse.Namespace) -> Any:
    """Turn an artifact back into a plain safetensors folder."""
    from waterfill.runtime.plain import decompress

    decompress(
        args.artifact,
        args.out,
        force=args.force,
        progress=lambda done, total, _: args.progress.nbytes("decoding", done, total),
    )
    nbytes = sum(f.stat().st_size for f in args.out.glob("*.safetensors"))
    if not args.json:
        print(f"{args.out}: {nbytes:,} bytes of plain safetensors")
    return {"path": str(args.out), "nbytes": nbytes}


def diff(args: argparse.Namespace) -> Any:
    """Write what turns one checkpoint into another, bit for bit."""
    from waterfill.pipeline import diff_to

    result = diff_to(args.base, args.new, args.out, force=args.force, progress=args.progress)
    if not args.json:
        times = result["model_nbytes"] / max(result["nbytes"], 1)
        print(f"{args.out}: {result['nbytes']:,} bytes, {times:.1f} times smaller than {args.new}")
        more = "".join(f", {result[k]} {k}" for k in ("new", "removed") if result[k])
        print(f"  {result['changed']} of {result['tensors']} tensors changed{more}")
        print(f"next: waterfill patch {shlex.quote(args.base)} {shlex.quote(str(args.out))} -o DIR")
    return result


def patch(args: argparse.Namespace) -> Any:
    """Apply patches to a checkpoint."""
    from waterfill.pipeline import patch

    result = patch(args.base, args.patches, args.out, force=args.force, progress=args.progress)
    if not args.json:
        print(f"{args.out}: {result['nbytes']:,} bytes of plain safetensors, every bit verified")
    return result


def verify(args: argparse.Namespace) -> Any:
    """Check every checksum, without decoding."""
    from waterfill.container import MODEL, PATCH, Reader

    with Reader(args.artifact, (MODEL, PATCH)) as reader:
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
    from waterfill.runtime.artifact import folder_of

    out = args.out or folder_of(args.artifacts[0]) / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write([record_of(a) for a in args.artifacts], out)
    if not args.json:
        print(f"{out}: {out.stat().st_size:,} bytes, opens in any browser without a network")
    return {"path": str(out), "nbytes": out.stat().st_size}


def codecs(args: argparse.Namespace) -> Any:
    """List the codecs and their options."""
    from waterfill.registry import codec_ids, find_codec

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


def _warn(warnings: Sequence[str]) -> None:
    for line in warnings:
        print(f"waterfill: warning: {printable(line)}", file=sys.stderr)


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = [[printable(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    right = {i for i, h in enumerate(head) if h in ("bytes", "bits", "nats", "changed")}
    for row in table:
        cells = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _calibration(values: Sequence[str] | None) -> Any:
    if not values:
        return None
    return "self" if list(values) == ["self"] else list(values)


VERBS = {
    "compress": compress,
    "calibrate": calibrate,
    "plan": plan,
    "show": show,
    "eval": evaluate,
    "decompress": decompress,
    "diff": diff,
    "patch": patch,
    "verify": verify,
    "generate": generate,
    "report": report,
    "codecs": codecs,
}


if __name__ == "__main__":
    sys.exit(main())
