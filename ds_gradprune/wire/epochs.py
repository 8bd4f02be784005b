"""A transport for one epoch of `members`: gloo over a prefix of the store, beside torch's world."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.lost import reason_of
from ds_gradprune.wire.members import Epoch
from ds_gradprune.wire.torchdist import TorchDistTransport
from ds_gradprune.wire.transport import Transport

CONNECT_S = 4.0
"""So long islands that have agreed on an epoch may take to connect. One of two that cannot is left
out, so a link that loses packets in one direction costs this beside `timeout_s`."""

PATIENT_S = 10.0
"""The same in the first epoch, and with one that comes back: nobody is left out of those. So long
they also wait before, until all are about to connect: a host may be busy."""

_GLOO_WAITS = 5
"""Gloo waits for a connection so many times its time-out (gloo/transport/tcp/pair.h, waitUntil)."""

_NAP_S = 0.02

_given_up: list[Any] = []
"""Groups of former epochs. To drop one waits for its threads, and those wait for a lost island."""


def gloo_opener(store: Any, island: int, timeout_s: float) -> Callable[[Epoch], Transport]:
    """What `Members` opens its epochs with.

    Args:
        store: a store of torch.distributed that all islands reach.
        island: this one.
        timeout_s: of every call.
    """

    def opens(epoch: Epoch) -> Transport:
        place, size = epoch.islands.index(island), len(epoch.islands)
        prefix = dist.PrefixStore(f"gloo/{epoch.number}", store)  # type: ignore[attr-defined] # torch
        limit = timedelta(seconds=timeout_s)
        kind = dist.ProcessGroup.BackendType.GLOO
        group = dist.ProcessGroup(prefix, place, size)
        is_patient = epoch.number == 0 or epoch.newcomer is not None
        connect_s = min(timeout_s, PATIENT_S if is_patient else CONNECT_S)
        _meet(Bounded(prefix), epoch, island, PATIENT_S if epoch.number else timeout_s)
        try:
            connect = timedelta(seconds=connect_s / _GLOO_WAITS)
            backend = dist.ProcessGroupGloo(prefix, place, size, connect)
        except RuntimeError as exc:
            raise TransportError(
                f"island {island} could not connect to islands {epoch.islands}: {reason_of(exc)}"
            ) from exc
        backend._set_default_timeout(limit)
        backend._set_sequence_number_for_group()
        group._set_default_backend(kind)
        group._register_backend(torch.device("cpu"), kind, backend)
        return _EpochTransport(group, timeout_s)

    return opens


def _meet(store: Bounded, epoch: Epoch, island: int, limit_s: float) -> None:
    """Return when all islands are about to connect: gloo gives up early. Collective: the epoch's.

    Raises:
        TransportError: some do not come.
    """
    deadline_s = time.monotonic() + limit_s
    store.set(f"here/{island}", "")
    while not store.check([f"here/{other}" for other in epoch.islands]):
        if time.monotonic() >= deadline_s:
            raise TransportError(
                f"island {island} was to connect to islands {epoch.islands}, but not all of them "
                f"came within {limit_s:g} s"
            )
        time.sleep(_NAP_S)


class _EpochTransport(TorchDistTransport):
    """Its group is kept when it is closed: neither to drop nor to abort one is sure to return."""

    def __init__(self, group: Any, timeout_s: float) -> None:
        super().__init__(group, timeout_s, is_apart=True)

    def close(self) -> None:
        """See `Transport.close`; the group is given up. Local."""
        super().close()
        _given_up.append(self._group)
