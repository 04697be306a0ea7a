"""The verbs for artifacts in layers of quality: truncate, load."""

from __future__ import annotations

import argparse
import shlex
import time
from typing import Any

from waterfill.cli.grammar import Verb, checked, force, path, size_options
from waterfill.cli.printing import table


def truncate(args: argparse.Namespace) -> Any:
    """Make an artifact smaller by leaving layers of quality out; needs no model and no text."""
    from waterfill.pipeline import truncate

    record = truncate(
        args.artifact,
        args.out,
        size=args.size,
        bits=args.bits,
        ratio=args.ratio,
        force=args.force,
        command=args.command_line,
    )
    if not args.json:
        allowed, before = record.about["budget_nbytes"], record.about["cut_from_nbytes"]
        print(
            f"{args.out}: {record.nbytes:,} bytes of {allowed:,} allowed "
            f"({100 * record.nbytes / allowed:.2f} %), cut from {before:,}"
        )
        print(f"  {record.bits_per_weight:.3f} bits per weight, every byte counted")
        print(f"  predicted harm: {record.predicted['kl_nats']:.4g} nats of KL per token")
        print(f"next: waterfill eval {shlex.quote(str(args.out))} --against MODEL --text FILE")
    return record.to_json()


def _truncate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "artifact", type=path, metavar="OUT", help="what compress --codec '*=stack' made"
    )
    p.add_argument(
        "-o", "--out", type=path, required=True, metavar="SMALLER", help="folder to make"
    )
    size_options(p)
    force(p, "SMALLER")


def load(args: argparse.Namespace) -> Any:
    """Decode an artifact at a size, as programs would, and say what one gets for it."""
    from waterfill.pipeline import show
    from waterfill.runtime.footprint import peak_nbytes
    from waterfill.runtime.reading import Artifact

    shown, whole = show(args.artifact, args.size), show(args.artifact)
    start = time.perf_counter()
    with Artifact(args.artifact, args.size) as artifact:
        decoded = 0
        for done, name in enumerate(artifact.names, 1):
            decoded += artifact.read(name).nbytes
            args.progress("decoding", done, len(artifact.names))
    result = {
        **{k: v for k, v in shown.items() if k != "ledger"},
        "whole_nbytes": whole["nbytes"],
        "whole_predicted_kl_nats": whole["predicted_kl_nats"],
        "decoded_nbytes": decoded,
        "seconds": time.perf_counter() - start,
        "peak_nbytes": peak_nbytes(),
        "tensors": _kept(shown["ledger"], whole["ledger"]),
    }
    if not args.json:
        _say(args, result)
    return result


def _kept(shown: list[dict[str, Any]], whole: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is left of each tensor's bytes."""
    return [
        {"name": a["name"], "nbytes": a["nbytes"], "whole_nbytes": b["nbytes"],
         "bits_per_weight": a["bits_per_weight"], "predicted_nats": a["predicted_nats"]}
        for a, b in zip(shown, whole, strict=True)
    ]  # fmt: skip


def _say(args: argparse.Namespace, result: dict[str, Any]) -> None:
    cut = [r for r in result["tensors"] if r["nbytes"] < r["whole_nbytes"]]
    if args.tensors:
        rows = [
            (r["name"], f"{r['nbytes']:,}", f"{r['bits_per_weight']:.2f}",
             f"{r['predicted_nats']:.2e}", f"{r['nbytes'] / max(r['whole_nbytes'], 1):.0%}")
            for r in result["tensors"]
        ]  # fmt: skip
        table(("tensor", "bytes", "bits", "nats", "kept"), rows)
    print(
        f"{args.artifact}: {result['nbytes']:,} of {result['whole_nbytes']:,} bytes loaded, "
        f"{result['bits_per_weight']:.3f} bits per weight; {len(cut)} tensors cut"
    )
    print(
        f"  predicted harm: {result['predicted_kl_nats']:.4g} nats of KL per token "
        f"({result['whole_predicted_kl_nats']:.4g} of the whole)"
    )
    print(f"  {result['decoded_nbytes']:,} bytes decoded in {result['seconds']:.2f} s")
    size = f" --size {args.size}" if args.size else ""
    print(f"next: waterfill generate {shlex.quote(str(args.artifact))}{size} --prompt TEXT")


def _load_options(p: argparse.ArgumentParser) -> None:
    from waterfill.plan.budget import parse_size

    p.add_argument("artifact", type=path, metavar="OUT", help="what compress made")
    p.add_argument(
        "--size", type=checked(parse_size), metavar="SIZE", help="to load at most; default: all"
    )
    p.add_argument("--tensors", action="store_true", help="a line for each tensor as well")


VERBS = (
    Verb(
        "truncate",
        truncate,
        _truncate_options,
        (
            "waterfill truncate out/stack --size 3MB -o out/smaller",
            "waterfill truncate out/stack --bits 2.5 -o out/smaller",
        ),
    ),
    Verb(
        "load",
        load,
        _load_options,
        (
            "waterfill load out/stack --size 3MB",
            "waterfill load out/stack --size 2.5MB --tensors",
        ),
    ),
)
