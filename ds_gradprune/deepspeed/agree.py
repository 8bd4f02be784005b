"""Do all ranks run the same thing? Compared at attach, before anything travels.

What every rank brings is equal nearly always, so 32 bytes per rank say it. Only where they differ
do the ranks exchange texts, and all of them come to the same sentence. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from ds_gradprune import errors
from ds_gradprune.errors import GradPruneError, RankMismatchError
from ds_gradprune.wire.transport import Transport

MAX_TEXT_BYTES = 64 * 2**20
"""No rank has more to say: a larger length is noise on the wire."""

_ABSENT = "(absent)"
_LISTED = 6
"""A message names so many differing facts, values or hosts at most."""

_FIXES = (
    (
        ("ds_gradprune", "wire format", "deepspeed", "torch", "numpy", "python"),
        "Install the same constraints.txt on every host.",
    ),
    (
        ("law arithmetic",),
        "Use hosts whose floating point follows IEEE 754, or the same ds_gradprune on all.",
    ),
    (("parameter",), "Build the same model on every rank, with the same layers frozen."),
    (("TrainingArguments", "steps of"), "Pass the same TrainingArguments on every rank."),
    (("training examples",), "Give every rank the same training data."),
    (("weights that",), "Begin with the same weights and buffers, and freeze the same layers."),
    (("given",), "Give every rank the same."),
    (("optimizer", "lr_scheduler"), "Build the same optimizer and schedule on every rank."),
)
"""First words of facts -> what to do where they differ; anything else stands in ds_config.json."""

_FIX_CONFIG = "Copy the same ds_config.json to every host."


@dataclass(frozen=True)
class Facts:
    """What must be equal on all ranks, as text.

    Attributes:
        values: name -> value.
        lists: name of an entry -> entries in order; only the first that differs is told.
    """

    values: Mapping[str, str]
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def digest(self) -> bytes:
        """32 bytes, equal where everything is equal."""
        lists = {name: list(entries) for name, entries in self.lists.items()}
        return hashlib.sha256(_dump([dict(self.values), lists])).digest()


def check_ranks(transport: Transport, facts: Facts) -> None:
    """Compare facts over all ranks.

    Args:
        transport: over all ranks; its time-out bounds the call.
        facts: this rank's.

    Raises:
        RankMismatchError: names what differs, and on which ranks and hosts, on all ranks alike.
        TransportError: a rank did not answer.

    Collective: all ranks of `transport`.
    """
    mine = torch.frombuffer(bytearray(facts.digest()), dtype=torch.uint8)
    digests = torch.empty(transport.world_size, mine.numel(), dtype=torch.uint8)
    transport.all_gather(mine, digests)
    if bool((digests == digests[0]).all()):
        return
    ranks = [_object(text) for text in gather_texts(transport, facts_text(facts))]
    hosts = [str(rank.get("host", "?")) for rank in ranks]
    differing = _differing(ranks, "values")
    for name in _differing(ranks, "lists"):
        texts = gather_texts(transport, _dump(list(facts.lists.get(name, ()))).decode())
        differing |= _first_difference(name, [json.loads(text) for text in texts])
    raise RankMismatchError(_message(differing, hosts))


def check_beside(mine: Facts, text: str) -> None:
    """Compare facts with those of a run that goes on.

    Args:
        mine: this rank's.
        text: the run's, as `facts_text` gave them.

    Raises:
        RankMismatchError: names what differs.

    Local.
    """
    others = [_object(told) for told in (text, facts_text(mine))]
    differing = _differing(others, "values") | _differing(others, "lists")
    if differing:
        hosts = [str(told.get("host", "?")) for told in others]
        raise RankMismatchError(_message(differing, hosts))


def facts_text(facts: Facts) -> str:
    """Facts for `check_beside`; of lists their hashes. Pure."""
    short = {name: hashlib.sha256(_dump(list(e))).hexdigest() for name, e in facts.lists.items()}
    told = {"host": socket.gethostname(), "values": dict(facts.values), "lists": short}
    return _dump(told).decode()


def check_weights(transport: Transport, shard: int, crc: int, step: int) -> None:
    """Before a save: a checkpoint of ranks that no longer agree would end every run that loads it.

    Args:
        transport: over all ranks; its time-out bounds the call.
        shard: ranks of the same index must agree.
        crc: of what must be equal on them.
        step: optimizer steps that were done, for the message.

    Raises:
        RankMismatchError: they do not, on all ranks alike.

    Collective: all ranks of `transport`.
    """
    first: dict[int, tuple[int, int]] = {}
    for rank, text in enumerate(gather_texts(transport, json.dumps([shard, crc]))):
        found = json.loads(text)
        other, expected = first.setdefault(found[0], (rank, found[1]))
        if found[1] != expected:
            raise RankMismatchError(
                f"the weights of rank {rank} are others than those of rank {other} after step "
                f"{step}, so no checkpoint is saved. Resume from the one before; if it happens "
                "again, compare versions and configuration of the hosts, and test their memory."
            )


def raise_together(
    transport: Transport, error: GradPruneError | None, whose: str = "rank {rank}"
) -> None:
    """Raise on all ranks if one has an error, so that nobody waits for the one that has left.

    Args:
        transport: over all ranks; its time-out bounds the call.
        error: this rank's; None: all is well here.
        whose: what a message calls another rank.

    Raises:
        GradPruneError: the own error; elsewhere the first one, of the same kind, with its rank.

    Collective: all ranks of `transport`.
    """
    mine = {"kind": type(error).__name__, "text": str(error)} if error is not None else {}
    told = [_object(text) for text in gather_texts(transport, _dump(mine).decode())]
    if error is not None:
        raise error
    for rank, other in enumerate(told):
        if other:
            kind = getattr(errors, str(other.get("kind")), RankMismatchError)
            raise kind(f"{whose.format(rank=rank)}: {other.get('text')}")


def gather_texts(transport: Transport, text: str) -> list[str]:
    """The text of every rank that takes part, in rank order; lengths may differ.

    Raises:
        RankMismatchError: a length is impossible, on all ranks alike.
        TransportError: a rank did not answer.

    Collective: all ranks of `transport`.
    """
    mine = text.encode("utf-8", "backslashreplace")
    length = torch.tensor([len(mine)], dtype=torch.int64).view(torch.uint8)
    lengths = _gathered(transport, length)
    sizes = {rank: int(row.view(torch.int64)) for rank, row in lengths.items()}
    if not all(0 <= size <= MAX_TEXT_BYTES for size in sizes.values()):
        raise RankMismatchError(
            f"ranks must tell at most {MAX_TEXT_BYTES} bytes of themselves, got lengths "
            f"{list(sizes.values())}. {_FIXES[0][1]}"
        )
    payload = torch.zeros(max(sizes.values()), dtype=torch.uint8)
    if mine:
        payload[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    return [
        bytes(row[: sizes[rank]].numpy()).decode("utf-8", "replace")
        for rank, row in _gathered(transport, payload).items()
    ]


def _gathered(transport: Transport, payload: torch.Tensor) -> dict[int, torch.Tensor]:
    """The bytes of every rank that takes part. Collective: all ranks of `transport`."""
    rows = torch.empty(transport.world_size, payload.numel(), dtype=torch.uint8)
    work = transport.start_all_gather(payload, rows)
    work.wait()
    ranks = range(len(rows)) if work.took_part is None else work.took_part
    return dict(zip(ranks, rows, strict=False))


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode("ascii")


def _object(text: str) -> dict[str, Any]:
    """What another rank told; of another release it may be anything."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _differing(told: Sequence[Mapping[str, Any]], part: str) -> dict[str, list[str]]:
    """Names whose values are not equal -> the values in rank order."""
    ranks = [values if isinstance(values := rank.get(part), dict) else {} for rank in told]
    names = dict.fromkeys(name for values in ranks for name in values)
    found = {name: [str(values.get(name, _ABSENT)) for values in ranks] for name in names}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _first_difference(name: str, ranks: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    for index, entries in enumerate(zip_longest(*ranks, fillvalue=_ABSENT)):
        if len(set(entries)) > 1:
            return {f"{name} {index}": list(entries)}
    return {}


def _message(differing: Mapping[str, Sequence[str]], hosts: Sequence[str]) -> str:
    named = list(differing)[:_LISTED]
    listed = [f"{name} is {_values(differing[name], hosts)}" for name in named]
    if len(differing) > len(named):
        listed.append(f"{len(differing) - len(named)} more differ")
    fixes = dict.fromkeys(_fix(name) for name in named)
    if not named:
        listed, fixes = ["they could not say in what"], dict.fromkeys([_FIXES[0][1]])
    return f"all ranks must run the same thing, but {'; '.join(listed)}. {' '.join(fixes)}"


def _fix(name: str) -> str:
    for firsts, fix in _FIXES:
        if name.startswith(firsts):
            return fix
    return _FIX_CONFIG


def _values(values: Sequence[str], hosts: Sequence[str]) -> str:
    """Each value with the ranks that have it: "1 on rank 0 of a and 2 on ranks 1-3 of b"."""
    ranks_of: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_of.setdefault(value, []).append(rank)
    shown = [
        f"{value if len(value) <= 100 else value[:97] + '...'} on {_ranks(ranks, hosts)}"
        for value, ranks in list(ranks_of.items())[:_LISTED]
    ]
    if len(ranks_of) > _LISTED:
        shown.append(f"{len(ranks_of) - _LISTED} other values elsewhere")
    return " and ".join(shown)


def _ranks(ranks: Iterable[int], hosts: Sequence[str]) -> str:
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    parts = [f"{_runs(own)} of {host}" for host, own in list(by_host.items())[:_LISTED]]
    if len(by_host) > _LISTED:
        parts.append(f"{len(by_host) - _LISTED} more hosts")
    return ", ".join(parts)


def _runs(ranks: Sequence[int]) -> str:
    """Rising numbers as "rank 3" or "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    listed = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
