"""`ds-gradprune serve`: flags, the socket, and the life of the server."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_gradprune.commands.flags import Parser, above_zero, count
from ds_gradprune.errors import ConfigError, GradPruneError

KEY_VARIABLE = "DS_GRADPRUNE_API_KEY"

CONNECTIONS_BESIDE = 1024
"""Connections beyond those that are continued or wait; they get a 429 or a 503."""


def parser() -> Parser:
    """The flags."""
    flags = Parser("serve", "Serve a trained model over HTTP, as OpenAI's clients expect it.")
    add = flags.add_argument
    add("--model", required=True, help="model folder, hub name, or the folder of a run")
    add("--name", help="what clients call the model (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=_port, default=8000, help="0 takes a free one (default: 8000)")
    add("--api-key", help=f"clients must send it; better in the variable {KEY_VARIABLE}")
    add("--max-queue", type=count, default=64, help="requests that may wait (default: 64)")
    add("--max-batch", type=count, default=16, help="replies written together (default: 16)")
    add("--max-tokens", type=count, default=512, help="longest reply (default: 512)")
    add("--context", type=count, default=1024, help="tokens of prompt and reply (default: 1024)")
    add("--max-kilobytes", type=count, default=256, help="largest request (default: 256)")
    add("--timeout", type=above_zero, default=120.0, help="seconds a reply may take (default: 120)")
    add(
        "--threads",
        type=count,
        default=None,
        help="cores the model computes on (default: OMP_NUM_THREADS, or all but one)",
    )
    add(
        "--watch",
        nargs="?",
        type=above_zero,
        const=5.0,
        default=None,
        metavar="SECONDS",
        help="look for a newer model or checkpoint and serve it (every 5 s)",
    )
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal comes; returns the exit code."""
    try:
        flags = parser().parse_args(arguments)
        key = flags.api_key or os.environ.get(KEY_VARIABLE) or None
        check_reach(flags.host, key)
        with _listen(flags.host, flags.port) as listening:
            _serve(flags, key, listening)
    except GradPruneError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def check_reach(host: str, key: str | None) -> None:
    """Refuse to listen where others can ask without a key. Pure.

    Raises:
        ConfigError: they could, or the key is no key.
    """
    if key is not None and (len(key) < 16 or not key.isascii() or not key.isprintable()):
        raise ConfigError("--api-key must have at least 16 printable ASCII characters.")
    if key is None and not _is_loopback(host):
        raise ConfigError(
            f"--host must be a loopback address without an API key, got {host}. Set "
            f"{KEY_VARIABLE}, or leave --host out."
        )


def build(flags: argparse.Namespace, key: str | None) -> tuple[Any, Any, Any]:
    """The application, its engine, and the watcher or None; nothing runs yet.

    Raises:
        MissingDependencyError, DataError, UnsupportedError: it cannot be made.
    """
    import torch

    from textgen.model import quiet_transformers
    from textgen.serve.app import Api, Limits
    from textgen.serve.engine import Engine
    from textgen.serve.guard import Guard
    from textgen.serve.metrics import Metrics
    from textgen.serve.sources import open_source
    from textgen.serve.watch import Watcher

    quiet_transformers()
    torch.set_num_threads(flags.threads or _usual_threads())
    source = open_source(flags.model, flags.name)
    served = source.load(flags.context)
    engine = Engine(served, rows=flags.max_batch, max_queue=flags.max_queue)
    metrics = Metrics()
    limits = Limits(max_tokens=flags.max_tokens, seconds=flags.timeout)
    api = Api(engine, limits, metrics)
    app = Guard(
        api.app(),
        api_key=key,
        max_bytes=flags.max_kilobytes * 1024,
        body_seconds=30.0,
        on_refused=api.refused,
    )
    watcher = None
    if flags.watch is not None:
        watcher = Watcher(source, engine, flags.context, metrics, _say)
    return app, engine, watcher


def _serve(flags: argparse.Namespace, key: str | None, listening: socket.socket) -> None:
    import uvicorn

    logging.getLogger("ds_gradprune.serve").addHandler(logging.StreamHandler())
    app, engine, watcher = build(flags, key)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
        limit_concurrency=flags.max_batch + flags.max_queue + CONNECTIONS_BESIDE,
    )
    engine.start()
    if watcher is not None:
        watcher.start(flags.watch)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    _say(f"serving {engine.served.name} at http://{shown}:{port} (page: /, API: /v1)")
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        if watcher is not None:
            watcher.close()
        engine.close()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded: a port in use is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise ConfigError(f"--host must be an address of this machine, got {host}: {exc}.") from exc
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as exc:
        listening.close()
        raise ConfigError(
            f"--port must be free on {host}, got {port}: {exc.strerror}. --port 0 takes a free one."
        ) from exc
    return listening


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _usual_threads() -> int:
    """One core is left to the HTTP side: two busy ones on contested cores wait for each other."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, got {text!r}")
    return int(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if not __package__:
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(main())
