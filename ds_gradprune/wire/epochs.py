"""A transport for one epoch of `members`: gloo over a prefix of the store, beside torch's world."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.lost import reason_of
from ds_gradprune.wire.members import Epoch
from ds_gradprune.wire.torchdist import TorchDistTransport
from ds_gradprune.wire.transport import Transport

CONNECT_S = 10.0
"""So long islands that have agreed on an epoch may take to connect."""

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
        try:
            connect = timedelta(seconds=min(timeout_s, CONNECT_S))
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


class _EpochTransport(TorchDistTransport):
    """Its group is kept when it is closed: neither to drop nor to abort one is sure to return."""

    def __init__(self, group: Any, timeout_s: float) -> None:
        super().__init__(group, timeout_s, is_apart=True)

    def close(self) -> None:
        """See `Transport.close`; the group is given up. Local."""
        super().close()
        _given_up.append(self._group)
