"""What owners keep of the shares they sum: the owned residual.

It is staged: an exchange works on a copy, which takes effect when the exchange was applied. All
functions are local.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ds_gradprune.errors import UnsupportedError
from ds_gradprune.wire.shares import Share


@dataclass(frozen=True, slots=True)
class _Owed:
    """What an owner has kept of one share.

    Attributes:
        crc: of the share's layout.
        values: (share.layout.numel,) fp32, CPU.
    """

    crc: int
    values: torch.Tensor


class OwnedResiduals:
    """What a rank owes as an owner, per bucket; staged until an exchange was applied.

    Args:
        keep: False: nothing is ever kept.
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._owed: dict[int, _Owed] = {}
        self._open: set[int] = set()
        self._paid: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(4 * owed.values.numel() for owed in self._owed.values())

    def open(self, bucket: int, share: Share) -> torch.Tensor:
        """Begin an exchange of a bucket.

        Returns:
            (share.layout.numel,) fp32: a copy of what is owed, for the caller to work on.

        Raises:
            UnsupportedError: the bucket has another layout than in the exchanges before.
            ValueError: another exchange of the bucket has not been finished.
        """
        if bucket in self._open:
            raise ValueError(
                f"bucket {bucket} is in an exchange that is not finished yet: call finish, with "
                "applied=False if it was given up"
            )
        owed = self._of(bucket, share)
        self._open.add(bucket)
        return torch.zeros(share.layout.numel) if owed is None else owed.clone()

    def close(self, bucket: int, share: Share, left: torch.Tensor | None) -> None:
        """End an exchange of a bucket.

        Args:
            bucket: its number.
            share: what is owned of it.
            left: (share.layout.numel,) fp32, what is owed now; None: what was owed before.
        """
        self._open.discard(bucket)
        if left is not None and self._keep:
            self._owed[bucket] = _Owed(share.layout.crc, left)

    def pay(self, bucket: int, share: Share, vector: torch.Tensor, scale: float) -> None:
        """See `Channel.pay`."""
        owed = self._of(bucket, share)
        if owed is None:
            return
        for piece in share.pieces:
            values = owed[piece.share_start : piece.share_start + piece.numel].mul(scale)
            target = vector[piece.bucket_start : piece.bucket_start + piece.numel]
            target.add_(values.to(target.device, target.dtype))
        self._paid.add(bucket)

    def settle(self, *, applied: bool) -> None:
        """See `Channel.settle`."""
        if applied:
            for bucket in self._paid:
                del self._owed[bucket]
        self._paid.clear()

    def state_dict(self) -> dict[int, tuple[int, torch.Tensor]]:
        """Bucket -> crc of the share's layout, what is owed."""
        return {number: (owed.crc, owed.values) for number, owed in self._owed.items()}

    def load_state_dict(self, state: Mapping[int, tuple[int, torch.Tensor]]) -> None:
        """What `state_dict` returned; exchanges under way are forgotten."""
        self._owed = {number: _Owed(crc, values.clone()) for number, (crc, values) in state.items()}
        self._open.clear()
        self._paid.clear()

    def _of(self, bucket: int, share: Share) -> torch.Tensor | None:
        owed = self._owed.get(bucket)
        if owed is None:
            return None
        if owed.crc != share.layout.crc:
            raise UnsupportedError(
                f"bucket {bucket} has another layout than in the exchanges before, and its owners "
                "keep a residual of the old one. With owner_reduce the set of trained parameters "
                "must stay the same during a run; use all_gather instead."
            )
        return owed.values
