"""What ranks agree on, and how long they wait for each other."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from ds_gradprune.errors import (
    ConfigError,
    DataError,
    RankMismatchError,
    TransportError,
    TransportTimeout,
)
from launch.support import lost
from launch.support.peers import AgreedFault, Peers, StopSwitch
from launch.support.place import Place
from tests.helpers.ranks import run_processes


def test_alone_everything_is_agreed_at_once() -> None:
    peers = Peers(Place())
    assert peers.gather("x") == ["x"]
    assert peers.sum([1.0, 2.5]) == [1.0, 2.5]
    assert peers.together(lambda: 7) == 7
    assert peers.tells()


def test_fault_alone_is_ones_own() -> None:
    def fail() -> None:
        raise DataError("no text.")

    with pytest.raises(AgreedFault, match=r"no text\.") as caught:
        Peers(Place()).together(fail)
    assert caught.value.rank == 0


def test_a_rank_that_comes_back_with_other_flags_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is compared with what the store keeps of the run; nobody else is asked."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr("launch.support.peers.first_store", lambda: store)
    run = Peers(Place(), apart=True)
    monkeypatch.setattr(run, "world_size", 3)
    monkeypatch.setattr(run, "gather", lambda value: [value])
    run.check_alike({"--steps": 10, "--resume": False, "block": {"density": 0.1}})
    run.check_alike({"text": "abc"})
    back = Peers(Place(1, 3), apart=True, joins=True)
    back.check_alike({"--steps": 10, "--resume": True, "block": {"density": 0.1}})
    back.check_alike({"text": "abc"})
    assert not back.is_first
    assert back.gather("x") == ["x"]
    other = Peers(Place(1, 3), apart=True, joins=True)
    with pytest.raises(RankMismatchError, match=r"block\.density is 0\.2 here, 0\.1 in the run"):
        other.check_alike({"--steps": 10, "--resume": True, "block": {"density": 0.2}})


def test_a_store_that_does_not_answer_silences_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's host was gone; the others asked its store who should tell, and hung for ever."""
    never = threading.Event()

    class DeadStore:
        def add(self, _key: str, _number: int) -> int:
            never.wait()
            return 1

    peers = Peers(Place())
    peers.world_size = 2
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", DeadStore)
    monkeypatch.setattr("launch.support.peers.TELL_LIMIT_S", 0.01)
    assert peers.tells()
    never.set()


GLOO = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
    "[127.0.0.1]:4711. \nThis may have been caused by many things."
)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (RuntimeError(GLOO), TransportError, r"Connection closed by peer \[127.0.0.1\]:4711"),
        (RuntimeError("Timed out waiting 20000ms for recv operation"), TransportTimeout, "Timed"),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), TransportError, "failed to recv"),
    ],
)
def test_torchs_errors_of_a_lost_rank_are_one_typed_line(error, kind, reason) -> None:
    """A rank killed in validation, in a save or at the start was 40 lines of torch's traceback."""
    doing = r"rank 0 of 1 on \S+ has lost another rank while saving .*: "
    with pytest.raises(kind, match=doing + reason) as caught, Peers(Place()).during("saving"):
        raise error
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_an_interface_that_is_not_there_is_named() -> None:
    """A misspelt GLOO_SOCKET_IFNAME was a traceback of gloo's."""
    error = "[enforce fail at ../gloo/tcp/device.cc:84] rp. Unable to find address for: eth7"
    with (
        pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME must name an interface .* got eth7"),
        Peers(Place()).during("starting"),
    ):
        raise RuntimeError(error)


def test_a_host_whose_own_name_means_a_loopback_address_is_told_what_to_set() -> None:
    """As Debian's /etc/hosts has it: the other ranks were to be looked at, and said the same."""
    error = (
        "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:144] timed out connecting: "
        "SO_ERROR: Connection refused, remote=[127.0.1.1]:42390"
    )
    with (
        pytest.raises(TransportTimeout, match=r"told 127\.0\.1\.1 as .* set GLOO_SOCKET_IFNAME on"),
        Peers(Place()).during("starting"),
    ):
        raise RuntimeError(error)


def test_a_port_that_is_in_use_is_no_lost_rank() -> None:
    error = "The server socket has failed to listen on any address. port: 29500, EADDRINUSE"
    with (
        pytest.raises(TransportError, match=r"rank 0 must be able to listen on .* it is in use"),
        Peers(Place()).during("finding all ranks"),
    ):
        raise dist.DistNetworkError(error)


