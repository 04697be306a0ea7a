"""The verbs that look at what there is: show, eval, verify, report."""

from __future__ import annotations

import argparse
from typing import Any

from waterfill.cli.grammar import Verb, checked, count, named, path, trust
from waterfill.cli.printing import short, table


def show(args: argparse.Namespace) -> Any:
    """Print the ledger: every tensor, codec, byte, and why."""
    from waterfill.container import PATCH, format_of
    from waterfill.pipeline import show
    from waterfill.runtime.residency import RESIDENCIES, estimate

    if format_of(args.artifact) == PATCH:
        return _show_patch(args)
    result = show(args.artifact)
    memory = estimate(args.artifact)
    result["memory_nbytes"] = {name: memory.nbytes(name) for name in RESIDENCIES}
    if not args.json:
        rows = [
            (r["name"], r["codec"], f"{r['nbytes']:,}", f"{r['bits_per_weight']:.3f}", r["why"])
            for r in result["ledger"]
        ]
        table(("tensor", "codec", "bytes", "bits", "why"), rows)
        print(
            f"{result['nbytes']:,} bytes, {result['bits_per_weight']:.3f} bits per weight; the rows sum to the file"
        )
        for name, nbytes in result["memory_nbytes"].items():
            print(f"in memory, --residency {name}: about {nbytes:,} bytes of weights")
    return result


def _show_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("artifact", type=path, metavar="OUT", help="what compress made, or a patch")


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
        table(("tensor", "mode", "bytes", "changed"), rows)
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
        activations=args.activations,
        size=args.size,
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
            print(f"  {key}: {short(value)}")
    return metrics


def _eval_options(p: argparse.ArgumentParser) -> None:
    from waterfill.plan.budget import parse_size

    p.add_argument("artifact", type=path, metavar="OUT")
    p.add_argument("--against", type=named, required=True, metavar="MODEL")
    p.add_argument("--text", nargs="+", type=path, metavar="FILE", help="default: a packaged text")
    p.add_argument("--window", type=count, help="context length in tokens (default: up to 1024)")
    p.add_argument("--stride", type=count, help="tokens scored per window (default: half a window)")
    p.add_argument("--tokens", type=count, help="stop after so many tokens of text")
    p.add_argument(
        "--layers",
        action="store_true",
        help="also measure each tensor alone (slow), for the report",
    )
    p.add_argument(
        "--activations",
        metavar="FORM",
        help="round the inputs of linear layers to int8, e4m3 or e5m2 with a scale per token "
        "(int8:tensor: per window), simulated; shown, not kept for the report",
    )
    p.add_argument(
        "--size",
        type=checked(parse_size),
        metavar="SIZE",
        help="open an artifact in layers at this size; the figures are not kept for the report",
    )
    trust(p)


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


def _verify_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("artifact", type=path, metavar="OUT", help="what compress made, or a patch")


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


def _report_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("artifacts", type=path, nargs="+", metavar="OUT")
    p.add_argument("-o", "--out", type=path, metavar="HTML", help="default: OUT/report.html")


VERBS = (
    Verb(
        "show",
        show,
        _show_options,
        (
            "waterfill show out/small",
            "waterfill show out/small --json | jq '.ledger[0]'",
            "waterfill show step2.patch",
        ),
    ),
    Verb(
        "eval",
        evaluate,
        _eval_options,
        (
            "waterfill eval out/small --against demo --text book.txt",
            "waterfill eval out/small --against demo --activations e4m3",
        ),
    ),
    Verb(
        "verify",
        verify,
        _verify_options,
        (
            "waterfill verify out/small",
            "waterfill verify step2.patch",
        ),
    ),
    Verb(
        "report",
        report,
        _report_options,
        (
            "waterfill report out/small",
            "waterfill report out/small out/smaller -o both.html",
        ),
    ),
)
