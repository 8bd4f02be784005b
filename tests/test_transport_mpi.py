"""MPI as a transport: the common checks, what is said when it cannot be, training end to end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.errors import MissingDependencyError
from ds_gradprune.transport.loopback import LoopbackHub
from ds_gradprune.transport.mpi import MpiTransport
from tests.helpers.mpi_main import mpi_environ, run_command, run_mpi
from tests.helpers.ranks import run_processes
from tests.test_transport_contract import CHECKS

# --- without MPI ----------------------------------------------------------------------------------


def test_without_mpi4py_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "ds_gradprune\[mpi\]"'):
        MpiTransport(LoopbackHub(1).transport(0))


@pytest.mark.parametrize("chunk_bytes", [0, 2**31])
def test_chunks_must_fit_an_mpi_count(chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"chunk_bytes must be in \[1, 2\^31\)"):
        MpiTransport(LoopbackHub(1).transport(0), chunk_bytes=chunk_bytes)


@pytest.mark.mpi
def test_without_an_mpi_library_the_command_that_installs_one_is_named() -> None:
    code = (
        "from ds_gradprune.transport.loopback import LoopbackHub\n"
        "from ds_gradprune.transport.mpi import MpiTransport\n"
        "MpiTransport(LoopbackHub(1).transport(0))"
    )
    environ = mpi_environ(MPI4PY_LIBMPI="/absent/libmpi.so")
    status, output = run_command([sys.executable, "-c", code], environ)
    assert status == 1
    assert 'MissingDependencyError: transport "mpi" needs mpi4py and an MPI library' in output
    assert 'pip install "ds_gradprune[mpi]"' in output


# --- the transport --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks under mpirun found; one start for all checks."""
    arguments = {"names": CHECKS, "folder": str(tmp_path_factory.mktemp("mpi"))}
    return run_mpi(3, "contract", arguments)


@pytest.mark.mpi
@pytest.mark.parametrize("check", CHECKS)
def test_contract(check: str, three: list[dict[str, Any]]) -> None:
    assert three[0][check] == three[1][check] == three[2][check]


@pytest.mark.mpi
def test_long_payload_travels_in_parts(three: list[dict[str, Any]]) -> None:
    rows = [[value + 50 * rank for value in range(100)] for rank in range(3)]
    behind = [255] * 50  # nothing is written past the last row
    for result in three:
        assert result["chunks"] == [[*rows, behind]] * 5


@pytest.mark.mpi
def test_dense_sums_have_the_bits_of_the_dense_transport(three: list[dict[str, Any]]) -> None:
    assert all(result["bits"] for result in three)


@pytest.mark.mpi
def test_rank_that_waits_asleep_gets_everything(three: list[dict[str, Any]]) -> None:
    assert all(result["unequal"] == [1, 2, 3, 1, 2, 3] for result in three)


@pytest.mark.mpi
def test_nothing_is_pickled(three: list[dict[str, Any]]) -> None:
    # The checks ran with pickling forbidden; that the ban works shows where an object is sent.
    assert all(result["guard"] == "pickled" for result in three)


@pytest.mark.mpi
def test_close_waits_for_nobody(three: list[dict[str, Any]]) -> None:
    assert all(result["close"] for result in three)


@pytest.mark.mpi
def test_refusals_name_what_is_wrong() -> None:
    for answers in run_mpi(2, "refusals"):
        assert answers["order"].startswith("RankMismatchError: a process must have the same rank")
        assert "MPI rank 0 is rank 1, MPI rank 1 is rank 0 of the group" in answers["order"]
        assert answers["part"] == (
            'UnsupportedError: transport "mpi" serves the world group only: MPI has started 2 '
            "processes, and the process group has 1"
        )
        assert answers["buffer"].startswith("payload must be a contiguous uint8 tensor of shape")
        assert answers["closed"] == "the MPI transport is closed"


@pytest.mark.mpi
def test_absent_peer_times_out_and_the_job_ends(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="mpirun ended with 2"):
        run_mpi(2, "absent_peer", {"folder": str(tmp_path)})
    first, second = (tmp_path / "answers").read_text().splitlines()
    assert first.startswith(
        "TransportTimeout: all_gather on rank 0 of 2 had no answer within 0.5 s."
    )
    assert second.startswith("TransportError: the MPI transport holds an exchange that never ended")


@pytest.mark.mpi
@pytest.mark.distributed
def test_processes_of_another_launcher_are_told_which_to_use() -> None:
    for answer in run_processes(2, "tests.helpers.mpi_main", "alone"):
        assert answer.startswith('TransportError: transport "mpi" needs processes that MPI has')
        assert "Launch with mpirun -n 2, or with deepspeed --launcher openmpi" in answer
        assert 'or set transport to "torch"' in answer
