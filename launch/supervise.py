"""Start a training command on several hosts, and start it again when a rank or a host is lost.

    python launch/supervise.py --hostfile hosts -- launch/train.py --config ds.json --out runs/first
    python launch/supervise.py --hostfile hosts --min-hosts 2 -- deepspeed my_script.py --flag

The command is started on the hosts that answer, one process per slot. What ends well ends the
supervision. Else it is started again on the hosts that answer then, and goes on from its newest
whole checkpoint. Where the configuration sets min_islands and so many islands are left, they train
on, and the lost one alone is started again and let in.

Called again, this script goes on in the same way. Ctrl-C, or SIGTERM, lets the ranks end by
themselves, a second one ends them at once.

The exit code is that of the command: of the rank that failed first. 128 + n is signal n. Events
are JSON lines in --log.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hjson

if __name__ == "__main__" and not __package__:
    # The root instead of this folder: launch and ds_gradprune are found there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "launch"

from ds_gradprune.commands.hostfile import read_hostfile
from ds_gradprune.commands.hosts import SSH
from ds_gradprune.config import GradientPruningConfig, load_block
from ds_gradprune.config.load import read_config
from ds_gradprune.errors import ConfigError, GradPruneError

from .support.attempt import Limits
from .support.flags import ScriptParser, natural, path, positive
from .support.run_folder import RunFolder
from .support.supervisor import Supervisor, Task

OURS = ("train", "finetune")
"""Scripts, and commands of `ds-gradprune`, that have --out and --resume."""


def parser() -> ScriptParser:
    """The flags, without the command."""
    flags = ScriptParser("Start a training command, and start it again when a host is lost.")
    add = flags.add_argument
    add("--hostfile", type=path, required=True, help='lines "NAME slots=N"')
    add("--min-hosts", type=positive, default=1, help="with fewer nothing starts (default: 1)")
    add("--max-restarts", type=natural, default=10, help="in all (default: 10)")
    add("--wait", type=natural, default=600, help="seconds to wait for --min-hosts (default: 600)")
    add(
        "--rejoin",
        type=natural,
        default=60,
        help="seconds between questions to hosts that are left out; 0: they wait for the next "
        "restart (default: 60)",
    )
    add(
        "--host-timeout",
        type=positive,
        default=10,
        help="seconds after which a host that is not heard is lost (default: 10)",
    )
    add(
        "--grace",
        type=natural,
        default=5,
        help="seconds for the other ranks after the first has failed (default: 5)",
    )
    add("--ssh", type=shlex.split, help=f"what reaches a host (default: {shlex.join(SSH)})")
    add("--master_addr", help="address of the first host (default: its name)")
    add(
        "--master_port",
        type=positive,
        default=29500,
        help="of the first attempt, each later one takes the next (default: 29500)",
    )
    add(
        "--checkpoints",
        type=path,
        help="folder of the command's checkpoints, with DeepSpeed's file latest (default: that of "
        "--out in the command)",
    )
    add(
        "--resume-words",
        type=shlex.split,
        default=["--resume"],
        help="added to the command where there is a checkpoint (default: --resume)",
    )
    add("--log", type=path, help="events as JSON lines (default: supervise.jsonl beside --out)")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    try:
        return Supervisor(read_task(sys.argv[1:] if arguments is None else arguments)).run()
    except GradPruneError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        return 2


def read_task(arguments: Sequence[str]) -> Task:
    """What is asked for. Local.

    Raises:
        ConfigError: something is wrong.
    """
    own, command = _split(arguments)
    flags = parser().parse_args(own)
    words = command_words(command)
    hosts = read_hostfile(flags.hostfile)
    if flags.min_hosts > len(hosts):
        raise ConfigError(
            f"--min-hosts must be at most the {len(hosts)} hosts of {flags.hostfile}, got "
            f"{flags.min_hosts}."
        )
    is_ours = any(Path(word).stem in OURS for word in command[:2])
    out = _value_of("--out", words) if is_ours else None
    if is_ours and out is None:
        raise ConfigError("--out must be in the command, or no checkpoint could be found.")
    folder = RunFolder(Path(out)) if out is not None else None
    beside = Path("supervise.jsonl") if out is None else Path(f"{out.rstrip('/')}.supervise.jsonl")
    block = _block_of(words) if is_ours else None
    return Task(
        words=words,
        hosts=hosts,
        ssh=flags.ssh or SSH,
        ssh_is_given=flags.ssh is not None,
        min_hosts=flags.min_hosts,
        max_restarts=flags.max_restarts,
        wait_s=float(flags.wait),
        rejoin_s=float(flags.rejoin),
        limits=Limits(float(flags.host_timeout), float(flags.grace)),
        master_addr=flags.master_addr,
        master_port=flags.master_port,
        folder=folder,
        checkpoints=flags.checkpoints or (folder.checkpoints if folder else None),
        resume=flags.resume_words,
        log=flags.log or beside,
        min_islands=None if block is None else block.min_islands,
        island_ranks=None if block is None else block.island.ranks,
    )


def command_words(command: Sequence[str]) -> list[str]:
    """The command of one rank.

    Raises:
        ConfigError: there is none, or it brings a launcher of its own.
    """
    words = list(command)
    if words and Path(words[0]).name == "deepspeed":
        del words[0]
        if words and words[0].startswith("-"):
            raise ConfigError(
                "the command must be a script and its flags, because launch/supervise.py starts "
                f"the ranks itself, got deepspeed's own {words[0]}. Leave out what stands before "
                "the script, and give hosts, ports and addresses to launch/supervise.py."
            )
    if not words:
        raise ConfigError("a command must follow --, for example -- launch/train.py --config ...")
    if Path(words[0]).name == "ds-gradprune":
        return [sys.executable, "-m", "ds_gradprune", *words[1:]]
    return [sys.executable, *words] if words[0].endswith(".py") else words


def _block_of(words: Sequence[str]) -> GradientPruningConfig | None:
    """What the command's configuration says; what is wrong in it is told by the command."""
    config = _value_of("--config", words)
    if config is None or not any(Path(word).stem == "train" for word in words):
        return None
    try:
        return load_block(read_config(config, hjson.loads))
    except ConfigError:
        return None


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Own flags, and what stands behind the first "--"."""
    given = list(arguments)
    if "--" not in given:
        return given, []
    at = given.index("--")
    return given[:at], given[at + 1 :]


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    """What a flag of the command is set to; None: it is not there."""
    for number, word in enumerate(words):
        if word == flag and number + 1 < len(words):
            return words[number + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


if __name__ == "__main__":
    sys.exit(main())
