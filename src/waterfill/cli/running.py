"""The verbs that run a compressed model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from waterfill.cli.grammar import Verb, count, path


def generate(args: argparse.Namespace) -> Any:
    """Continue a prompt with a compressed model."""
    from waterfill.runtime.torch_model import generate

    text, speed = generate(args.artifact, args.prompt, args.tokens, args.seed)
    if not args.json:
        print(text)
        if sys.stderr.isatty():
            print(f"{speed:.1f} tokens/s", file=sys.stderr)
    return {"text": text, "tokens_per_second": speed}


def _generate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("artifact", type=path, metavar="OUT", help="what compress made")
    p.add_argument("--prompt", required=True)
    p.add_argument("--tokens", type=count, default=60)
    p.add_argument("--seed", type=int, help="sample with this seed; default: greedy")


VERBS = (
    Verb(
        "generate",
        generate,
        _generate_options,
        ("waterfill generate out/small --prompt 'Once upon a time' --tokens 60",),
    ),
)
