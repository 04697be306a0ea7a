"""The verb that puts a compressed model behind an endpoint: serve."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import sys
from typing import Any

from waterfill.cli.grammar import Verb, named, path
from waterfill.cli.printing import warn
from waterfill.cli.running import cache_misuse, cache_options, open_writer, residency_options

HOST, PORT = "127.0.0.1", 8000


def serve(args: argparse.Namespace) -> Any:
    """Serve a compressed model to OpenAI-compatible clients."""
    from waterfill.runtime import serving
    from waterfill.runtime.artifact import folder_of

    serving.require()
    name = folder_of(args.artifact).resolve().name
    with contextlib.closing(serving.listen(args.host, args.port)) as sock:
        port = sock.getsockname()[1]
        if not _is_loopback(args.host):
            warn([
                f"{args.host} can be reached from other machines, and there is no password: "
                f"whoever reaches port {port} can use this model"
            ])  # fmt: skip
        writer = open_writer(args, many=True)
        host = f"[{args.host}]" if ":" in args.host else args.host
        address = {"model": name, "url": f"http://{host}:{port}/v1"}
        if not args.json:
            print(f"{name} at {address['url']}; Ctrl-C stops", flush=True)
            if not writer.has_template:
                print("no chat template: it answers /v1/completions only", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            serving.serve(writer, name, sock)
    return address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; try {PORT}")
    return int(text)


def _serve_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("artifact", type=path, metavar="OUT", help="what compress made")
    p.add_argument(
        "--host", type=named, default=HOST, help=f"address to listen at (default {HOST})"
    )
    p.add_argument(
        "--port", type=_port, default=PORT, help=f"default {PORT}; 0 finds one that is free"
    )
    residency_options(p)
    cache_options(p, "a full context")


VERBS = (
    Verb(
        "serve",
        serve,
        _serve_options,
        (
            "waterfill serve out/small",
            "waterfill serve out/small --port 8080 --residency packed",
            "waterfill serve out/small --cache-size 20MB",
        ),
        misuse=cache_misuse,
    ),
)
