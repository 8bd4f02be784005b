"""One flat vector in, its sum over the peers out, pruned on the way.

The only place where residual, selection, codec and exchange meet. It is told the density; it does
not know why. The result is a *sum*, as an all-reduce gives, so that DeepSpeed's own averaging,
pre-division and clipping stay in force around it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ds_gradprune import codec, sparsify
from ds_gradprune.errors import RankMismatchError
from ds_gradprune.exchange import AllGather, Traffic
from ds_gradprune.records import CHUNK_NUMEL, BucketLayout, Part, RankSignals, SparseBlock
from ds_gradprune.residual import ResidualStore


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """What reducing cost this rank since the last `take_costs`.

    Attributes:
        codec_time_s: select, encode, decode, residual: everything but the exchange, seconds.
        traffic: time and bytes of the exchange.
    """

    codec_time_s: float
    traffic: Traffic


@dataclasses.dataclass(frozen=True, slots=True)
class Trade:
    """What all ranks sent of one bucket.

    Attributes:
        headers: all ranks' headers, in rank order.
        parts: of each rank, in rank order: (num_sent,) int64 distinct positions in the bucket and
            (num_sent,) float32 values, exactly as every rank decoded them. Empty when some rank's
            vector is not finite: then nothing counts as sent.
    """

    headers: list[codec.Header]
    parts: list[Part]


class Reducer:
    """Prunes, exchanges and sums buckets.

    Args:
        exchange: who sends what to whom.
        value_bits: 32 (fp32), 16 (bf16), 4 or 2 (levels) bits of a value on the wire.
        error_feedback: keep what was not sent and add it to the next gradient.
        clock: seconds, monotonic.

    Attributes:
        residuals: what this rank owes.
    """

    def __init__(
        self,
        exchange: AllGather,
        *,
        value_bits: int = 16,
        error_feedback: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.residuals = ResidualStore()
        self._exchange = exchange
        self._value_bits = value_bits
        self._error_feedback = error_feedback
        self._clock = clock
        self._busy_s = 0.0

    def reduce(
        self,
        vector: torch.Tensor,
        layout: BucketLayout,
        k: int,
        *,
        step: int,
        bucket: int,
        signals: RankSignals,
        scale: float = 1.0,
    ) -> list[codec.Header]:
        """Replace `vector` by the sum of what all ranks send of theirs.

        Every rank adds the same decoded payloads in rank order, so all get equal bits. If some
        rank's gradient is not finite, no residual changes and the result is nan everywhere.

        Args:
            vector: (layout.numel,) fp32, bf16 or fp16; changed in place.
            layout: what lies where in it.
            k: kept elements per full chunk, 1 .. CHUNK_NUMEL.
            step: optimizer step, counted from 1.
            bucket: index of the bucket inside the step.
            signals: this rank's measurements, for the header.
            scale: loss scale of `vector`.

        Returns:
            All ranks' headers, in rank order.

        Raises:
            TransportError: the exchange failed; this rank's residual then holds its gradient.
            WireFormatError: a payload is damaged.
            RankMismatchError: ranks disagree about the step or its decisions.

        Collective: all ranks, same order.
        """
        start_s = self._clock()
        residual = self.residuals.of(bucket, vector) if self._error_feedback else None
        owed = residual.buffer if residual is not None and not residual.is_zero else None
        block = sparsify.select(vector, layout, k, addend=owed, scale=scale)
        if not _is_finite(block):  # inf and nan are the largest magnitudes: they were selected
            signals = dataclasses.replace(signals, nonfinite=True)
        writer = codec.codec_for(k, self._value_bits)
        payload = writer.encode(
            block, step=step, bucket=bucket, rank=self._exchange.rank, signals=signals
        )
        try:
            headers, peers = self._swap(writer, payload, layout)
        except Exception:
            if residual is not None and not signals.nonfinite:
                residual.keep(vector, scale)
            raise
        if any(header.signals.nonfinite for header in headers):
            vector.fill_(float("nan"))
        else:
            own = _flat(block, *writer.sent_values(block))
            if residual is not None:
                residual.commit(vector, *own, scale=scale)
            _sum_into(
                vector,
                [own if peer is None else _flat(peer, peer.values, peer.dense) for peer in peers],
            )
            if residual is not None and vector.dtype is torch.float16 and not _is_finite(vector):
                residual.put_back(*own, scale=scale)
        self._busy_s += self._clock() - start_s
        return headers

    def reduce_dense(
        self, vector: torch.Tensor, *, bucket: int, nonfinite: bool, scale: float = 1.0
    ) -> None:
        """Replace `vector` by its plain sum over ranks, paying off what the residual owes.

        Args:
            vector: (numel,) any floating dtype; changed in place.
            bucket: index of the bucket inside the step.
            nonfinite: some rank's gradient is not finite: the residual is left alone.
            scale: loss scale of `vector`.

        Raises:
            TransportError: the exchange failed; the residual still holds what it held, but this
                step's gradient is lost with the step, as it is in DeepSpeed's own path.

        Collective: all ranks, same order; `nonfinite` must be agreed.
        """
        start_s = self._clock()
        residual = self.residuals.of(bucket, vector) if self._error_feedback else None
        pays = residual is not None and not residual.is_zero and not nonfinite
        if residual is not None and pays:
            residual.add_to(vector, scale)
        self._exchange.all_reduce(vector)
        if residual is not None and pays:
            residual.clear()
        self._busy_s += self._clock() - start_s

    def trade(
        self,
        vector: torch.Tensor,
        layout: BucketLayout,
        k: int,
        *,
        minus: torch.Tensor,
        step: int,
        bucket: int,
        signals: RankSignals,
    ) -> Trade:
        """Exchange the largest elements of `vector - minus`; add nothing up, keep no residual.

        For a caller that holds what was not sent itself. Neither tensor is changed.

        Args:
            vector: (layout.numel,) fp32.
            layout: what lies where in it.
            k: kept elements per full chunk, 1 .. CHUNK_NUMEL.
            minus: (layout.numel,) fp32, on the same device.
            step: optimizer step, counted from 1.
            bucket: index of the bucket inside the step.
            signals: this rank's measurements, for the header.

        Raises:
            TransportError, WireFormatError, RankMismatchError: as `reduce`.

        Collective: all ranks, same order.
        """
        start_s = self._clock()
        block = sparsify.select(vector, layout, k, addend=minus, scale=-1.0)
        if not _is_finite(block):
            signals = dataclasses.replace(signals, nonfinite=True)
        writer = codec.codec_for(k, self._value_bits)
        payload = writer.encode(
            block, step=step, bucket=bucket, rank=self._exchange.rank, signals=signals
        )
        headers, peers = self._swap(writer, payload, layout)
        parts: list[Part] = []
        if not any(header.signals.nonfinite for header in headers):
            own = _flat(block, *writer.sent_values(block))
            parts = [
                own if peer is None else _flat(peer, peer.values, peer.dense) for peer in peers
            ]
        self._busy_s += self._clock() - start_s
        return Trade(headers, parts)

    def share_signals(self, step: int, signals: RankSignals) -> list[codec.Header]:
        """Exchange headers alone, for a step whose gradients go the dense way.

        Raises:
            TransportError, WireFormatError, RankMismatchError: as `reduce`.

        Collective: all ranks, same order.
        """
        start_s = self._clock()
        payload = codec.encode_signals(step=step, rank=self._exchange.rank, signals=signals)
        headers = [codec.read_header(row) for row in self._exchange.gather(payload)]
        _check_agreement(headers)
        self._busy_s += self._clock() - start_s
        return headers

    def _swap(
        self, writer: codec.Codec, payload: torch.Tensor, layout: BucketLayout
    ) -> tuple[list[codec.Header], list[SparseBlock | None]]:
        """Exchange payloads; all headers and the peers' blocks, None in our own place."""
        rows = self._exchange.gather(payload)
        headers = [codec.read_header(row) for row in rows]
        _check_agreement(headers)
        blocks = [
            None if rank == self._exchange.rank else writer.read_body(headers[rank], row, layout)
            for rank, row in enumerate(rows)
        ]
        return headers, blocks

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count what a caller does beside an exchange as codec time. Local."""
        start_s = self._clock()
        yield
        self._busy_s += self._clock() - start_s

    def take_costs(self) -> Costs:
        """What has been spent since the last call. Local."""
        traffic = self._exchange.take_traffic()
        busy_s, self._busy_s = self._busy_s, 0.0
        return Costs(max(0.0, busy_s - traffic.comm_time_s), traffic)


def _sum_into(vector: torch.Tensor, parts: list[Part]) -> None:
    """Add all ranks' elements in rank order; positions of one rank are distinct, so no race."""
    vector.zero_()
    for positions, values in parts:
        vector.index_add_(0, positions.to(vector.device), values.to(vector))


