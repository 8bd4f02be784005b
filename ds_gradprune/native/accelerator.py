"""Whether the Triton kernels of `device` work on given memory. They are imported here first."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import subprocess
import threading
from contextlib import AbstractContextManager, nullcontext

import torch

_LOG = logging.getLogger(__name__)
_LOCK = threading.Lock()
"""Held while Triton is imported: threads of one process warn once."""

_SWITCH = "DS_GRADPRUNE_TRITON"
_CAPABILITY = (8, 0)
"""The oldest architecture that the kernels are compiled for."""


def is_on(device: torch.device) -> bool:
    """The Triton kernels are to work on this device's memory.

    They are for CUDA devices. If the variable DS_GRADPRUNE_TRITON is 0, they are off. If it is
    "interpret", they work on CPU memory as well, in Triton's interpreter, very slowly: for tests.
    Where Triton is missing or compiles nothing they are off, and one warning says so.
    """
    switch = os.environ.get(_SWITCH)
    if switch == "0":
        return False
    if device.type == "cpu" and switch == "interpret":
        with _LOCK:
            return _has_interpreter()
    if device.type != "cuda":
        return False
    with _LOCK:
        return _has_triton() and _is_able(device)


def at(device: torch.device) -> AbstractContextManager[object]:
    """Kernels launched inside run on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _has_interpreter() -> bool:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    return _has_triton()


@functools.cache
def _has_triton() -> bool:
    try:
        importlib.import_module("ds_gradprune.native.device.select")
    except ImportError as error:
        _warn(error)
        return False
    return True


@functools.cache
def _is_able(device: torch.device) -> bool:
    if torch.version.cuda is None:
        return False  # Triton's other back ends: untested
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    rows = importlib.import_module("ds_gradprune.native.device.rows")
    try:
        with at(device):
            rows.probe(device)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        _warn(error)  # Triton compiles its launcher with the C compiler, which may be missing
        return False
    return True


def _warn(error: Exception) -> None:
    _LOG.warning(
        "the Triton kernels are off, selection and coding on the accelerator take longer: %s. "
        "Install triton (pip install triton) and a C compiler (apt install gcc python3-dev), or "
        "set DS_GRADPRUNE_TRITON=0.",
        error,
    )
