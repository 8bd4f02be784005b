"""What every test gets: a seed, a clean process afterwards, versions in the report's header."""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch and DeepSpeed are imported anywhere: ranks share the machine's cores, and the tests
# mean the CPU unless whoever calls them says otherwise. Nothing may reach for a model hub.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

ROOT = Path(__file__).resolve().parents[1]

# A run in the background of a shell has Ctrl-C ignored, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Shared machines: no deadline. In CI the same examples every time, so that red means changed.
hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder of README.md and pyproject.toml."""
    return ROOT


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _leave_the_process_clean() -> Iterator[None]:
    """Undo what one test could leave to the next: process groups, dtype, DeepSpeed's backend."""
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    deepspeed_comm = sys.modules.get("deepspeed.comm.comm")
    if deepspeed_comm is not None:
        vars(deepspeed_comm)["cdb"] = None
    torch.set_default_dtype(torch.float32)


_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Note how the tests ended, for the very last hook."""
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave the interpreter without ending it: once all 6,906 tests had passed, and it aborted."""
    if _STATUS in config.stash:
        from launch.support.start import end_process

        atexit._run_exitfuncs()
        end_process(config.stash[_STATUS])


def pytest_report_header() -> list[str]:
    """Versions of what a failure may depend on."""
    names = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "pydantic")
    return ["versions: " + ", ".join(f"{name} {_version(name)}" for name in names)]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A missing dependency is a visible skip, never a silent absence."""
    missing = _missing_dependencies()
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing_dependencies() -> dict[str, str]:
    missing = {}
    if importlib.util.find_spec("deepspeed") is None:
        missing["distributed"] = 'needs deepspeed: pip install -e ".[deepspeed]"'
    if importlib.util.find_spec("mpi4py") is None or shutil.which("mpirun") is None:
        missing["mpi"] = "needs mpi4py and mpirun"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        missing["netns"] = "needs root and the ip command (iproute2)"
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a GPU"
    return missing
