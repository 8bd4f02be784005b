"""One set of Linux namespaces, held open by a keeper process, and the way to run commands in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_gradprune.errors import GradPruneError
from tools.netbed.requirements import SBIN, find_command

KEEPER = Path(__file__).with_name("keeper.py")

# unshare's flag and nsenter's flag for each kind of namespace
NETWORK_ONLY = ("--net",)
WHOLE_HOST = ("--net", "--mount", "--pid", "--ipc", "--uts")

CLOSE_S = 10.0
"""A keeper ends at once; one that does not in so long is killed."""


class Space:
    """A keeper and its namespaces.

    Args:
        kinds: NETWORK_ONLY or WHOLE_HOST.
        arguments: of keeper.py.

    Raises:
        GradPruneError: the kernel or a command refused; the message quotes it.
    """

    def __init__(self, kinds: tuple[str, ...], arguments: Sequence[str]) -> None:
        self._kinds = kinds
        fork = ("--fork", "--kill-child=KILL") if "--pid" in kinds else ()
        # A session of its own: Ctrl-C in a terminal reaches the owner, who then closes in order.
        # -S and -I: the keeper needs the standard library and nobody's settings.
        self._process = subprocess.Popen(
            ["unshare", *kinds, *fork, sys.executable, "-I", "-S", str(KEEPER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=tool_environ(),
            start_new_session=True,
        )
        self.pid = 0

    def wait_ready(self) -> None:
        """Return when the keeper has set its namespaces up.

        Raises:
            GradPruneError: it could not; the message quotes what it said.
        """
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        answer = self._process.stdout.readline()
        if not answer:
            said = self._process.stderr.read().strip().splitlines()
            reason = said[-1] if said else "it said nothing"
            raise GradPruneError(f"The test bed could not open a namespace: {reason}")
        self.pid = int(answer)

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` in here."""
        nsenter = find_command("nsenter") or "nsenter"
        return [nsenter, "--target", str(self.pid), *self._kinds, "--", *words]

    def call(self, *words: str) -> str:
        """Run a set-up command in here; returns what it wrote to standard output.

        Raises:
            GradPruneError: it failed; the message quotes it.
        """
        return call(self.command(*words))

    def let_go(self) -> None:
        """Tell the keeper to end; the kernel ends everything else in its namespaces."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()

    def close(self) -> None:
        """Let go, and return when the keeper is gone. Twice is fine."""
        self.let_go()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()


def call(command: list[str]) -> str:
    """Run a set-up command to its end.

    Raises:
        GradPruneError: it failed; the message quotes it.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, env=tool_environ(), stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        shown = command[command.index("--") + 1 :] if "--" in command else command
        raise GradPruneError(
            f"The test bed's command failed: {' '.join(shown)}: {said[-1] if said else 'no word'}"
        )
    return done.stdout


def tool_environ() -> dict[str, str]:
    """Our environment, with the administrator's commands on the path."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])
    return dict(os.environ) | {"PATH": path, "LC_ALL": "C"}