def _is_finite(data: SparseBlock | torch.Tensor) -> bool:
    """No inf, no nan."""
    if isinstance(data, SparseBlock):
        return _is_finite(data.values) and _is_finite(data.dense)
    if not data.numel():
        return True
    low, high = torch.aminmax(data)  # no copy; nan wins in both
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _flat(
    block: SparseBlock, values: torch.Tensor, dense: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in the bucket and values of everything `block` carries."""
    positions = sparsify.kept_positions(block.layout, block.k, block.indices)
    if not dense.numel():
        return positions, values
    dense_at = sparsify.dense_positions(block.layout).to(positions.device)
    return torch.cat((positions, dense_at)), torch.cat((values, dense))


def _check_agreement(headers: list[codec.Header]) -> None:
    """Every rank must be in the same step with the same history, and sit in its own row."""
    seen = [(h.step, h.bucket, h.k, h.codec_id, h.signals.agreement) for h in headers]
    if any(entry != seen[0] for entry in seen) or any(h.rank != r for r, h in enumerate(headers)):
        listed = "; ".join(
            f"rank {h.rank}: step {h.step}, bucket {h.bucket}, k {h.k} of {CHUNK_NUMEL}, "
            f"history {h.signals.agreement:08x}"
            for h in headers
        )
        raise RankMismatchError(
            f"ranks no longer agree on their decisions or parameters: {listed}. Restart from the "
            "last checkpoint; if it happens again, compare versions and configuration of the hosts."
        )
