"""The street door: one verb, one function; arguments in, printing out, nothing else.

Results go to stdout, progress to stderr (silent when that is not a terminal).
Exit status: 0 done, 1 could not, 2 usage.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence

from waterfill.cli import (
    caching,
    comparing,
    compressing,
    files,
    results,
    running,
    serving,
    sizing,
)
from waterfill.cli.bars import Bars
from waterfill.cli.grammar import build_parser as build_parser
from waterfill.cli.printing import printable
from waterfill.types import WaterfillError

ROOMS = (compressing, results, comparing, files, sizing, running, caching, serving)
VERBS = tuple(verb for room in ROOMS for verb in room.VERBS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    parser = build_parser(VERBS)
    args = parser.parse_args(argv)
    if wrong := args.verb.misuse(args):
        parser.error(wrong)
    args.command_line = shlex.join(["waterfill", *(sys.argv[1:] if argv is None else argv)])
    try:
        with warnings.catch_warnings(), Bars() as bars:
            # Raised by lanes that OpenBLAS computes and does not use, now and then.
            warnings.filterwarnings("ignore", "invalid value .* in matmul", RuntimeWarning)
            args.progress = bars
            result = args.verb.call(args)
        if args.json:
            print(json.dumps(result, indent=1))
        sys.stdout.flush()
    except KeyboardInterrupt:
        hint = "; run the same command again to go on from here" if args.verb.resumes else ""
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