def test_where_a_run_stands_is_told_with_the_loss_of_a_rank() -> None:
    told = lost.standing(7, ["a", "b"], Path("out/checkpoints"), "step00000005")
    with pytest.raises(TransportTimeout, match=r"^no answer\. 7 steps were done") as caught:
        with lost.situated(lambda: told):
            raise TransportTimeout("no answer")
    assert "(rank 0 on a, rank 1 on b). The last checkpoint is step00000005 in" in str(caught.value)
    assert "There is no checkpoint yet" in lost.standing(0, [], Path("out"), None)
    hosts = [str(number) for number in range(10)]
    assert "rank 7 on 7, 2 more)" in lost.standing(1, hosts, Path("out"), None)
    with pytest.raises(TransportTimeout, match=r"^no answer$"), lost.situated(str):
        raise TransportTimeout("no answer")


def test_errors_of_ones_own_stay_what_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        Peers(Place()).during("x"),
    ):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_foreign_error_is_not_hidden() -> None:
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        Peers(Place()).together(fail)


@pytest.fixture
def _signals_restored() -> object:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals_restored")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_is_a_request_to_stop(number: signal.Signals) -> None:
    switch = StopSwitch(Peers(Place()))
    switch.listen()
    assert not switch.agreed()
    os.kill(os.getpid(), number)
    assert switch.agreed()
    switch.close()


@pytest.mark.usefixtures("_signals_restored")
def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopSwitch(Peers(Place())).listen()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.usefixtures("_signals_restored")
def test_second_interrupt_interrupts_and_a_second_sigterm_does_not() -> None:
    switch = StopSwitch(Peers(Place()))
    switch.listen()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# --- two processes --------------------------------------------------------------------------------


# (rank that gets a signal, in which step) -> last of 10 steps
STOPS = {
    (1, 3): 4,  # asked in step 3, agreed one step later
    (0, 9): 10,  # agreed in the last step
    (1, 10): 10,  # asked in the last step: the run ends anyway
    (None, 0): 10,
}


@pytest.mark.distributed
def test_two_ranks_agree_on_values_faults_and_the_last_step() -> None:
    arguments = {"stops": list(STOPS), "steps": 10}
    first, second = run_processes(2, "tests.helpers.launch_main", "agreements", arguments)
    assert sorted([*first.pop("tells"), *second.pop("tells")]) == [False] * 3 + [True]
    assert first == second
    assert first == {
        "gather": ["rank 0", "rank 1"],
        "sum": [2.0, 10.0],
        "no fault": "fine",
        "fault of 1": ("no text on rank 1.", 1),
        "fault of both": ("no text on rank 0.", 0),
        "last steps": list(STOPS.values()),
    }


@pytest.mark.distributed
def test_long_work_is_waited_for_and_a_quiet_rank_is_not() -> None:
    first, second = run_processes(2, "tests.helpers.launch_main", "waits", {"timeout_s": 1.0})
    assert first["patiently"] == "done on 0"
    assert second == {"patiently": "done on 1"}
    assert first["alone"].startswith("TransportTimeout: rank 0 of 2 on ")
    assert "has lost another rank while validating (gradient_pruning.timeout_s 1)" in first["alone"]


@pytest.mark.distributed
def test_ranks_that_were_given_different_things_are_named() -> None:
    """--model, --steps, seed, batch: a rank with another one hung, or trained on in silence."""
    base = {"--steps": 12, "optimizer": {"params": {"lr": 0.1}}}
    other = {"--steps": 13, "optimizer": {"params": {"lr": 0.2}}, "bf16": {"enabled": True}}
    many = {f"k{i}": i for i in range(9)}
    first, second = run_processes(
        2,
        "tests.helpers.launch_main",
        "compares",
        {"facts": [[base, base], [base, other], [{}, many]]},
    )
    assert first == second
    assert first[0] == "alike"
    assert first[1] == (
        "All ranks must be given the same, but --steps is 12 on rank 0 (HOST), 13 on rank 1 "
        "(HOST); bf16.enabled is absent on rank 0 (HOST), true on rank 1 (HOST); "
        "optimizer.params.lr is 0.1 on rank 0 (HOST), 0.2 on rank 1 (HOST)."
    )
    assert "k5 is absent on rank 0 (HOST), 5 on rank 1 (HOST); 3 more differ." in first[2]
