"""The verbs that let a compressed model write: generate, chat."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from waterfill.cli.grammar import Verb, checked, count, path, trust
from waterfill.cli.printing import plain_warnings
from waterfill.plan.budget import parse_size

if TYPE_CHECKING:
    from waterfill.runtime.conversation import Conversation
    from waterfill.runtime.generation import Continuation, Sampling, Writer

TEMPERATURE, TOP_P = 0.8, 0.95  # where one only asks for a seed


def generate(args: argparse.Namespace) -> Any:
    """Continue a prompt with a compressed model."""
    writer = open_writer(args)
    text = writer.write(writer.encode(args.prompt), sampling(args, greedy=True))
    with plain_warnings():
        text.open_cache()
    pieces = [args.prompt]
    if not args.json:
        _show(args.prompt)
    with contextlib.closing(iter(text)) as stream:
        try:
            for piece in stream:
                pieces.append(piece)
                if not args.json:
                    _show(piece)
        except KeyboardInterrupt:
            text.finish = "interrupted"
    result = {"text": "".join(pieces), "finish": text.finish, **_speed(text), **_memory(writer)}
    if text.cache is not None:
        result["cache"] = _cache(text.cache)
    if not args.json:
        print()
        print(f"{_speed_line(text)}; {_memory_line(writer)}", file=sys.stderr)
        if text.cache is not None:
            print(_cache_line(text.cache), file=sys.stderr)
    return result


def _generate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("artifact", type=path, metavar="OUT", help="what compress made")
    p.add_argument("--prompt", required=True, metavar="TEXT")
    p.add_argument("--tokens", type=count, default=60, metavar="N", help="at most (default 60)")
    _sampling_options(p, "likeliest token")
    residency_options(p)
    cache_options(p, "prompt and text")


def chat(args: argparse.Namespace) -> Any:
    """Talk with a compressed model in the terminal."""
    from waterfill.runtime.conversation import Conversation

    writer = open_writer(args, many=True)
    talk = Conversation(writer, sampling(args), args.system)
    people = sys.stdin.isatty() and not args.json
    if not args.json:
        print(f"{_memory_line(writer)}; /reset forgets, /quit ends", file=sys.stderr)
        if not writer.has_template:
            print(
                "this model has no chat template: it goes on with the plain text", file=sys.stderr
            )
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (line := _read("> " if people else "")) != "/quit":
            if line == "/reset":
                talk.reset()
            elif line:
                _answer(talk, line, args.json)
    return {"messages": talk.messages, **_memory(writer)}


def _chat_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("artifact", type=path, metavar="OUT", help="what compress made")
    p.add_argument("--system", default="", metavar="TEXT", help="what the conversation begins with")
    p.add_argument("--tokens", type=count, metavar="N", help="of an answer, at most (default 512)")
    _sampling_options(p, "as the model's generation_config.json says")
    residency_options(p)
    cache_options(p, "a full context")


def _read(prompt: str) -> str:
    """A line of stdin; on a terminal with its history, if Python has readline."""
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() uses it)
    return input(prompt).strip()


def _answer(talk: Conversation, line: str, quiet: bool) -> None:
    from waterfill.types import WaterfillError

    with contextlib.closing(talk.ask(line)) as stream:
        try:
            for piece in stream:
                if not quiet:
                    _show(piece)
        except KeyboardInterrupt:
            pass  # ends this answer, not the conversation
        except WaterfillError as error:
            print(f"waterfill: {error}", file=sys.stderr)
            return
    if talk.forgotten:
        print(
            f"the context is full: the oldest {talk.forgotten} messages are forgotten",
            file=sys.stderr,
        )
    if not quiet and talk.answer:
        print()
        print(_speed_line(talk.answer), file=sys.stderr)


# What the running verbs share


def residency_options(p: argparse.ArgumentParser) -> None:
    """How the weights are held in memory."""
    one = p.add_mutually_exclusive_group()
    one.add_argument(
        "--residency",
        choices=("dense", "packed", "coded"),
        help="weights in memory: as they were (dense, default), as low-bit integers, or still coded",
    )
    one.add_argument(
        "--memory",
        type=checked(parse_size),
        metavar="SIZE",
        help="choose for each tensor the fastest way that keeps all weights within 1.2GB",
    )
    p.add_argument(
        "--size",
        type=checked(parse_size),
        metavar="SIZE",
        help="open an artifact that has quality layers at this size",
    )
    trust(p)


def cache_options(p: argparse.ArgumentParser, what: str) -> None:
    """How keys and values are held in memory."""
    p.add_argument(
        "--cache-size",
        type=checked(parse_size),
        metavar="SIZE",
        help=f"keep keys and values of {what} within 4MB (docs/cache.md)",
    )
    p.add_argument(
        "--cache",
        type=checked(cache_method),
        metavar="METHOD",
        help="how they are held: auto (default), or a method with its options, channel:bits=4; "
        "without a size as well as it can",
    )
    p.add_argument(
        "--cache-statistics",
        type=path,
        metavar="FILE",
        help="that calibrate-cache made; default: the one in OUT, if there is one",
    )


def cache_misuse(args: argparse.Namespace) -> str:
    """Options of the cache that do not fit each other."""
    if args.cache_statistics and not (args.cache or args.cache_size):
        return "--cache-statistics is for a coded cache: add --cache-size SIZE, or leave it out"
    if args.cache_size and ":" in (args.cache or ""):
        return f"--cache {args.cache} fixes how large the cache is: leave --cache-size or its options out"
    return ""


def cache_method(text: str) -> None:
    """Refuse what is no method of a cache."""
    if text != "auto":
        from waterfill.runtime.cache.method import parse_method

        parse_method(text)


def _sampling_options(p: argparse.ArgumentParser, default: str) -> None:
    p.add_argument(
        "--seed", type=int, metavar="N", help=f"sample with this seed; default: {default}"
    )
    p.add_argument(
        "--temperature", type=_temperature, metavar="T", help="of sampling; 0: likeliest"
    )
    p.add_argument("--top-p", type=_share, metavar="P", help="sample among the likeliest P only")


def _temperature(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 100:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a temperature; try 0.8")


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1; try 0.95")


def sampling(args: argparse.Namespace, greedy: bool = False) -> Sampling:
    """How the command line wants tokens chosen; `greedy` where it says nothing."""
    from waterfill.runtime.generation import Sampling

    temperature, top_p = args.temperature, args.top_p
    if temperature is None and top_p is None:
        if args.seed is not None:
            temperature, top_p = TEMPERATURE, TOP_P
        elif greedy:
            temperature = 0.0
    return Sampling(args.tokens, temperature, top_p, args.seed)


def open_writer(args: argparse.Namespace, many: bool = False) -> Writer:
    """The artifact, opened as the options say; for `many` texts a cache is planned once, and now."""
    from waterfill.runtime.generation import open_writer

    chosen = {"residency": args.residency, "memory": args.memory, "size": args.size}
    options = {name: value for name, value in chosen.items() if value is not None}
    coded = args.cache_size is not None or args.cache is not None
    if coded:
        whole = {"tokens": None} if many else {}
        options["cache"] = {
            "size": args.cache_size,
            "method": args.cache or "auto",
            "statistics": args.cache_statistics,
            **whole,
        }
    writer = open_writer(args.artifact, trust_remote_code=args.trust_remote_code, **options)
    if coded and many:
        with plain_warnings():
            writer.give_back(writer.take_cache(0))
    return writer


def _show(text: str) -> None:
    """Text on stdout at once; on a terminal without what would move its cursor."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c.isprintable() or c in "\n\t")
    print(text, end="", flush=True)


