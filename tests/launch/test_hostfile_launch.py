"""A launch as on a cluster: hostfile, pdsh, ssh, launch/train.py on two hosts at 100 Mbit/s."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import scripts
from tools.netbed import Bed, Counters, requirements
from tools.netbed.folder import temporary_folder
from tools.netbed.host import INTERFACE

ABSENT = requirements.missing()
pytestmark = [
    pytest.mark.netns,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(ABSENT is not None, reason=ABSENT or ""),
    # The first start on a machine compiles an op of DeepSpeed, and hosts share its cores.
    pytest.mark.timeout(600),
]

STEPS, VERIFY_EVERY_STEPS = 60, 10

MPI_STEPS = 12
MPI_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

HEADER_BYTES = 14 + 20 + 32
"""Ethernet, IP, and TCP with the time stamps that Linux sends: of every frame of a connection."""


@dataclass(frozen=True)
class Launch:
    """What a run left.

    Attributes:
        code: the launcher's exit code.
        said: its stdout and stderr.
        result: result.json.
        log: log.jsonl, a line per step.
        before, after: how many steps were logged right before the first counters were read, and
            right after. On a busy machine many steps may lie between.
        early, late: each host's counters then, and at the end.
    """

    code: int
    said: str
    result: dict[str, Any]
    log: list[dict[str, Any]]
    before: int
    after: int
    early: list[Counters]
    late: list[Counters]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt, model/ and config.json."""
    folder = tmp_path_factory.mktemp("inputs")
    text = scripts.write_text(folder / "text.txt")
    scripts.write_model(folder / "model", text)
    pruning = scripts.CONFIG["gradient_pruning"] | {
        "throttle": None,  # the link is real
        "value_bits": 16,  # far more bytes than everything that is not ours
        "density": {"initial": 0.25, "min": 0.25, "max": 0.25},
        "verify_every_steps": VERIFY_EVERY_STEPS,
        "timeout_s": 120.0,
    }
    scripts.write_config(folder / "config.json", gradient_pruning=pruning)
    return folder


def train_words(bed: Bed, here: Path, steps: int, out: Path) -> list[str]:
    """The command of launch/README.md."""
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--hostfile", str(bed.hostfile), "--launcher", "pdsh", "launch/train.py"),
        *("--config", str(here / "config.json"), "--model", str(here / "model")),
        *("--text", str(here / "text.txt"), "--steps", str(steps), "--eval-every", str(steps)),
        *("--out", str(out)),
    ]


