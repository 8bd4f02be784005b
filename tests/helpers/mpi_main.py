"""Ranks that an MPI launcher starts: `run_mpi` for the test, the other functions for the ranks.

Results come back in files, so that what a launcher does to the ranks' output does not matter.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ds_gradprune.errors import GradPruneError
from ds_gradprune.wire.torchdist import TorchDistTransport
from ds_gradprune.wire.transport import Transport
from launch.support.place import export_place, find_place

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0

MPI_ENVIRON = {
    # Root may start ranks here: containers have no other user. Two variables, to be asked twice.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # Tests have more ranks than cores, and no rank owns one.
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def mpi_environ(**more: str) -> dict[str, str]:
    """An environment for mpirun, without the variables of a launcher that started the tests."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "MPI_", "PRTE_")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    plain = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return environ | MPI_ENVIRON | plain | more


def run_command(
    command: list[str], environ: dict[str, str], timeout_s: float = TIMEOUT_S
) -> tuple[int, str]:
    """Run a launcher; return its exit code and all that was printed. Nothing outlives this call."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired as exc:
        process.terminate()  # a launcher that is asked ends its ranks; killed, it leaves them
        output = process.communicate(timeout=20.0)[0]
        raise AssertionError(f"no end within {timeout_s:g} s:\n{output[-6000:]}") from exc
    return process.returncode, output


def run_mpi(
    world_size: int,
    function: str,
    arguments: dict[str, Any] | None = None,
    module: str = "tests.helpers.mpi_main",
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """Call `module.function(**arguments)` in ranks that mpirun starts; results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        call = pickle.dumps((module, function, arguments or {})).hex()
        command = ["mpirun", "-n", str(world_size), sys.executable, "-m", __name__, folder, call]
        environ = mpi_environ(DS_TEST_STORE=str(Path(folder) / "store"))
        code, output = run_command(command, environ, timeout_s)
        if code != 0:
            raise AssertionError(f"mpirun ended with {code}:\n{output[-6000:]}")
        return [
            pickle.loads((Path(folder) / f"result_{rank}").read_bytes())
            for rank in range(world_size)
        ]


