"""launch/supervise.py: what is started again, where, from what, and what ends everything."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from ds_gradprune.errors import TransportTimeout
from launch.supervise import read_task
from launch.support.cut_links import Cut
from launch.support.supervisor import Supervisor
from tests.helpers.supervised import children, is_alive, parent, supervised


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_killed_rank_starts_all_anew(tmp_path: Path) -> None:
    run = supervised(tmp_path, "localhost slots=2", "die1,0")
    code, told = run.end()
    assert code == 0, told
    first, second = (run.places()[name].split() for name in ("1.0", "1.1"))
    assert first[:2] == second[:2] == ["2", "2"]
    assert int(second[2]) == int(first[2]) + 1  # a rank that is left over meets nobody
    assert [event["code"] for event in run.events("stopped")] == [137, 0]


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_what_ends_by_itself_again_and_again_is_given_up_with_its_code(tmp_path: Path) -> None:
    run = supervised(tmp_path, "localhost slots=1", "3")
    code, told = run.end()
    assert code == 3
    assert "3 attempts in a row ended by themselves without a new checkpoint" in told
    assert len(run.places()) == 3


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_the_limit_of_restarts_holds(tmp_path: Path) -> None:
    run = supervised(tmp_path, "localhost slots=2", "die0", "--max-restarts", "1")
    code, told = run.end()
    assert code == 137
    assert "--max-restarts 1 is used up" in told
    assert len(run.events("started")) == 2


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_host_that_is_gone_is_left_out_and_one_that_is_back_takes_part(tmp_path: Path) -> None:
    run = supervised(tmp_path, "host-a slots=1\nhost-b slots=1", "wait,die0,0", "--max-restarts=3")
    pids = run.until(lambda: len(run.events("ranks")) == 2 and run.events("ranks"))
    lost = next(event for event in pids if event["host"] == "host-a")
    (tmp_path / "gone.host-a").touch()
    os.kill(parent(lost["pids"][0]), signal.SIGKILL)
    run.until(lambda: len(run.events("started")) == 2)
    assert not is_alive(lost["pids"][0])  # a rank never outlives its keeper
    (tmp_path / "gone.host-a").unlink()
    code, told = run.end()
    assert code == 0, told
    hosts = [event["hosts"] for event in run.events("started")]
    assert hosts[:2] == [["host-a", "host-b"], ["host-b"]]
    assert hosts[-1] == ["host-a", "host-b"]
    assert run.events("lost")[0]["host"] == "host-a"


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_host_that_is_back_is_let_in_while_the_others_train(tmp_path: Path) -> None:
    """The others are asked to end, as by Ctrl-C, and end well."""
    (tmp_path / "gone.host-b").touch()
    hosts = "host-a slots=1\nhost-b slots=1"
    run = supervised(tmp_path, hosts, "save,0", "--rejoin", "1", "--max-restarts", "0")
    run.until(lambda: run.places())
    (tmp_path / "gone.host-b").unlink()
    code, told = run.end()
    assert code == 0, told
    assert [event["hosts"] for event in run.events("started")] == [["host-a"], ["host-a", "host-b"]]
    assert run.events("back")[0]["hosts"] == ["host-b"]
    assert not run.events("waiting")  # it is no restart


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_silent_host_is_lost_and_its_ranks_are_fenced(tmp_path: Path) -> None:
    """Its cable is out: what is said on either side does not arrive, and nobody notices an end."""
    run = supervised(tmp_path, "host-a slots=1\nhost-b slots=1", "wait,0", "--host-timeout", "2")
    pids = run.until(lambda: len(run.events("ranks")) == 2 and run.events("ranks"))
    rank = next(event for event in pids if event["host"] == "host-b")["pids"][0]
    line = int((tmp_path / "line.host-b").read_text())
    stopped = [pid for pid in children(line) if "cat" in Path(f"/proc/{pid}/comm").read_text()]
    assert len(stopped) == 2
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    (tmp_path / "gone.host-b").touch()
    run.until(lambda: len(run.events("started")) == 2)
    assert not is_alive(rank)
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)
    assert run.end()[0] == 0
    assert "not heard for 2 s" in run.events("lost")[0]["why"]


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_ends_everything_and_the_ranks_code_is_passed_on(
    times: int, tmp_path: Path
) -> None:
    run = supervised(tmp_path, "localhost slots=2", "wait")
    [ranks] = run.until(lambda: len(run.places()) == 2 and run.events("ranks"))
    for _ in range(times):
        run.process.send_signal(signal.SIGTERM)
    code, _ = run.end()
    # What the ranks' own handler ends with; the second signal may kill them before it has run.
    assert code in {1: {5}, 2: {5, 128 + signal.SIGKILL}}[times]
    assert not any(is_alive(pid) for pid in ranks["pids"])


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_ranks_end_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    run = supervised(tmp_path, "localhost slots=2", "wait")
    [ranks] = run.until(lambda: len(run.places()) == 2 and run.events("ranks"))
    run.process.kill()
    run.process.communicate()
    deadline_s = time.monotonic() + 20
    while any(is_alive(pid) for pid in ranks["pids"]) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not any(is_alive(pid) for pid in ranks["pids"])


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_too_few_hosts_end_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "gone.host-b").touch()
    hosts = "host-a slots=1\nhost-b slots=1"
    run = supervised(tmp_path, hosts, "0", "--min-hosts", "2", "--wait", "1")
    code, told = run.end()
    assert code == 2
    assert "error: 2 hosts must answer, and hear each other, within 1 s, but host-b did not" in told


def test_islands_that_must_be_left_need_their_hosts(tmp_path: Path) -> None:
    """One host answered where two islands were asked for: the run refused to begin, three times."""
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"host-{name} slots=2\n" for name in "abc"))
    task = read_task(["--hostfile", str(hosts), "--", "x.py"])
    assert task.least_hosts == 1
    for min_islands, ranks, least in ((2, None, 2), (2, 1, 1), (3, 1, 2), (9, None, 3)):
        made = dataclasses.replace(task, min_islands=min_islands, island_ranks=ranks)
        assert made.least_hosts == least
        assert dataclasses.replace(made, min_hosts=3).least_hosts == 3
    alone = dataclasses.replace(task, hosts=task.hosts[:1], min_islands=2)
    assert alone.least_hosts == 1


def test_too_few_that_hear_each_other_end_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts whose ranks have ended by themselves, and --min-hosts 2."""
    hosts = tmp_path / "hosts"
    hosts.write_text("host-a slots=1\nhost-b slots=1\n")
    own = ["--hostfile", str(hosts), "--min-hosts", "2", "--wait", "0"]
    supervisor = Supervisor(read_task([*own, "--log", str(tmp_path / "log.jsonl"), "--", "x.py"]))
    cut = Cut("host-a", "host-b", (("host-b", "host-a"),))
    monkeypatch.setattr("launch.support.supervisor.answering", list)
    monkeypatch.setattr("launch.support.cut_links.cut_links", lambda *_: [cut])
    assert [host.name for host in supervisor._await_hosts()] == ["host-a", "host-b"]
    supervisor._links.doubted = True
    message = r"2 hosts must .* within 0 s, but packets from host-b to host-a are lost: mend"
    with pytest.raises(TransportTimeout, match=message):
        supervisor._await_hosts()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_an_ssh_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    run = supervised(tmp_path, "host-a slots=1", "0", "--ssh", "no-such-ssh -x")
    code, told = run.end()
    assert code == 2
    assert "error: --ssh must begin with a command that can be run, got no-such-ssh" in told
    assert "Traceback" not in told
