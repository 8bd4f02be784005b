"""Files that DeepSpeed leaves in a host's shared memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_gradprune.deepspeed import leftovers


def test_own_buffer_is_unlinked_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "FOLDER", tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29517")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29517_"
    for rank in (0, 1):
        (tmp_path / f"{name}{rank}").touch()
    leftovers.unlink_buffer(1)
    leftovers.unlink_buffer(1)  # there is none, as on a GPU
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}0"]


def test_name_is_the_one_that_deepspeed_makes() -> None:
    """What findings/deepspeed_keeps_shared_memory.sh runs; here its source is read."""
    deepspeed = pytest.importorskip("deepspeed")
    source = Path(deepspeed.__file__).parent / "ops/csrc/cpu/comm/shm.cpp"
    text = "".join(source.read_text().split())
    assert '#defineSHM_BUFFER_NAME"deepspeed_allreduce_buffer"' in text
    assert '"%s_%d_%s_%s",SHM_BUFFER_NAME,getuid(),addr_string,port_string)' in text
    assert '"%s_%d",shm_name_prefix,rank)' in text