@pytest.fixture(scope="module")
def launch(here: Path) -> Launch:
    """One run over two hosts, and the links' counters after its first steps and after its last."""
    run = here / "run"
    with Bed(hosts=2, rate="100mbit") as bed:
        process = bed.hosts[0].popen(
            train_words(bed, here, STEPS, run),
            cwd=scripts.ROOT,
            env=bed.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        early, before, after = wait_for_steps(bed, run / "log.jsonl", 5, process)
        said, _ = process.communicate()
        late = [host.counters() for host in bed.hosts]
    result = run / "result.json"
    return Launch(
        process.returncode,
        said,
        json.loads(result.read_text()) if result.is_file() else {},
        scripts.log_of(run) if result.is_file() else [],
        before,
        after,
        early,
        late,
    )


def wait_for_steps(
    bed: Bed, log: Path, wanted: int, process: subprocess.Popen[str]
) -> tuple[list[Counters], int, int]:
    """Read the counters when some steps are logged; and the number of steps before and after."""

    def logged() -> int:
        return len(log.read_text().splitlines()) if log.is_file() else 0

    while process.poll() is None and logged() < wanted:
        time.sleep(0.01)
    before = logged()
    return [host.counters() for host in bed.hosts], before, logged()


def test_two_hosts_train(launch: Launch):
    """A parameter that differed would have ended the run: a hash is compared every ten steps."""
    assert launch.code == 0, launch.said
    assert launch.result["steps"] == STEPS
    assert launch.result["val_loss"] < launch.result["val_loss_start"] - 1
    assert "host-0: model" in launch.said
    assert "Process" in launch.said
    assert "; 2 ranks" in launch.said
    assert STEPS >= 3 * VERIFY_EVERY_STEPS


def test_pruning_sends_what_it_says(launch: Launch):
    """TCP payload on the wire against `wire_bytes`, without what starting the run has sent.

    When the first counters were read, the steps logged before had been sent, and of those not
    logged afterwards all but the one under way had not. The 5 % are for what is not ours: the
    question whether to stop, the hash, ssh's copy of the output.
    """
    assert launch.code == 0, launch.said
    most = sum(step["wire_bytes"] for step in launch.log[launch.before :])
    least = sum(step["wire_bytes"] for step in launch.log[launch.after + 1 :])
    one_step = launch.log[-1]["wire_bytes"]
    assert 50_000 < one_step < launch.log[-1]["dense_bytes"] / 3
    for early, late in zip(launch.early, launch.late, strict=True):
        crossed = late - early
        payload = crossed.sent_bytes - HEADER_BYTES * crossed.sent_frames
        assert 0.95 * least < payload < 1.05 * most + one_step
        assert crossed.dropped_frames == 0


def test_the_start_costs_a_copy_of_the_model_and_little_else(launch: Launch):
    """Rank 0 gives its parameters to the other rank; the dense steps are counted as ours."""
    assert launch.code == 0, launch.said
    least = sum(step["wire_bytes"] for step in launch.log[: launch.before])
    most = sum(step["wire_bytes"] for step in launch.log[: launch.after + 1])
    model_bytes = 4 * launch.result["parameters"]
    for copy_bytes, early in zip((model_bytes, 0), launch.early, strict=True):
        payload = early.sent_bytes - HEADER_BYTES * early.sent_frames
        # 25 kB were measured for ssh, the store and the agreements before the first step; the
        # store is asked again and again while a slower host is awaited.
        assert 0.95 * (least + copy_bytes) < payload
        assert payload < 1.05 * (most + copy_bytes) + 100_000


def test_hosts_with_different_versions_are_named(here: Path):
    """The second host sees another version of the package, as after half an update."""
    source = scripts.ROOT / "ds_gradprune" / "__init__.py"
    other = here / "init.py"
    other.write_text(source.read_text().replace("__version__ = ", '__version__ = "9.9.9" or '))
    with Bed(hosts=2, rate="100mbit") as bed:
        bed.hosts[1].run(["mount", "--bind", other, source], check=True)
        done = bed.hosts[0].run(
            train_words(bed, here, STEPS, here / "mixed"),
            cwd=scripts.ROOT,
            env=bed.environ(),
            capture_output=True,
            text=True,
        )
    assert done.returncode != 0
    [told] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "all ranks must run the same thing, but ds_gradprune" in told
    assert all(part in told for part in ("0.2.0", "9.9.9", "host-0", "host-1"))
    assert not (here / "mixed" / "result.json").exists()


def test_a_host_that_never_joins_is_named(here: Path):
    """The second host's cable is out: nothing reaches it, and rank 0 waits in vain."""
    config = json.loads((here / "config.json").read_text())
    config["gradient_pruning"]["timeout_s"] = 3.0
    with Bed(hosts=2) as bed:
        words = train_words(bed, here, STEPS, here / "lonely")
        lonely = here / "lonely.json"
        lonely.write_text(json.dumps(config))
        words[words.index("--config") + 1] = str(lonely)
        bed.hosts[1].set_link(up=False)
        done = bed.hosts[0].run(
            words, cwd=scripts.ROOT, env=bed.environ(), capture_output=True, text=True
        )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "error: " in line]
    expected = (
        "host-0: error: 1 of 2 ranks never came within 3 s: rank 1 on host-1. "
        "There is rank 0 on host-0."
    )
    assert [line for line in told if line.startswith(expected)], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.mpi
@pytest.mark.skipif(shutil.which("ompi_info") is None, reason="Open MPI is not installed")
@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_open_mpi_carries_the_gradients_between_hosts(launcher: str, here: Path):
    """The words of launch/README.md, and MPI's bytes on the link."""
    run, config = here / f"mpi_{launcher}", here / "mpi.json"
    document = json.loads((here / "config.json").read_text())
    document["gradient_pruning"]["transport"] = "mpi"
    config.write_text(json.dumps(document))
    with Bed(hosts=2, rate="100mbit") as bed:
        # MPI's daemons name their folders after process numbers, which hosts have in common.
        folders = [
            bed.ssh(n, ["printenv", "TMPDIR"], capture_output=True, text=True) for n in (0, 1)
        ]
        assert [Path(done.stdout.strip()) for done in folders] == [
            temporary_folder(bed.folder, host.name) for host in bed.hosts
        ]
        exports = {"PYTHONPATH": str(scripts.ROOT), "DS_ACCELERATOR": "cpu"}
        exports["MASTER_ADDR"] = bed.hosts[0].address
        environ = bed.environ(**exports) | MPI_AS_ROOT | exports
        words = train_words(bed, here, MPI_STEPS, run)
        script = words[words.index("launch/train.py") :]
        script[script.index("--config") + 1] = str(config)
        if launcher == "mpirun":
            names = [*exports, "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"]
            start = ["mpirun", "-n", "2", "--hostfile", str(bed.hostfile)]
            start += ["--mca", "btl_tcp_if_include", INTERFACE]
            start += [word for name in names for word in ("-x", name)]
            start.append(sys.executable)
        else:
            start = [*words[:1], "--hostfile", str(bed.hostfile), "--launcher", "openmpi"]
        done = bed.hosts[0].run(
            [*start, *script], cwd=scripts.ROOT, env=environ, capture_output=True, text=True
        )
        crossed = [host.counters() for host in bed.hosts]
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == MPI_STEPS
    assert result["val_loss"] < result["val_loss_start"]
    assert result["wire_bytes"] < result["dense_bytes"]
    for counters in crossed:
        assert counters.sent_bytes > result["wire_bytes"]
