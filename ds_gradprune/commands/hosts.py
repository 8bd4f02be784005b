"""An agent on every host, started over ssh.

The first host, or whichever this one is, needs no ssh. An agent runs in the same folder, with the
same interpreter and the same variables as DeepSpeed's launcher would start a rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ds_gradprune.commands.hostfile import HostLine
from ds_gradprune.errors import TransportError, TransportTimeout

EXPORTED = ("PYTHON", "NCCL_", "GLOO_", "OMP_", "UCX_", "DS_ACCELERATOR", "CUDA_VISIBLE", "HF_HUB_")
"""Variables that begin so go to every host. So do those of DeepSpeed's environment file."""

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")

ORDER_S = 60.0
"""An order is given up after so long, where it says nothing else."""


def is_here(name: str) -> bool:
    """Whether a name is one of this host's own: its address can be listened on."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return False  # ssh may know the name; it will say if it does not
    for family, kind, _, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind((address[0], 0, *address[2:]))
            return True
    return False


def exports(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that an agent gets: some of this process, and DeepSpeed's environment file."""
    found = {name: value for name, value in environ.items() if name.startswith(EXPORTED)}
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path(name).expanduser(), Path.home() / name):
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            found |= dict(line.split("=", 1) for line in lines if "=" in line)
            break
    return found


def command(host: HostLine, environ: Mapping[str, str], folder: str) -> list[str]:
    """What starts an agent on a host."""
    words = [sys.executable, "-m", "ds_gradprune.commands.agent"]
    variables = [f"{name}={value}" for name, value in exports(environ).items()]
    if is_here(host.name):
        return ["env", *variables, *words]
    remote = f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *variables, *words])}"
    return [*SSH, host.name, remote]


class Agent:
    """An agent under way on a host.

    Args:
        host: where.
        words: what starts it.

    Attributes:
        name: of the host.
    """

    def __init__(self, host: HostLine, words: Sequence[str]) -> None:
        self.name = host.name
        self._number = 0
        self._answers: queue.Queue[bytes | None] = queue.Queue()
        self._said: deque[str] = deque(maxlen=20)
        try:
            self._process = subprocess.Popen(
                list(words),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C ends us, and our end ends it
            )
        except OSError as exc:
            raise TransportError(f"{words[0]} cannot be run: {exc.strerror}.") from exc
        self._threads = [threading.Thread(target=work) for work in (self._listen, self._overhear)]
        for thread in self._threads:
            thread.start()

    def order(self, do: str, **arguments: Any) -> int:
        """Give an order; `answer` waits for what comes of it.

        Returns:
            Its number.

        Raises:
            TransportError: the agent is gone.
        """
        self._number += 1
        line = json.dumps({"id": self._number, "do": do} | arguments).encode("ascii") + b"\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError as exc:
            raise self._gone() from exc
        return self._number

    def answer(self, number: int, timeout_s: float = ORDER_S) -> Any:
        """What came of an order.

        Raises:
            TransportTimeout: nothing in time.
            TransportError: the agent is gone, or could not do it.
        """
        while True:
            try:
                line = self._answers.get(timeout=timeout_s)
            except queue.Empty:
                raise TransportTimeout(
                    f"{self.name} has not answered within {timeout_s:g} s."
                ) from None
            if line is None:
                raise self._gone()
            found = _answer_of(line)
            if found is None or found["id"] != number:
                continue
            if "fault" in found:
                raise TransportError(f"{self.name}: {found['fault']}")
            return found["result"]

    def ask(self, do: str, timeout_s: float = ORDER_S, **arguments: Any) -> Any:
        """Give an order and wait."""
        return self.answer(self.order(do, **arguments), timeout_s)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _overhear(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.decode(errors="replace").strip())

    def _gone(self) -> TransportError:
        code = self._process.wait()
        self._threads[1].join()
        said = [line for line in self._said if line]
        reason = said[-1] if said else f"it ended with exit code {code}"
        return TransportError(f"no agent on {self.name}: {reason}")


def _answer_of(line: bytes) -> dict[str, Any] | None:
    """An answer; None: something else has written a line, such as a login script."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "agent" in found else None


class Hosts:
    """Agents on all hosts. A context manager.

    Args:
        hosts: of the hostfile.
        environ: of this process.

    Raises:
        TransportError: on some host none can be started; every such host is named.
    """

    def __init__(self, hosts: Sequence[HostLine], environ: Mapping[str, str]) -> None:
        self.agents: list[Agent] = []
        try:
            for host in hosts:
                self.agents.append(Agent(host, command(host, environ, os.getcwd())))
            self.facts = self.together("facts")
        except BaseException:
            self.close()
            raise

    def together(
        self,
        do: str,
        timeout_s: float = ORDER_S,
        each: Sequence[Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """Give all agents an order at once, and wait for all.

        Args:
            do: the order.
            timeout_s: for each answer.
            each: what differs, one entry per agent.
            arguments: what is the same.

        Returns:
            Their answers, in order.

        Raises:
            TransportError: some could not; every host is named.
        """
        own = each or [{}] * len(self.agents)
        faults: list[str] = []
        waiting: list[tuple[Agent, int]] = []
        for agent, mine in zip(self.agents, own, strict=True):
            try:
                waiting.append((agent, agent.order(do, **arguments, **mine)))
            except TransportError as exc:
                faults.append(str(exc))
        results = []
        for agent, number in waiting:
            try:
                results.append(agent.answer(number, timeout_s))
            except TransportError as exc:
                faults.append(str(exc))
        if faults:
            raise TransportError("\n  ".join(faults))
        return results

    def close(self) -> None:
        """End all agents; twice is fine."""
        while self.agents:
            self.agents.pop().close()

    def __enter__(self) -> Hosts:
        """Nothing: they run since they were made."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()
