"""Bringing DeepSpeed up: its configuration file, its groups' deadlines, its CPU op."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gradprune.errors import ConfigError
from launch.support.start import read_ds_config, skip_shm_op
from tests.helpers.ranks import run_processes


def test_comments_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"a": 1, # one\n "b": {"c": [2]}}')
    assert read_ds_config(path) == {"a": 1, "b": {"c": [2]}}


@pytest.mark.parametrize(
    "text",
    [
        "{a: 1e999}",  # OverflowError: int(inf)
        '{"a": ' + "[" * 5000,  # RecursionError
        '{"a": "\\u',  # IndexError at the end of a cut text
        '{"a": 1',
    ],
)
def test_text_that_trips_its_reader_is_a_fault_of_the_text(tmp_path: Path, text: str) -> None:
    """hjson's own errors went through as tracebacks."""
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"configuration .*c\.json cannot be read as JSON: \S"):
        read_ds_config(path)


@pytest.mark.distributed
@pytest.mark.filterwarnings("default")
def test_shared_memory_op_is_not_compiled_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": True})
    skip_shm_op()
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}


@pytest.mark.distributed
def test_groups_that_deepspeed_makes_wait_no_longer_than_ours() -> None:
    """new_group gave every later group half an hour: a dead peer in a save hung so long."""
    for answer in run_processes(2, "tests.helpers.launch_main", "group_timeouts"):
        assert answer == {"first": 7.0, "later": 7.0, "ours": 7.0}
