"""Builds the kernels with the C++ compiler that is found, once for a machine, into a cache folder.

Several ranks may build at once: each compiles to a name of its own and puts the finished file in
place in one step, so there is no lock that a killed start could leave behind.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ds_gradprune.errors import GradPruneError

_FOLDER = Path(__file__).parent
_SOURCES = tuple(
    _FOLDER / name
    for name in (
        "common.h",
        "kernels.cpp",
        "move.h",
        "places.h",
        "select.h",
        "values.h",
        "weights.h",
    )
)
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-w"),
    # Equal bits on all machines: no fused multiply-add, no reordering. No kernel asks for traps.
    *("-fno-fast-math", "-ffp-contract=off", "-fno-trapping-math"),
    "-fno-strict-aliasing",
)
_TUNINGS: tuple[tuple[str, ...], ...] = (("-march=native",), ())
"""Tried in this order: some compilers do not know the machine they run on."""
_TIMEOUT_S = 300.0


class BuildError(GradPruneError):
    """The kernels cannot be built here."""


def find_compiler() -> list[str]:
    """The command of the C++ compiler: the variable CXX, or the first of the usual names.

    Raises:
        BuildError: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    names = [chosen[0]] if chosen else list(_COMPILERS)
    raise BuildError(f"no C++ compiler was found (looked for {', '.join(names)})")


def cache_folder() -> Path:
    """DS_GRADPRUNE_CACHE, or the user's cache folder; need not exist."""
    chosen = os.environ.get("DS_GRADPRUNE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_gradprune"


def build() -> Path:
    """The library's file: from the cache, or compiled now, which takes a few seconds.

    Raises:
        BuildError: there is no compiler, it fails, or the cache folder cannot be written to.
    """
    compiler = find_compiler()
    try:
        path = cache_folder() / f"kernels-{_fingerprint(compiler)}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise BuildError(f"the cache folder cannot be used: {error}") from error
    return path


def _compile(compiler: Sequence[str], path: Path) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".so", dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        for tuning in _TUNINGS:
            command = [*compiler, *_FLAGS, *tuning, str(_FOLDER / "kernels.cpp"), "-o", name]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise BuildError(f"{compiler[0]} did not end in {_TIMEOUT_S:.0f} s") from error
            if done.returncode == 0:
                unfinished.chmod(0o755)
                os.replace(unfinished, path)
                return
        last = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise BuildError(f"{compiler[0]} failed: {last[0].strip()}")
    finally:
        unfinished.unlink(missing_ok=True)


def _fingerprint(compiler: Sequence[str]) -> str:
    """Of everything the library's bits depend on: sources, flags, compiler, processor."""
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update(source.read_bytes())
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=False
    )
    digest.update(repr((compiler, _FLAGS, _TUNINGS)).encode() + version.stdout)
    digest.update(_processor().encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What -march=native looks at: a home folder may be shared by hosts of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part")
    told = sorted({line for line in lines if line.startswith(kinds)})
    return "\n".join([platform.machine(), platform.processor(), *told])
