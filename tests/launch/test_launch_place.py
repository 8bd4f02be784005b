"""Where a process stands, from any launcher's variables."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.errors import ConfigError
from launch.support.place import Place, export_place, find_place, share_cores

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED, OPEN_MPI, HYDRA])
def test_every_launcher_is_understood(environ: dict[str, str]) -> None:
    assert find_place(environ) == Place(3, 4, 1, 2)


def test_plain_process_is_alone() -> None:
    assert find_place({}) == find_place({"RANK": "0"}) == Place(0, 1, 0, 1)


def test_torch_variables_win_over_mpis() -> None:
    assert find_place(OPEN_MPI | TORCHRUN | {"RANK": "2", "LOCAL_RANK": "0"}).rank == 2


def test_without_a_local_size_all_are_on_this_host() -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert find_place(environ) == Place(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "one"}, r"RANK must be a whole number, got 'one'"),
        ({"RANK": "-1"}, r"RANK must be a whole number, got '-1'"),
        ({"RANK": "4"}, r"got 4 of 4 and 1 of 2"),
        ({"LOCAL_RANK": "2"}, r"got 3 of 4 and 2 of 2"),
        ({"LOCAL_RANK": None}, r"LOCAL_RANK must be set beside RANK and WORLD_SIZE"),
    ],
)
def test_contradicting_variables_are_refused(change: dict[str, str | None], message: str) -> None:
    environ = {key: value for key, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        find_place(environ)


def test_plain_process_gets_a_port_of_its_own() -> None:
    environ: dict[str, str] = {}
    export_place(Place(), environ)
    port = int(environ.pop("MASTER_PORT"))
    assert 1024 <= port < 65536
    assert environ == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }


def test_processes_on_one_host_meet_there() -> None:
    environ = dict(OPEN_MPI)
    export_place(Place(3, 4, 3, 4), environ)
    assert environ["RANK"] == "3"
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.1", "29500")


def test_several_hosts_must_be_told_where_to_meet() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR must be set to the address of rank 0"):
        export_place(Place(3, 4, 1, 2), {})
    environ = {"MASTER_ADDR": "host0", "MASTER_PORT": "1234"}
    export_place(Place(3, 4, 1, 2), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("host0", "1234")


def test_cores_are_shared_among_the_processes_of_a_host() -> None:
    before = torch.get_num_threads()
    try:
        environ: dict[str, str] = {}
        share_cores(Place(0, 1000, 0, 1000), environ)
        assert environ == {"OMP_NUM_THREADS": "1"}
        assert torch.get_num_threads() == 1
        share_cores(Place(), environ)
        assert environ == {"OMP_NUM_THREADS": "1"}  # a user's choice stays
    finally:
        torch.set_num_threads(before)
