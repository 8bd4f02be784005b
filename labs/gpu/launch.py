"""Starts the processes of a part, watches them, and gathers what their cases found."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs.gpu.parts import Part

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 8.0
"""After one rank has ended in an error the others have so long to tell theirs."""

_TOLD_CHARS = 2500
_LOOK_S = 2.0
"""Between two looks at what a part has found so far."""

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for all parts.

    Attributes:
        folder: for logs, answers and checkpoints.
        device: "cuda" or "cpu".
        tiny: tiny sizes.
        ends_s: when everything must be over, of the monotonic clock.
    """

    folder: Path
    device: str
    tiny: bool
    ends_s: float


def run(name: str, part: Part, cases: list[str], settings: Settings, tell: Tell) -> dict[str, Any]:
    """All cases of a part; what was found, whatever happened. Never raises for a failed case.

    Args:
        name: of the part.
        part: itself.
        cases: which of its cases.
        settings: see there.
        tell: is given what was found so far, every time that a case has ended.
    """
    began_s = time.monotonic()
    ends_s = min(began_s + part.limit_s, settings.ends_s)

    def so_far(found: dict[str, Any]) -> dict[str, Any]:
        return found | {"seconds": time.monotonic() - began_s, "optional": part.optional}

    if part.command:
        return so_far(_command(part, ends_s))
    return so_far(_cases(name, part, cases, settings, ends_s, lambda found: tell(so_far(found))))


# ---- cases ---------------------------------------------------------------------------------------


def _cases(
    name: str, part: Part, cases: list[str], settings: Settings, ends_s: float, tell: Tell
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    left, silent = list(cases), 0

    def look(*, is_over: bool) -> list[str]:
        """Take in what the processes have written; the cases that some process has ended."""
        lines = _read(name, part, settings.folder)
        told = [case for case in left if any(case in rank for rank in lines)]
        for case in told:
            if is_over or all(case in rank for rank in lines):
                found[case] = _merge(case, lines, _tails(name, part, settings.folder))
        return told

    def meanwhile() -> None:
        before = len(found)
        look(is_over=False)
        if len(found) > before:
            tell(_judged(found))

    while left and silent < 2 and time.monotonic() < ends_s:
        _start(name, part, left, settings, ends_s, meanwhile)
        reached = look(is_over=True)
        if reached:
            silent = 0
        else:
            silent += 1
            found[left[0]] = _merge(left[0], [{}] * part.ranks, _tails(name, part, settings.folder))
        left = left[max(1, len(reached)) :]
    for case in left:
        found[case] = {"ok": False, "fault": "not reached: no time was left"}
    return _judged(found)


def _judged(found: dict[str, Any]) -> dict[str, Any]:
    return {"cases": dict(found), "ok": all(case["ok"] for case in found.values())}


def _start(
    name: str,
    part: Part,
    cases: list[str],
    settings: Settings,
    ends_s: float,
    meanwhile: Callable[[], None],
) -> None:
    """Run the processes until they end, or must."""
    for old in settings.folder.glob(f"{name}.*.jsonl"):
        old.unlink()
    port = _free_port()
    processes = []
    for rank in range(part.ranks):
        arguments = ["--tiny"] * settings.tiny + cases
        with _log(name, rank, settings.folder).open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "labs.gpu.work", name, str(settings.folder), *arguments],
                    cwd=ROOT,
                    env=_environment(part, rank, port, settings.device),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        _wait(processes, ends_s, meanwhile)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(
    processes: list[subprocess.Popen[bytes]], ends_s: float, meanwhile: Callable[[], None]
) -> None:
    failed_s: float | None = None
    looked_s = time.monotonic()
    while any(process.poll() is None for process in processes):
        now_s = time.monotonic()
        if now_s >= ends_s or (failed_s is not None and now_s >= failed_s + GRACE_S):
            return
        if failed_s is None and any(process.poll() for process in processes):
            failed_s = now_s
        if now_s >= looked_s + _LOOK_S:
            meanwhile()
            looked_s = now_s
        time.sleep(0.05)


def _environment(part: Part, rank: int, port: int, device: str) -> dict[str, str]:
    told = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",  # one device: every rank is a host of its own
        "LOCAL_SIZE": "1",
        "WORLD_SIZE": str(part.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": "1" if device == "cpu" else "4",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # equal bits in equal runs
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":
        told["CUDA_VISIBLE_DEVICES"] = ""
    more = {key: value.replace("{rank}", str(rank)) for key, value in part.env.items()}
    return os.environ | told | more


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _log(name: str, rank: int, folder: Path) -> Path:
    return folder / f"{name}.{rank}.log"


def _read(name: str, part: Part, folder: Path) -> list[dict[str, Any]]:
    """Every rank's answers by case."""
    answers: list[dict[str, Any]] = []
    for rank in range(part.ranks):
        path = folder / f"{name}.{rank}.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        answers.append({(line := json.loads(text))["case"]: line for text in lines})
    return answers


def _tails(name: str, part: Part, folder: Path) -> list[str]:
    return [
        _log(name, rank, folder).read_text(errors="replace")[-_TOLD_CHARS:]
        for rank in range(part.ranks)
    ]


def _merge(case: str, ranks: list[dict[str, Any]], tails: list[str]) -> dict[str, Any]:
    """One case out of what all ranks say: rank 0's figures, everybody's checks and faults."""
    faults = {}
    for number, rank in enumerate(ranks):
        if case not in rank:
            faults[f"rank {number}"] = f"no answer; its last lines: {tails[number]}"
        elif "fault" in rank[case]:
            faults[f"rank {number}"] = rank[case]["fault"][-_TOLD_CHARS:]
    if faults:
        return {"ok": False, "fault": faults}
    checks = [rank[case]["found"]["checks"] for rank in ranks]
    wrong = [name for name in checks[0] if not all(rank.get(name) for rank in checks)]
    merged = dict(ranks[0][case]["found"]) | {"seconds": ranks[0][case]["seconds"]}
    merged["checks"] = len(checks[0])
    return merged | ({"ok": False, "fault": f"not true: {wrong}"} if wrong else {"ok": True})


# ---- commands ------------------------------------------------------------------------------------


def _command(part: Part, ends_s: float) -> dict[str, Any]:
    """A command; its last line of output is a JSON document, or told as it is."""
    left_s = max(1.0, ends_s - time.monotonic())
    try:
        done = subprocess.run(
            [sys.executable, *part.command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=left_s,
        )
    except subprocess.TimeoutExpired as exc:
        return {"ok": False, "fault": f"did not end in {left_s:.0f} s: {str(exc.stdout)[-500:]}"}
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        told = (done.stdout + done.stderr)[-_TOLD_CHARS:]
        return {"ok": False, "fault": f"ended with {done.returncode}: {told}"}
    try:
        return {"ok": True, "document": json.loads(lines[-1]), "output": lines[-60:-1]}
    except (IndexError, ValueError):
        return {"ok": True, "output": lines[-20:]}
