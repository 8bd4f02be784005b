"""Ranks of launch/train.py forked from one process that has imported everything already.

So a test of a death costs what the run costs, not twenty seconds of imports. `Nursery` is the side
of the tests; run as a module this file is the process that forks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

POLL_S = 0.02
PAUSE_S = 1.0
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "interrupt": signal.SIGINT,
    "terminate": signal.SIGTERM,
}


@dataclass(frozen=True)
class Doom:
    """What happens to one rank, and when.

    Attributes:
        rank: whose.
        at: "module:name.name", a function whose call it is.
        call: which call of it, counted from 1.
        deed: "kill", "stop" (SIGSTOP, for ever), "pause" (SIGSTOP for PAUSE_S), "interrupt",
            "terminate", or "spoil" (a weight becomes nan).
    """

    rank: int
    at: str
    call: int
    deed: str


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        arguments: of the script, per rank.
        dooms: what happens.
        environ: beside Open MPI's variables, for all ranks.
        limit_s: what has not ended by then is killed.
        main: "module:function", what a rank calls with its arguments.
        lives: dooms of ranks that are started again when they have ended, life by life; a doom
            whose call is 0 never comes.
    """

    arguments: list[list[str]]
    dooms: list[Doom] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)
    limit_s: float = 90.0
    main: str = "launch.train:main"
    lives: list[Doom] = field(default_factory=list)


@dataclass(frozen=True)
class Ending:
    """How one rank ended.

    Attributes:
        code: exit code, negative for a signal; None: it had not ended, and was killed.
        told: what it wrote.
    """

    code: int | None
    told: str

    @property
    def errors(self) -> list[str]:
        """Its error lines."""
        return [line for line in self.told.splitlines() if line.startswith("error: ")]


class Nursery:
    """The process that forks. Closed at the end of its `with`."""

    def __init__(self, folder: Path, environ: dict[str, str], root: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forked"],
            cwd=root,
            env=environ | {"DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, case: Case) -> list[Ending]:
        """Run a case to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = asdict(case) | {"folder": str(self._folder)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return [
            Ending(code, (self._folder / f"rank{rank}.txt").read_text(errors="replace"))
            for rank, code in enumerate(codes)
        ]


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    for name in ("deepspeed", "launch.train", "textgen.train", "textgen.prepare", "textgen.model"):
        importlib.import_module(name)
    gc.freeze()  # DeepSpeed collects garbage often; what is imported here is none
    for line in sys.stdin:
        request = json.loads(line)
        pids = [_fork(rank, request) for rank in range(len(request["arguments"]))]
        lives = list(request["lives"])
        stopped = {d["rank"] for d in request["dooms"] + lives if d["deed"] == "stop"}
        codes: dict[int, int | None] = {}
        deadline_s = time.monotonic() + request["limit_s"]
        while len(codes) < len(pids):
            for rank in set(range(len(pids))) - codes.keys():
                pid, status = os.waitpid(pids[rank], os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    again = [life for life in lives if life["rank"] == rank]
                    if again:
                        lives.remove(again[0])
                        del codes[rank]
                        pids[rank] = _fork(rank, request | {"dooms": again[:1]})
            if time.monotonic() > deadline_s or codes.keys() >= set(range(len(pids))) - stopped:
                for rank in set(range(len(pids))) - codes.keys():
                    os.kill(pids[rank], signal.SIGKILL)
                    os.waitpid(pids[rank], 0)
                    codes[rank] = None
            time.sleep(POLL_S)
        answers.write(json.dumps([codes[rank] for rank in range(len(pids))]) + "\n")
        answers.flush()


def _fork(rank: int, request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        file = os.open(f"{request['folder']}/rank{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_RDWR)
        os.dup2(file, 1)
        os.dup2(file, 2)
        size = str(len(request["arguments"]))
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        for name, value in zip(names, (str(rank), size, str(rank), size), strict=True):
            os.environ[f"OMPI_COMM_WORLD_{name}"] = value
        if request["main"] != Case.main:  # which finds its place by itself
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=size, LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1"
            )
        os.environ.update(request["environ"])
        for doom in request["dooms"]:
            if doom["rank"] == rank:
                _arrange(Doom(**doom))
        from launch.support.start import end_process

        module, _, name = request["main"].partition(":")
        end_process(getattr(importlib.import_module(module), name)(request["arguments"][rank]))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def _arrange(doom: Doom) -> None:
    """Put the deed into the function."""
    module, _, path = doom.at.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), [0]

    def doomed(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == doom.call:
            _do(doom.deed, args)
        return real(*args, **kwargs)

    setattr(owner, name, doomed)


def _do(deed: str, args: tuple[Any, ...]) -> None:
    if deed == "spoil":  # the first argument is the engine
        next(iter(args[0].module.parameters())).data.view(-1)[0] = float("nan")
    elif deed == "pause":
        words = ["sh", "-c", f"kill -STOP {os.getpid()}; sleep {PAUSE_S}; kill -CONT {os.getpid()}"]
        subprocess.Popen(words)
    else:
        os.kill(os.getpid(), SIGNALS[deed])


if __name__ == "__main__":
    _serve()
