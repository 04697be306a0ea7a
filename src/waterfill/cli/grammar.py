"""What one may say at the street door: verbs, and what their options must look like."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waterfill import __version__
from waterfill.types import WaterfillError


def _no_options(_: argparse.ArgumentParser) -> None:
    pass


def _nothing_wrong(_: argparse.Namespace) -> str:
    return ""


@dataclass(frozen=True)
class Verb:
    """One command of the program.

    Attributes
    ----------
    name : what is typed
    call : does it; takes the parsed arguments, returns what --json prints; its docstring is the help
    options : adds its arguments to its parser
    examples : command lines, shown by --help
    misuse : what is wrong with options that argparse takes one by one; "" if nothing is
    resumes : whether the same command, given again after an interrupt, goes on from there
    """

    name: str
    call: Callable[[argparse.Namespace], Any]
    options: Callable[[argparse.ArgumentParser], None] = _no_options
    examples: tuple[str, ...] = ()
    misuse: Callable[[argparse.Namespace], str] = _nothing_wrong
    resumes: bool = False


def build_parser(verbs: Iterable[Verb]) -> argparse.ArgumentParser:
    """The whole grammar; the parsed `verb` is the Verb that was named."""
    parser = argparse.ArgumentParser(
        prog="waterfill", description="Compress a model to the exact size you name."
    )
    parser.add_argument("--version", action="version", version=f"waterfill {__version__}")
    parsers = parser.add_subparsers(metavar="VERB", required=True)
    for verb in verbs:
        about = (verb.call.__doc__ or "").strip()
        p = parsers.add_parser(
            verb.name,
            help=about,
            description=about,
            epilog="\n  ".join(["examples:", *verb.examples]) if verb.examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.set_defaults(verb=verb)
        p.add_argument("--json", action="store_true", help="print the result as JSON")
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
        verb.options(p)
    return parser


# Types of arguments


def named(text: str) -> str:
    """A name of a model."""
    if not text.strip():
        # A shell variable that is not set; as a path it would be the current folder.
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def path(text: str) -> Path:
    """A path that names something."""
    return Path(named(text))


def count(text: str) -> int:
    """A positive whole number."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def bits(text: str) -> float:
    """An average number of bits, of a weight or a number."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 128:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bits; try 3.2")
    return value


def checked(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """A type that checks the text now and passes it on."""

    def check(text: str) -> str:
        try:
            parse(text)
        except WaterfillError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check


# Options that several verbs have


def trust(p: argparse.ArgumentParser) -> None:
    """Whether code in a model's folder may run."""
    p.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files that come with the model",
    )


def force(p: argparse.ArgumentParser, out: str) -> None:
    """Whether what is there may be replaced."""
    p.add_argument("--force", action="store_true", help=f"replace {out} if it exists")


def size_options(p: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """How large the weights file may be, in one of three ways; more may join them."""
    from waterfill.plan.budget import parse_ratio, parse_size

    one = p.add_mutually_exclusive_group(required=True)
    one.add_argument(
        "--size",
        type=checked(parse_size),
        metavar="SIZE",
        help="of the weights file: 250MB, 1.5GiB, 123456",
    )
    one.add_argument(
        "--bits",
        type=bits,
        metavar="B",
        help="average bits per weight, every byte of the file counted",
    )
    one.add_argument(
        "--ratio",
        type=checked(parse_ratio),
        metavar="R",
        help="share of the original's bytes: 20%%",
    )
    return one
