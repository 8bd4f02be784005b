"""MPI as a transport: the common checks, what is said when it cannot be, training end to end."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.errors import MissingDependencyError
from ds_gradprune.wire.loopback import LoopbackHub
from ds_gradprune.wire.mpi import MpiTransport
from tests.helpers import scripts
from tests.helpers.mpi_main import mpi_environ, run_command, run_mpi
from tests.helpers.ranks import run_processes
from tests.helpers.transport_checks import CHECKS

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
        "from ds_gradprune.wire.loopback import LoopbackHub\n"
        "from ds_gradprune.wire.mpi import MpiTransport\n"
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
    arguments = {"names": list(CHECKS), "folder": str(tmp_path_factory.mktemp("mpi"))}
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
        assert result["chunks"] == [[[*rows, behind]] * 2] * 5


@pytest.mark.mpi
def test_dense_sums_have_the_bits_of_the_dense_transport(three: list[dict[str, Any]]) -> None:
    assert all(result["bits"] for result in three)


@pytest.mark.mpi
def test_rank_that_waits_asleep_gets_everything(three: list[dict[str, Any]]) -> None:
    assert all(result["unequal"] == [1, 2, 3, 1, 2, 3] for result in three)


@pytest.mark.mpi
def test_looks_make_progress(three: list[dict[str, Any]]) -> None:
    assert all(result["looks"] for result in three)


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


@pytest.mark.mpi
def test_absent_peer_times_out_and_the_job_ends(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="mpirun ended with 2"):
        run_mpi(2, "absent_peer", {"folder": str(tmp_path)})
    first, second = (tmp_path / "answers").read_text().splitlines()
    assert first.startswith(
        "TransportTimeout: all_gather on rank 0 of 2 had no answer from rank 1 within 0.5 s. Usual "
    )
    assert first.endswith(
        "MPI cannot take the call back: the job must be started anew, and is "
        "aborted when this process exits"
    )
    assert second.startswith("TransportError: the MPI transport cannot be used after a failed call")


@pytest.mark.mpi
@pytest.mark.distributed
def test_processes_of_another_launcher_are_told_which_to_use() -> None:
    for answer in run_processes(2, "tests.helpers.mpi_main", "alone"):
        assert answer.startswith('TransportError: transport "mpi" needs processes that MPI has')
        assert "Launch with mpirun -n 2, or with deepspeed --launcher openmpi" in answer
        assert 'or set transport to "torch"' in answer


# --- training -------------------------------------------------------------------------------------

ADAPTIVE = {
    "prune": "gradient",
    "warmup_steps": 2,
    "ramp_steps": 2,
    "window_size": 4,
    "step_time_budget_s": 0.3,
    "density": {"initial": 0.1, "min": 0.002, "max": 0.25},
    "throttle": {"schedule": [{"step": 0, "rate_mbit": 1}, {"step": 14, "rate_mbit": 0.2}]},
    "verify_every_steps": 2,
}


@pytest.mark.mpi
@pytest.mark.distributed
@pytest.mark.slow
def test_parameters_have_the_bits_of_a_run_over_torch() -> None:
    steps = 20
    cases = {
        name: ("train", {"block": ADAPTIVE | {"transport": name}, "way": "attach", "steps": steps})
        for name in ("torch", "mpi")
    }
    ranks = run_mpi(2, "run_all", {"cases": cases}, "tests.helpers.ds_main", timeout_s=110)
    for result in ranks:
        over_torch, over_mpi = result["torch"], result["mpi"]
        assert isinstance(over_torch, dict), over_torch
        assert isinstance(over_mpi, dict), over_mpi
        assert over_mpi["crcs"] == over_torch["crcs"] == ranks[0]["torch"]["crcs"]
        assert over_mpi["losses"] == over_torch["losses"]
        assert over_mpi["reports"] == over_torch["reports"]
        assert len(set(over_mpi["crcs"])) == steps  # every step changed something
    densities = {report["density"] for report in ranks[0]["mpi"]["reports"]}
    assert len(densities) > 3  # the controller was at work


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt, model/, a configuration for MPI and a hostfile."""
    folder = tmp_path_factory.mktemp("inputs")
    text = scripts.write_text(folder / "text.txt")
    scripts.write_model(folder / "model", text)
    block = scripts.CONFIG["gradient_pruning"] | {"transport": "mpi", "timeout_s": 60.0}
    scripts.write_config(folder / "config.json", gradient_pruning=block)
    (folder / "hostfile").write_text("localhost slots=2\n")
    return folder


def train_under(launcher: list[str], here: Path, out: Path) -> tuple[int, str]:
    """launch/train.py under a launcher; its exit code and what was printed."""
    script = ["launch/train.py", "--config", str(here / "config.json")]
    script += ["--model", str(here / "model"), "--text", str(here / "text.txt")]
    script += ["--steps", "6", "--out", str(out)]
    environ = mpi_environ(MASTER_PORT=scripts.free_port())
    # Where DeepSpeed's CPU op is not built yet, a run begins with a minute or two of compiling it.
    return run_command([*launcher, *script], environ, timeout_s=280)


def deepspeed_launcher(here: Path) -> list[str]:
    """`deepspeed --launcher openmpi --hostfile hostfile` without an ssh daemon to ask."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--launcher", "openmpi"]
    launcher += ["--hostfile", str(here / "hostfile")]
    return [*launcher, "--no_ssh_check", "--master_addr", "127.0.0.1"]


@pytest.mark.mpi
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_script_trains_under_mpirun_and_under_deepspeeds_mpi_launcher(
    here: Path, tmp_path: Path
) -> None:
    if shutil.which("ompi_info") is None:
        pytest.skip("deepspeed --launcher openmpi needs Open MPI")
    launchers = {
        "mpirun": ["mpirun", "-n", "2", sys.executable],
        "deepspeed": [*deepspeed_launcher(here), "--force_multi"],
    }
    results = {}
    for name, launcher in launchers.items():
        status, output = train_under(launcher, here, tmp_path / name)
        assert status == 0, output
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
        resolved = json.loads((tmp_path / name / "config.json").read_text())
        assert resolved["gradient_pruning"]["transport"] == "mpi"
    assert results["mpirun"] == results["deepspeed"]
    assert results["mpirun"]["steps"] == 6
    assert results["mpirun"]["val_loss"] < results["mpirun"]["val_loss_start"]
    assert results["mpirun"]["wire_bytes"] < results["mpirun"]["dense_bytes"]


@pytest.mark.mpi
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_script_started_without_mpi_ends_with_one_line(here: Path, tmp_path: Path) -> None:
    # One host without --force_multi: DeepSpeed starts the ranks itself, whatever --launcher says.
    status, output = train_under(deepspeed_launcher(here), here, tmp_path / "out")
    assert status != 0
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith('error: transport "mpi" needs processes that MPI has started')
    assert "--force_multi where FILE has one host" in told[0]
