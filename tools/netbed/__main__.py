"""Run a command on the first host of a fresh bed.

    python -m tools.netbed --hosts 2 --rate 100mbit -- \
        sh -c 'deepspeed --hostfile $NETBED_HOSTFILE --launcher pdsh launch/train.py ...'

The exit code is the command's. What crossed each host's link is told on stderr at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from ds_gradprune.errors import GradPruneError
from tools.netbed.bed import Bed
from tools.netbed.host import Counters
from tools.netbed.schedule import merge, parse_schedule


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="python -m tools.netbed",
        description="Run a command on the first of several hosts behind shaped links. Needs root.",
    )
    flags.add_argument("--hosts", type=int, default=2, help="2 to 8 (default: 2)")
    flags.add_argument(
        "--rate", default="none", help="of every link and direction, 20mbit, 1gbit (default: none)"
    )
    flags.add_argument("--slots", type=int, default=1, help="processes per host (default: 1)")
    flags.add_argument(
        "--schedule",
        action="append",
        default=[],
        help="steps:0=100mbit,10=20mbit | square:high=100mbit,low=20mbit,period=10 | "
        "walk:low=5mbit,high=100mbit,every=2,seed=7 | outage:at=30,for=2; may be repeated",
    )
    flags.add_argument("command", nargs="+", help="what to run; its hosts are in $NETBED_HOSTFILE")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    flags = parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        schedule = merge(*(parse_schedule(text) for text in flags.schedule))
        with Bed(flags.hosts, flags.rate, flags.slots) as bed, bed.play(schedule):
            code: int = bed.hosts[0].run(flags.command, env=bed.environ()).returncode
            for host in bed.hosts:
                _tell_traffic(host.name, host.counters())
    except GradPruneError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return code


def _tell_traffic(name: str, counters: Counters) -> None:
    facts = {"host": name} | dataclasses.asdict(counters)
    print(json.dumps(facts), file=sys.stderr, flush=True)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