def _speed(text: Continuation) -> dict[str, Any]:
    took = text.timings
    return {
        "prompt_tokens": took.prompt_tokens,
        "tokens": took.tokens,
        "prefill_tokens_per_second": took.prefill_tokens_per_second,
        "tokens_per_second": took.decode_tokens_per_second,
    }


def _speed_line(text: Continuation) -> str:
    took = text.timings
    decode = took.decode_tokens_per_second
    rate = "" if decode is None else f", then {took.tokens} tokens at {decode:.1f} tokens/s"
    return f"prompt of {took.prompt_tokens} tokens at {took.prefill_tokens_per_second:.1f} tokens/s{rate}"


def _cache(cache: Any) -> dict[str, Any]:
    tokens = cache.get_seq_length()
    return {
        "nbytes": cache.nbytes,
        "budget_nbytes": cache.budget.nbytes,
        "tokens": tokens,
        "bytes_per_token": cache.nbytes / max(tokens, 1),
        "exact_bytes_per_token": sum(one.token_nbytes for one in cache.facts if one is not None),
        "methods": {str(index): str(one.method) for index, one in cache.choices.items()},
    }


def _cache_line(cache: Any) -> str:
    about = _cache(cache)
    return (
        f"cache {about['nbytes']:,} bytes for {about['tokens']:,} tokens: "
        f"{about['bytes_per_token']:,.0f} a token, where exact keys and values take "
        f"{about['exact_bytes_per_token']:,}"
    )


def _memory(writer: Writer) -> dict[str, Any]:
    from waterfill.runtime.footprint import peak_nbytes, weights_nbytes

    return {"weights_nbytes": weights_nbytes(writer.model), "peak_nbytes": peak_nbytes()}


def _memory_line(writer: Writer) -> str:
    memory = _memory(writer)
    return (
        f"weights {memory['weights_nbytes'] / 1e6:,.1f} MB in memory, "
        f"process at most {memory['peak_nbytes'] / 1e6:,.1f} MB"
    )


VERBS = (
    Verb(
        "generate",
        generate,
        _generate_options,
        (
            "waterfill generate out/small --prompt 'Once upon a time' --tokens 60",
            "waterfill generate out/small --prompt 'Once upon a time' --seed 7 --temperature 0.6",
            "waterfill generate out/small --prompt 'Once upon a time' --residency packed",
            "waterfill generate out/small --prompt 'Once upon a time' --memory 1.2GB --json",
            "waterfill generate out/small --prompt 'Once upon a time' --cache-size 2MB",
        ),
        misuse=cache_misuse,
    ),
    Verb(
        "chat",
        chat,
        _chat_options,
        (
            "waterfill chat out/small",
            "waterfill chat out/small --system 'Answer briefly.' --residency coded",
            "waterfill chat out/small --cache-size 20MB",
        ),
        misuse=cache_misuse,
    ),
)