def main() -> None:
    """One rank: find out which, do what was asked, leave the result."""
    folder, call = sys.argv[1:]
    module, function, arguments = pickle.loads(bytes.fromhex(call))
    place = find_place(os.environ)
    export_place(place, os.environ)
    result = getattr(importlib.import_module(module), function)(**arguments)
    (Path(folder) / f"result_{place.rank}").write_bytes(pickle.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
        # gloo's threads need the interpreter's lock once more, before it ends.
        threading.Event().wait(0.1)


def open_group(rank: int | None = None) -> None:
    """Open gloo from the test's store file, as this process's rank or as another one."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['DS_TEST_STORE']}",
        rank=int(os.environ["RANK"]) if rank is None else rank,
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def message_of(dense: Transport, timeout_s: float = 20.0) -> str:
    """What opening an MPI transport on `dense` says."""
    from ds_gradprune.wire.mpi import MpiTransport

    try:
        MpiTransport(dense, timeout_s)
    except GradPruneError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "opened"


def contract(names: list[str], folder: str) -> dict[str, Any]:
    """The checks of every transport, and what is MPI's own, with pickling forbidden."""
    from mpi4py import MPI

    from ds_gradprune.wire.mpi import MpiTransport
    from tests.helpers.transport_checks import run_check

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("pickled")

    MPI.pickle.__init__(refuse, refuse)  # type: ignore[misc] # as mpi4py documents it
    open_group()
    dense = TorchDistTransport(timeout_s=20.0)
    results: dict[str, Any] = {}
    with MpiTransport(dense, 20.0) as transport:
        results["bits"] = dense_bits(transport, dense)
        results["unequal"] = late_rank(transport)
        results["looks"] = looks_make_progress(transport)
        for name in names:
            results[name] = run_check(name, transport)
    dense = TorchDistTransport(timeout_s=20.0)
    results["chunks"] = [parts_land_in_rows(chunk) for chunk in (1, 7, 64, 99, 100)]
    try:
        MPI.COMM_SELF.bcast("an object")
        results["guard"] = "pickled unseen"
    except AssertionError as exc:
        results["guard"] = str(exc)
    results["close"] = close_waits_for_nobody(MpiTransport(dense, 20.0), Path(folder))
    return results


def parts_land_in_rows(chunk_bytes: int) -> list[list[list[int]]]:
    """Rows of 100 bytes that travel in several parts, and what lies behind the last one.

    First a gathered payload, then rows that were exchanged.
    """
    from ds_gradprune.wire.mpi import MpiTransport

    with MpiTransport(TorchDistTransport(timeout_s=20.0), 20.0, chunk_bytes) as transport:
        world, rank = transport.world_size, transport.rank
        found = []
        row = torch.arange(100, dtype=torch.uint8) + 50 * rank
        send = torch.stack([row + 10 * to for to in range(world)])
        for brought in (row, send):
            space = torch.full((world * 100 + 50,), 255, dtype=torch.uint8)
            out = space[: world * 100].view(world, 100)
            if brought.dim() == 1:
                transport.all_gather(brought, out)
            else:
                transport.all_to_all(brought, out)
                out -= 10 * rank
            found.append([*out.tolist(), space[world * 100 :].tolist()])
    return found


def dense_bits(transport: Transport, dense: Transport) -> bool:
    """Sums whose bits depend on the order of the additions are those of the dense transport."""
    generator = torch.Generator().manual_seed(transport.rank)
    mine = torch.randn(10_000, generator=generator)
    over_mpi, over_torch = mine.clone(), mine.clone()
    transport.all_reduce(over_mpi)
    dense.all_reduce(over_torch)
    return torch.equal(over_mpi, over_torch)


def late_rank(transport: Transport) -> list[int]:
    """Rank 0 has waited, asleep between its looks, when the others come; big enough to be sent in
    several messages."""
    if transport.rank != 0:
        threading.Event().wait(0.05)
    payload = torch.full((1_000_003,), transport.rank + 1, dtype=torch.uint8)
    out = torch.zeros((transport.world_size, payload.numel()), dtype=torch.uint8)
    transport.all_gather(payload, out)
    return [int(row.min()) for row in out] + [int(row.max()) for row in out]


def looks_make_progress(transport: Transport) -> bool:
    """A call that is looked at ends without a wait."""
    payload = torch.full((1_000_003,), transport.rank, dtype=torch.uint8)
    out = torch.zeros((transport.world_size, payload.numel()), dtype=torch.uint8)
    call = transport.start_all_gather(payload, out)
    while not call.done():
        threading.Event().wait(0.001)
    seen = [int(row.max()) for row in out]
    call.wait()
    return seen == list(range(transport.world_size))


def close_waits_for_nobody(transport: Transport, folder: Path) -> bool:
    """Rank 0's close has returned before the others begin theirs."""
    mark = folder / "closed"
    if transport.rank == 0:
        transport.close()
        mark.touch()
    while not mark.exists():
        threading.Event().wait(0.01)
    transport.close()
    transport.close()
    return True


def refusals() -> dict[str, str]:
    """Groups that are not MPI's world, and ranks in another order."""
    from ds_gradprune.wire.mpi import MpiTransport

    open_group(int(os.environ["WORLD_SIZE"]) - 1 - int(os.environ["RANK"]))
    world = TorchDistTransport(timeout_s=20.0)
    groups = [dist.new_group([rank]) for rank in range(world.world_size)]
    answers = {
        "order": message_of(world),
        "part": message_of(TorchDistTransport(groups[world.rank], 20.0)),
    }
    dist.destroy_process_group()
    os.environ["DS_TEST_STORE"] += "_again"
    open_group()
    transport = MpiTransport(TorchDistTransport(timeout_s=20.0), 20.0)
    transport.close()
    return answers


def absent_peer(folder: str) -> None:
    """Rank 1 never calls: rank 0 gets an error, twice, and ends the job."""
    from ds_gradprune.wire.mpi import MpiTransport

    open_group()
    transport = MpiTransport(TorchDistTransport(timeout_s=20.0), 0.5)
    if transport.rank == 1:
        threading.Event().wait()
    answers = []
    for _ in range(2):
        out = torch.empty((2, 4), dtype=torch.uint8)
        try:
            transport.all_gather(torch.zeros(4, dtype=torch.uint8), out)
        except GradPruneError as exc:
            answers.append(f"{type(exc).__name__}: {exc}")
    (Path(folder) / "answers").write_text("\n".join(answers))


def alone() -> str:
    """Processes that no MPI launcher has started."""
    open_group()
    return message_of(TorchDistTransport(timeout_s=20.0))


if __name__ == "__main__":
    main()
