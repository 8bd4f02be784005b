"""What training scripts share: from the command line of a rank to its exit code."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import GradPruneError, TransportError
from ds_gradprune.wire.lost import translated
from ds_gradprune.wire.silence import LATE_S, Pulse, deadline, within

from .kept_store import release
from .lost import situated
from .peers import TELL_LIMIT_S, AgreedFault, Peers
from .place import Place, export_place, find_place, share_cores
from .rendezvous import AbsentRanks
from .settings import RunSettings
from .shown import say
from .start import choose_accelerator, connect
from .terminal import outlived

S = TypeVar("S", bound=RunSettings)


def run_script(
    arguments: Sequence[str] | None,
    read: Callable[[Sequence[str] | None], S],
    work: Callable[[S, Peers], None],
) -> int:
    """Find the rank's place, read the settings, do the work; returns the exit code. Collective.

    Args:
        arguments: the command line; None: the process's own.
        read: its settings; raises GradPruneError.
        work: collective.
    """
    with outlived():
        code = _run(arguments, read, work)
        release(code)
        return code


def _run(
    arguments: Sequence[str] | None,
    read: Callable[[Sequence[str] | None], S],
    work: Callable[[S, Peers], None],
) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    place, peers = Place(), None
    try:
        place = find_place(os.environ)
        export_place(place, os.environ)
        share_cores(place, os.environ)
        choose_accelerator()
        settings, block = _read(arguments, read)
        timeout_s, apart = block.timeout_s, block.min_islands is not None
        with translated("starting", place.rank, place.world_size, timeout_s):
            peers = crew = connect(place, timeout_s, apart=apart)
        with situated(lambda: crew.standing()), crew.during("starting"):
            with deadline(timeout_s + LATE_S, "making the first process groups"):
                pulse = Pulse(
                    crew.new_group(),
                    timeout_s,
                    doing=lambda: crew.doing,
                    standing=lambda: crew.standing(),
                )
            crew.on_adopt = pulse.close  # those that are left know of each other otherwise
            with pulse:
                work(crew.together(settings), crew)
    except GradPruneError as exc:
        _tell(exc, place, peers)
        return 2
    except KeyboardInterrupt:
        if peers is None or peers.rank == 0:
            say("Interrupted; nothing new was saved.")
        return 130
    return 0


def _tell(exc: GradPruneError, place: Place, peers: Peers | None) -> None:
    """Say a failure once, on the rank that knows best."""
    if isinstance(exc, (AgreedFault, AbsentRanks)):
        tells = place.rank == exc.rank
    elif peers is not None:
        tells = peers.tells(on_each_host=isinstance(exc, TransportError))
    else:  # a lost rank may be found by one alone; all else is the same on all
        tells = place.rank == 0 or isinstance(exc, TransportError)
    if tells:
        say(f"error: {exc}")
    # A launcher ends all ranks when one ends: first let it be said.
    if peers is not None and peers.crew is None:
        within(TELL_LIMIT_S, lambda: peers.gather(None))


def _read(
    arguments: Sequence[str] | None, read: Callable[[Sequence[str] | None], S]
) -> tuple[Callable[[], S], GradientPruningConfig]:
    """The settings, or their fault when they are asked for; and our block, or its defaults.

    So a fault is told once, when all ranks are there.
    """
    try:
        settings = read(arguments)
    except GradPruneError as exc:
        fault = exc

        def fail() -> S:
            raise fault

        return fail, GradientPruningConfig()
    return lambda: settings, settings.block


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
