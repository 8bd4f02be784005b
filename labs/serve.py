"""Many clients at one server: tokens per second, time to the first token, memory, what was lost.

A client asks, reads its stream to the end, and asks again, until all requests are made. A request
counts as dropped when it has neither a whole reply nor a refusal that says when to come back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

START_SECONDS = 120.0
"""A server must be ready by then."""

QUESTIONS = (
    "The for statement",
    "A function is",
    "Lists are",
    "What is a module, and how do I import one into my program?",
)


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        firsts: seconds to the first token, one per reply.
        tokens: of all replies.
        refused, errors, dropped: requests without a reply, by how that was told.
        seconds: from the first request to the last answer.
        rss_mb: most memory of the server seen in use.
        cpu_s: processor time of the server meanwhile; unlike seconds, other programs do not add.
    """

    firsts: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0
    errors: int = 0
    dropped: int = 0
    seconds: float = 0.0
    rss_mb: float = 0.0
    cpu_s: float = 0.0

    def figures(self) -> dict[str, Any]:
        """The contract's names."""
        firsts = sorted(self.firsts)
        return {
            "tokens_per_s": round(self.tokens / self.seconds, 2),
            "ttft_p50_s": round(firsts[len(firsts) // 2], 3) if firsts else None,
            "ttft_p95_s": round(firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))], 3)
            if firsts
            else None,
            "replies": len(firsts),
            "refused": self.refused,
            "dropped": self.dropped,
            "errors": self.errors,
            "rss_mb": round(self.rss_mb, 1),
            "seconds": round(self.seconds, 2),
            "cpu_s": round(self.cpu_s, 2),
            "tokens_per_cpu_s": round(self.tokens / self.cpu_s, 2) if self.cpu_s else None,
        }


class Server:
    """A server of its own process, until the block ends.

    Args:
        command: starts it; `{port}` is replaced.
        environment: beside this process's.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._command = list(command)
        self._environment = os.environ | environment
        self.port = 0

    def __enter__(self) -> Server:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = [word.format(port=self.port) for word in self._command]
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            words, env=self._environment, cwd=ROOT, stdout=self._log, stderr=self._log
        )
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0 and self._is_ready():
                    return self
            time.sleep(0.2)
        self.__exit__()
        raise RuntimeError(f"no server: {self.said()}")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def said(self) -> str:
        """The end of what it printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-600:]

    def rss_mb(self) -> float:
        """Memory in use now."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", text)
        return int(found[1]) / 1024 if found else 0.0

    def cpu_s(self) -> float:
        """Processor time so far."""
        text = Path(f"/proc/{self._process.pid}/stat").read_text()
        user, system = text.rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _is_ready(self) -> bool:
        import urllib.request

        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


async def ask(port: int, body: dict[str, Any], seen: Seen, limit_s: float) -> None:
    """One request, its stream read to the end."""
    begun = time.perf_counter()
    try:
        await asyncio.wait_for(_ask(port, body, seen, begun), limit_s)
    except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
        seen.dropped += 1


async def _ask(port: int, body: dict[str, Any], seen: Seen, begun: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data
        )
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        if status != 200:
            seen.refused += status == 429 and b"retry-after" in head.lower()
            seen.errors += status != 429
            return
        first, tokens, whole = None, 0, False
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                whole = True
            elif line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    seen.errors += 1
                    return
                if first is None and any(_said(choice) for choice in event["choices"]):
                    first = time.perf_counter() - begun
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                whole |= any(choice.get("finish_reason") for choice in event["choices"])
        if not whole or first is None:
            seen.dropped += 1
            return
        seen.firsts.append(first)
        seen.tokens += tokens
    finally:
        writer.close()


def _said(choice: dict[str, Any]) -> str:
    """Text of a part: some servers open the stream with a part that has none."""
    return str((choice.get("delta") or {}).get("content") or "")


async def load(server: Server, model: str, clients: int, requests: int, tokens: int) -> Seen:
    """Let clients ask until all requests are made."""
    seen = Seen()
    left = iter(range(requests))

    async def client() -> None:
        for number in left:
            text = QUESTIONS[number % len(QUESTIONS)]
            body = {
                "model": model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            await ask(server.port, body, seen, 300.0)

    begun, cpu = time.perf_counter(), server.cpu_s()
    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    while not all(task.done() for task in tasks):
        await asyncio.wait(tasks, timeout=0.5)
        seen.rss_mb = max(seen.rss_mb, server.rss_mb())
    await asyncio.gather(*tasks)
    seen.seconds, seen.cpu_s = time.perf_counter() - begun, server.cpu_s() - cpu
    return seen


def command_of(kind: str, model: str, extra: Sequence[str]) -> tuple[list[str], str]:
    """How a server is started, and the model's name in requests."""
    if kind == "ours":
        words = [sys.executable, "-m", "textgen.serve.command", "--model", model, "--name", "model"]
        return [*words, "--port", "{port}", *extra], "model"
    words = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        model,
        "--port",
        "{port}",
    ]
    words += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    return words + (["--continuous-batching"] if kind == "transformers-cb" else []), model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", required=True, help="model folder")
    flags.add_argument("--clients", type=int, default=16, help="at a time (default: 16)")
    flags.add_argument("--requests", type=int, help="in all (default: 2 per client, at least 8)")
    flags.add_argument("--tokens", type=int, default=32, help="of a reply, at most (default: 32)")
    flags.add_argument("--threads", type=int, default=1, help="of the model (default: 1)")
    flags.add_argument("--max-queue", type=int, default=64, help="of our server (default: 64)")
    flags.add_argument(
        "--server", choices=("ours", "transformers", "transformers-cb"), default="ours"
    )
    asked = flags.parse_args(arguments)
    model = str(Path(asked.model).resolve())
    extra = ["--max-queue", str(asked.max_queue), "--threads", str(asked.threads)]
    command, name = command_of(asked.server, model, extra)
    environment = {"OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"}
    requests = asked.requests or max(8, 2 * asked.clients)
    with Server(command, environment) as server:
        warm = asyncio.run(load(server, name, 1, 2, 8))
        if warm.errors or warm.dropped:
            print(server.said(), file=sys.stderr)
        seen = asyncio.run(load(server, name, asked.clients, requests, asked.tokens))
        told = {"server": asked.server, "clients": asked.clients, "requests": requests}
        print(json.dumps(told | seen.figures() | {"rss_start_mb": round(warm.rss_mb, 1)}))
    return 0
