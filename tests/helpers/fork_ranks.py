"""Ranks forked from one process that has imported everything: a start costs no imports.

`Ranks` is the side of the tests; run as a module this file is the process that forks.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.02

WARM = ("deepspeed", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")
"""What engines import when they are made, slowly."""

ENGINES = (
    *WARM,
    "torch.utils.cpp_extension",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_presets",
    "ds_gradprune.deepspeed.initialize",
    *(f"tests.helpers.zero_{name}" for name in ("cases", "faults", "features", "files")),
)
"""What most tests of engines import."""

Call = tuple[str, str, dict[str, Any]]
"""Module, function, arguments."""

_mothers: dict[tuple[str, ...], Ranks] = {}


class Ranks:
    """The process that forks. Closed at the end of its `with`.

    Args:
        modules: imported before anything is forked.
        env: beside the environment of the tests.
    """

    def __init__(self, modules: list[str], env: dict[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._starts = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fork_ranks", *modules],
            cwd=ROOT,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | (env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def run(
        self,
        world_size: int,
        module: str,
        function: str,
        arguments: dict[str, Any] | None = None,
        timeout_s: float = 100.0,
        env: dict[str, str] | None = None,
    ) -> list[Any]:
        """Call `module.function(**arguments)` on fresh ranks; what they return, in rank order.

        As `ranks.run_processes`, with the same environment.
        """
        self._starts += 1
        folder = Path(self._folder.name) / str(self._starts)
        folder.mkdir()
        call = (module, function, arguments or {})
        request = (self._starts, (str(folder), world_size, call, timeout_s, env or {}))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        number = 0
        while number != self._starts:  # a test that took too long has left its answer behind
            number, codes = pickle.load(self._process.stdout)
        for rank, code in enumerate(codes):
            if code != 0:
                told = (folder / f"rank_{rank}.txt").read_text(errors="replace")
                raise AssertionError(f"rank {rank} of {codes} ended with {code}:\n{told[-6000:]}")
        return [
            pickle.loads((folder / f"result_{rank}.pickle").read_bytes())
            for rank in range(world_size)
        ]


def run_forked(
    world_size: int,
    module: str,
    function: str,
    arguments: dict[str, Any] | None = None,
    timeout_s: float = 100.0,
    env: dict[str, str] | None = None,
    warm: tuple[str, ...] = ENGINES,
) -> list[Any]:
    """As `ranks.run_processes`, on forks of a process that lives as long as this one.

    Args:
        world_size: number of ranks.
        module: where the function is.
        function: what every rank calls.
        arguments: of the function.
        timeout_s: then ranks that have not ended are killed, and an AssertionError tells.
        env: beside the environment of the tests.
        warm: what the process has imported.
    """
    if warm not in _mothers:
        _mothers[warm] = mother = Ranks([*warm])
        atexit.register(mother.__exit__)
    return _mothers[warm].run(world_size, module, function, arguments, timeout_s, env)


def _serve(modules: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # DeepSpeed collects garbage often; what is imported here is none
    while True:
        try:
            number, request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump((number, _start(*request)), answers)
        answers.flush()


def _start(
    folder: str, world_size: int, call: Call, timeout_s: float, env: dict[str, str]
) -> list[int | None]:
    """Exit codes; None: it had not ended, and was killed."""
    pids = [_fork(Path(folder), rank, world_size, call, env) for rank in range(world_size)]
    codes: dict[int, int | None] = {}
    deadline_s = time.monotonic() + timeout_s
    while len(codes) < world_size:
        is_late = time.monotonic() > deadline_s
        for rank in set(range(world_size)) - codes.keys():
            if is_late:
                os.kill(pids[rank], signal.SIGKILL)
            pid, status = os.waitpid(pids[rank], 0 if is_late else os.WNOHANG)
            if pid:
                codes[rank] = None if is_late else os.waitstatus_to_exitcode(status)
        time.sleep(POLL_S)
    return [codes[rank] for rank in range(world_size)]


def _fork(folder: Path, rank: int, world_size: int, call: Call, env: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(folder / f"rank_{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_RDWR)
        os.dup2(file, 1)
        os.dup2(file, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": 0}
        os.environ.update({name: str(number) for name, number in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", DS_TEST_STORE=str(folder / "store"), **env)
        module, function, arguments = call
        result = getattr(importlib.import_module(module), function)(**arguments)
        (folder / f"result_{rank}.pickle").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the interpreter's own end may abort in a thread of gloo
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1:])
