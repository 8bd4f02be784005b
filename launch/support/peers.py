"""What all processes of a run agree on, and how a failure is told once.

Agreements are JSON in a gloo group of their own, beside the training's collectives, so their order
never matters to each other. Every wait ends after `timeout_s`.

Longer than 300 lines: what ranks agree on, and the switch that ends a run by agreement.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ds_gradprune.deepspeed.agree import gather_texts
from ds_gradprune.errors import GradPruneError, RankMismatchError
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.everyone import Everyone
from ds_gradprune.wire.lost import translated
from ds_gradprune.wire.silence import within
from ds_gradprune.wire.stand_in import comrades, first_store

from .place import Place

T = TypeVar("T")

BEAT_S = 0.5
"""A rank that works while the others wait shows life so often."""

TELL_LIMIT_S = 1.0
"""So long rank 0's store may take to say who tells of a failure; it may be what has failed."""

MAX_TEXT_BYTES = 64 * 2**20
"""No rank has more to say: a larger length is noise on the wire."""

SHOWN_DIFFERENCES = 6

OF_A_START = {"--resume"}
"""What a rank that comes back may have otherwise."""

_TOLD = "ds_gradprune/told"


class AgreedFault(GradPruneError):
    """Some rank failed, and all ranks know; `rank` is the one that should tell the user."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class Peers:
    """All processes of the run. With one process everything is answered at once.

    Args:
        place: of this process. With more than one, torch.distributed must be initialised.
        timeout_s: longest wait for another rank.
        apart: ranks may be lost, and come back.
        joins: this one takes the place of a lost rank in a run that goes on. It asks only those of
            its island before it is let in; what it was given is compared with what the run's store
            keeps.

    Attributes:
        joins: see there.
        hosts: of every rank, in rank order; empty before `check_alike`.
        host: of this rank.
        doing: what this rank is at, for messages; see `during`.
        standing: how far the run has come, for messages; whole sentences, or nothing.
        crew: which islands are left, where some may be lost; None: none may. See `adopt`.

    Collective: all ranks construct it.
    """

    def __init__(
        self, place: Place, timeout_s: float = 600.0, *, apart: bool = False, joins: bool = False
    ) -> None:
        self.joins = joins
        self._apart = apart
        self._compared = 0
        self.place = place
        self.rank = place.rank
        self.world_size = place.world_size
        self.timeout_s = timeout_s
        self.hosts: list[str] = []
        self.host = socket.gethostname()
        self.doing = "starting"
        self.standing: Callable[[], str] = str
        self.crew: Everyone | None = None
        self.on_adopt: Callable[[], None] = lambda: None
        self._group = self.new_group()

    def new_group(self) -> Any:
        """One more gloo group of all ranks that this one talks to; None: there are no others.

        A rank that joins talks to those of its island alone. Collective: these.
        """
        ranks = self._ranks()
        if len(ranks) == 1:
            return None
        return dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=self.timeout_s))

    def _ranks(self) -> list[int]:
        """Whom this one talks to, itself included, while nobody may be lost. Local."""
        return list(comrades() or [self.rank]) if self.joins else list(range(self.world_size))

    @property
    def is_first(self) -> bool:
        """This rank does what is done once: rank 0, or the first one that is left."""
        if self.crew is None:
            return self.rank == 0 and not self.joins
        return self.crew.place == 0

    def adopt(self, handle: Any) -> None:
        """From now on agree with those islands that are left, where some may be lost. Collective.

        Args:
            handle: `engine.gradprune`; None: nothing is pruned.
        """
        self.crew = None if handle is None else handle.crew
        if self.crew is not None:
            self.on_adopt()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; plain JSON types. Collective.

        Raises:
            RankMismatchError: a rank tells far too much, on all ranks alike.
            RuntimeError: torch's own, where a rank is gone; `during` gives it a name.
        """
        if self.crew is not None:
            return [json.loads(text) for text in gather_texts(self.crew, json.dumps(value))]
        if self._group is None:
            return [value]
        text = torch.tensor(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(sizes, torch.tensor([text.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        if not all(0 <= int(size) <= MAX_TEXT_BYTES for size in sizes):
            raise RankMismatchError(f"ranks must tell at most {MAX_TEXT_BYTES} bytes, got {sizes}.")
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: text.numel()] = text
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded, group=self._group)
        return [
            json.loads(bytes(text[: int(size)].tolist()))
            for text, size in zip(texts, sizes, strict=True)
        ]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values summed over ranks, in float64; equal on all ranks. Collective."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; if it fails on one, it has failed on all. Collective.

        Args:
            work: must not call collectives, because another rank's may have failed before.

        Raises:
            AgreedFault: on all ranks alike, with the message of the first rank that failed.
        """
        result: T | None = None
        fault: str | None = None
        try:
            result = work()
        except GradPruneError as exc:
            fault = str(exc)
        messages = self.gather(fault)
        ranks: Iterable[int] = self._ranks()
        if self.crew is not None:
            ranks = self.crew.took_part
        for rank, message in zip(ranks, messages, strict=True):
            if message is not None:
                raise AgreedFault(message, rank)
        return result  # type: ignore[return-value] # set where no rank has a fault

    def patiently(self, work: Callable[[], T]) -> T:
        """`together` for work that may take longer than `timeout_s` on some ranks.

        The others wait as long as those ranks show life, from a thread beside their work. Ctrl-C
        ends the wait. Collective.
        """
        if self._group is None:
            return self.together(work)
        finished = threading.Event()
        failures: list[BaseException] = []

        def beat() -> None:
            try:
                while not all(self.gather(finished.is_set())):
                    finished.wait(BEAT_S)
            except BaseException as exc:  # carried to the caller's thread below
                failures.append(exc)

        thread = threading.Thread(target=beat, name="beat", daemon=True)
        thread.start()

        def work_and_wait() -> T:
            try:
                return work()
            finally:
                finished.set()
                while thread.is_alive():
                    thread.join(BEAT_S)
                if failures:
                    raise failures[0]

        return self.together(work_and_wait)

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on where ranks were given different things. Collective.

        Args:
            facts: name to plain JSON; an inner mapping's names are joined by dots.

        Raises:
            RankMismatchError: on all ranks alike; names what differs, and where.
        """
        if self._apart:
            self._compare_with_run(_flat(facts) | {"number of ranks": self.world_size})
        everyone = self.gather([self.host, _flat(facts)])
        self.hosts = [host for host, _ in everyone]
        differences = [
            f"{name} is {_by_value(name, everyone)}"
            for name in sorted({name for _, flat in everyone for name in flat})
            if len({json.dumps(flat.get(name)) for _, flat in everyone}) > 1
        ]
        if differences:
            more = len(differences) - SHOWN_DIFFERENCES
            shown = differences[:SHOWN_DIFFERENCES] + ([f"{more} more differ"] if more > 0 else [])
            raise RankMismatchError(f"All ranks must be given the same, but {'; '.join(shown)}.")

    def _compare_with_run(self, mine: dict[str, Any]) -> None:
        """Keep what all were given for ranks that come back; as one of those, compare. Local."""
        key, self._compared = f"alike/{self._compared}", self._compared + 1
        store = Bounded(first_store())
        if not self.joins:
            if self.rank == 0:
                store.set(key, json.dumps(mine))
            return
        run = json.loads(store.get(key))
        differing = [
            f"{name} is {json.dumps(mine.get(name))} here, {json.dumps(run.get(name))} in the run"
            for name in sorted({*run, *mine} - OF_A_START)
            if mine.get(name) != run.get(name)
        ]
        if differing:
            raise RankMismatchError(
                "A rank that comes back must be given the same as the run that goes on, but "
                f"{'; '.join(differing[:SHOWN_DIFFERENCES])}."
            )

    @contextlib.contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Turn what torch raises when a rank is gone into one typed line.

        Args:
            doing: "saving a checkpoint", for the message.

        Raises:
            TransportError, TransportTimeout: instead of torch's RuntimeError.
        """
        before, self.doing = self.doing, doing
        with translated(doing, self.rank, self.world_size, self.timeout_s):
            yield
        self.doing = before

    def tells(self, *, on_each_host: bool = False) -> bool:
        """True on the first rank that asks, False on all others: who tells of a failure. Local.

        For failures that may have hit one rank alone, where no collective would return. A store
        that does not answer at once is gone with rank 0: then everybody tells.

        Args:
            on_each_host: on the first rank of each host: what the link has parted is read apart.
        """
        if self.world_size == 1:
            return True
        store = dist.distributed_c10d._get_default_store()
        key = f"{_TOLD}/{self.host}" if on_each_host else _TOLD
        return within(TELL_LIMIT_S, lambda: store.add(key, 1) == 1) is not False


class StopSwitch:
    """Ends a run at a step boundary, on all ranks at the same one, when any rank is asked to stop.

    The question travels while the next step computes: `agreed` launches it and answers the one of
    the step before. So a stop comes one step late and costs no waiting.

    Where islands may be lost the question travels in the headers of the exchanges instead.

    Args:
        peers: the ranks that must agree.
        handle: `engine.gradprune`; None: nothing is pruned.

    Collective: all ranks construct it.
    """

    def __init__(self, peers: Peers, handle: Any = None) -> None:
        self.requested = False
        self._handle = None if peers.crew is None else handle
        self._group = peers.new_group() if self._handle is None else None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def listen(self) -> None:
        """Take SIGINT, SIGTERM and SIGHUP as requests. A second SIGINT interrupts at once. Local.

        SIGHUP comes when a terminal is closed; under nohup it is ignored, and stays so.
        """
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._on_signal)

    def agreed(self) -> bool:
        """True on all ranks once any rank was asked to stop. Call once per step. Collective."""
        if self._handle is not None:
            self._handle.asks_stop = self.requested
            return bool(self._handle.stops)
        if self._group is None:
            return self.requested
        if self._answer():
            return True
        flag = torch.tensor([int(self.requested)], dtype=torch.int32)
        self._asked = (flag, dist.all_reduce(flag, group=self._group, async_op=True))
        return False

    def close(self) -> None:
        """Let the last question arrive, before the process group goes. Collective."""
        self._answer()

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        flag, work = self._asked
        work.wait()
        self._asked = None
        return bool(flag.item())

    def _on_signal(self, number: int, _frame: object) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _flat(facts: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + name] = value
    return flat


def _by_value(name: str, everyone: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Each value once, with the ranks that have it: "8 on rank 0 (host-a), 4 on rank 1 (...)"."""
    ranks: dict[str, list[str]] = {}
    for rank, (host, flat) in enumerate(everyone):
        value = json.dumps(flat[name]) if name in flat else "absent"
        ranks.setdefault(value[:80], []).append(f"rank {rank} ({host})")
    return ", ".join(f"{value} on {' and '.join(who)}" for value, who in ranks.items())
