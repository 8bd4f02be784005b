"""A command on a host, over ssh or not, that hears and says lines of JSON."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_gradprune.errors import ConfigError


class Talker:
    """The command, from its start to its end.

    Args:
        words: see `words_on`.
        key: lines without it are not of the command: a login script may write, too.
        heard: is called with every line, and with None after the last. In another thread.
        shown: is called with every line of its stderr; None: nobody reads them.

    Raises:
        ConfigError: the first word cannot be run.
    """

    def __init__(
        self,
        words: Sequence[str],
        key: str,
        heard: Callable[[Mapping[str, Any] | None], None],
        shown: Callable[[str], None] | None = None,
    ) -> None:
        self._key = key
        self._heard = heard
        self._shown = shown
        pipe = subprocess.PIPE
        errors = pipe if shown else subprocess.DEVNULL
        self._process = started(words, stdin=pipe, stdout=pipe, stderr=errors)
        works = (self._listen, self._show) if shown else (self._listen,)
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def tell(self, line: Mapping[str, Any]) -> bool:
        """Say a line; False: the command is gone and hears nothing."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def close(self, limit_s: float) -> None:
        """Say no more, and kill what has not ended after `limit_s`. Twice is fine."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(limit_s)
        if not any(thread.is_alive() for thread in self._threads):
            for stream in filter(None, (self._process.stdout, self._process.stderr)):
                stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and self._key in line:
                    self._heard(line)
        self._heard(None)

    def _show(self) -> None:
        assert self._process.stderr is not None
        assert self._shown is not None
        for text in self._process.stderr:
            self._shown(text.decode(errors="replace"))


def words_on(name: str, ssh: Sequence[str], words: Sequence[str]) -> list[str]:
    """The command that runs `words` on a host, which may be this one."""
    return [*ssh, name, shlex.join(words)] if ssh else list(words)


def started(
    words: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own: Ctrl-C is for us to pass on.

    Raises:
        ConfigError: the first word cannot be run.
    """
    try:
        return subprocess.Popen(
            list(words), stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
        )
    except OSError as exc:
        raise ConfigError(
            f"--ssh must begin with a command that can be run, got {words[0]}: {exc.strerror}."
        ) from exc
