"""The verbs from files to files: decompress, diff, patch."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from waterfill.cli.grammar import Verb, force, named, path


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


def _decompress_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("artifact", type=path, metavar="OUT", help="what compress made")
    p.add_argument("-o", "--out", type=path, required=True, metavar="DIR", help="folder to make")
    force(p, "DIR")


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


def _diff_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "base", type=named, metavar="BASE", help="folder of *.safetensors, hub id, or demo"
    )
    p.add_argument("new", type=named, metavar="NEW", help="what BASE became")
    p.add_argument("-o", "--out", type=path, required=True, metavar="PATCH", help="file to make")
    force(p, "PATCH")


def patch(args: argparse.Namespace) -> Any:
    """Apply patches to a checkpoint."""
    from waterfill.pipeline import patch

    result = patch(args.base, args.patches, args.out, force=args.force, progress=args.progress)
    if not args.json:
        print(f"{args.out}: {result['nbytes']:,} bytes of plain safetensors, every bit verified")
    return result


def _patch_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("base", type=named, metavar="BASE", help="what the first patch was made from")
    p.add_argument("patches", type=path, nargs="+", metavar="PATCH", help="one, or a chain")
    p.add_argument("-o", "--out", type=path, required=True, metavar="NEW", help="folder to make")
    force(p, "NEW")


VERBS = (
    Verb(
        "decompress",
        decompress,
        _decompress_options,
        (
            "waterfill decompress out/small -o out/plain",
            "waterfill decompress out/exact -o out/back",
        ),
    ),
    Verb(
        "diff",
        diff,
        _diff_options,
        ("waterfill diff out/step1 out/step2 -o step2.patch",),
    ),
    Verb(
        "patch",
        patch,
        _patch_options,
        (
            "waterfill patch out/step1 step2.patch -o out/step2-again",
            "waterfill patch out/step1 step2.patch step3.patch -o out/step3",
        ),
    ),
)
