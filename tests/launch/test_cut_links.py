"""Hosts that do not hear each other: who is told, who is left out, and who is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.support import cut_links as module
from launch.support.cut_links import SCRIPT, Cut, Links, cut_links, judge, without_cuts
from tests.helpers import netbed
from tools.netbed import Bed

NOBODY = "02:00:00:00:00:99"


def answers(*cuts: tuple[str, str], names: str = "abc") -> dict[str, dict[str, Any]]:
    """What hosts say where packets of the given directions, (from, to), are lost."""
    whole = {
        (one, other): (one, other) not in cuts and (other, one) not in cuts
        for one in names
        for other in names
        if one != other
    }
    return {
        one: {
            "reached": {other: whole[one, other] for other in names if other != one},
            "heard": [o for o in names if o != one and (o, one) not in cuts],
        }
        for one in names
    }


def test_the_direction_that_is_lost_is_named() -> None:
    assert judge(answers()) == []
    assert judge(answers(("c", "b"))) == [Cut("b", "c", (("c", "b"),))]
    assert str(judge(answers(("c", "b")))[0]) == "packets from c to b are lost"
    [both] = judge(answers(("c", "b"), ("b", "c")))
    assert str(both) == "b and c do not hear each other"


def test_a_firewall_that_drops_datagrams_cuts_nothing() -> None:
    told = answers()
    for one in told.values():
        one["heard"] = []
    assert judge(told) == []
    told["a"]["reached"]["b"] = None  # a name that is not known there
    assert judge(told) == []


@pytest.mark.parametrize(
    ("cuts", "left"),
    [
        ([], "abcd"),
        ([("b", "c")], "abd"),
        ([("a", "d")], "abc"),
        ([("a", "b"), ("a", "c"), ("a", "d")], "bcd"),
        ([("a", "b"), ("c", "d")], "ac"),
    ],
)
def test_as_many_as_possible_are_left(cuts: list[tuple[str, str]], left: str) -> None:
    assert without_cuts("abcd", [Cut(*pair) for pair in cuts]) == list(left)


def test_links_are_looked_at_where_they_are_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a host that answers again is let in when it hears those that train."""
    found: list[Cut] = []
    asked: list[list[str]] = []

    def look(hosts: dict[str, list[str]], interface: str) -> list[Cut]:
        asked.append([interface, *hosts])
        return found

    monkeypatch.setattr(module, "cut_links", look)
    events: list[Any] = []
    links = Links({"NCCL_SOCKET_IFNAME": "eth1"}, lambda *event, **facts: events.append(facts))
    hosts: dict[str, list[str]] = {name: [] for name in "abc"}
    assert links.hearing(hosts) == ["a", "b", "c"]
    assert links.beside(["a"], ["b"], lambda name: []) == ["b"]
    assert asked == []
    links.doubted = True
    found.append(Cut("b", "c", (("b", "c"),)))
    assert links.hearing(hosts) == ["a", "b"]
    assert events == [{"links": "packets from b to c are lost", "left_out": ["c"]}]
    told = "d did not answer: ssh to them by hand, and packets from b to c are lost: mend what"
    assert links.told(["d"]).startswith(told)
    assert links.beside(["a", "b"], ["c"], lambda name: []) == []
    found.clear()
    assert links.beside(["a", "b"], ["c"], lambda name: []) == ["c"]
    assert links.hearing(hosts) == ["a", "b", "c"]
    assert not links.doubted
    assert asked[0] == ["eth1", "a", "b", "c"]


def test_two_scripts_hear_each_other() -> None:
    both = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in "ab"
    ]

    def say(number: int, **line: Any) -> None:
        pipe = both[number].stdin
        assert pipe is not None
        pipe.write(json.dumps(line) + "\n")
        pipe.flush()

    def heard(number: int) -> Any:
        pipe = both[number].stdout
        assert pipe is not None
        return json.loads(pipe.readline())

    try:
        for number, name in enumerate("ab"):
            say(number, name=name, interface="lo", limit_s=20)
        ends = [heard(number)["ends"] for number in (0, 1)]
        assert [address for address, *_ in ends] == ["127.0.0.1"] * 2
        unknown = ["no-such-host.invalid", 1, 1]
        say(0, others={"b": ends[1]})
        say(1, others={"a": ends[0], "x": unknown})
        assert heard(0) == {"hearing": 1, "reached": {"b": True}, "heard": ["b"]}
        both[0].communicate()
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.netns
@pytest.mark.skipif(netbed.ABSENT is not None, reason=netbed.ABSENT or "")
@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_direction_between_two_hosts_is_found_from_a_third(tmp_path: Path) -> None:
    names = {f"host-{number}": ["ssh"] if number else [] for number in range(3)}
    script = tmp_path / "ask.py"
    script.write_text(
        "from launch.support.cut_links import cut_links\n"
        f"print(*cut_links({names}, 'eth0'), sep=', ')\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    with Bed(hosts=3) as bed:
        words = ["ip", "neigh", "replace", bed.hosts[1].address, "lladdr", NOBODY, "dev", "eth0"]
        bed.hosts[2].run([*words, "nud", "permanent"], check=True)
        environ = os.environ | bed.environ() | {"PYTHONPATH": root}
        asking = [sys.executable, str(script)]
        done = bed.hosts[0].run(asking, env=environ, capture_output=True, text=True)
    assert done.stdout == "packets from host-2 to host-1 are lost\n", done.stderr


def test_a_host_that_answers_nothing_is_in_no_cut(tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\nexit 255\n")
    ssh.chmod(0o755)
    assert cut_links({"host-a": [str(ssh)], "host-b": [str(ssh)]}, "") == []
