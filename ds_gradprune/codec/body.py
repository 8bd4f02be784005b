"""A block written into the body of a payload and read from it. `header` draws the payload.

Where the kept elements lie is written by `places`, in the fewest bits for the layout and k; what
differs between codecs is how values are written. Local functions only.
"""

from __future__ import annotations

import numpy as np
import torch

from ds_gradprune.bucket.block import SparseBlock, check_block, empty_block
from ds_gradprune.bucket.layout import BucketLayout
from ds_gradprune.codec import device
from ds_gradprune.codec.header import HEADER_BYTES, Bytes, Header, seal
from ds_gradprune.codec.places import check_places, places_bytes, read_places, write_places
from ds_gradprune.codec.values import ValueFormat
from ds_gradprune.errors import WireFormatError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.native import accelerator


class Codec:
    """One way to write a block into the body of a payload. Stateless.

    Args:
        codec_id: 1 .. 255, never given to another format once released.
        values: how the kept values are written.
        dense: how the values of dense segments are written; None: as the kept ones.
    """

    def __init__(
        self, codec_id: int, values: ValueFormat, dense: ValueFormat | None = None
    ) -> None:
        self.codec_id = codec_id
        self.values = values
        self.dense = dense or values

    @property
    def name(self) -> str:
        """Short name for logs and file names."""
        return self.values.name

    def payload_bytes(self, layout: BucketLayout, k: int) -> int:
        """Size of every payload of this codec for this layout and k, header included.

        A multiple of 4, so that payloads may follow each other without a gap.
        """
        places_end = self._cuts(layout, k)[2]
        return places_end + -places_end % 4

    def _cuts(self, layout: BucketLayout, k: int) -> tuple[int, int, int]:
        """Where values, dense values and places end in a payload; the rest is padding."""
        values_end = HEADER_BYTES + self.values.nbytes(layout.num_kept(k))
        dense_end = values_end + self.dense.nbytes(layout.dense_numel)
        return values_end, dense_end, dense_end + places_bytes(layout, k)

    def encode(
        self,
        block: SparseBlock,
        *,
        step: int,
        bucket: int,
        rank: int,
        signals: RankSignals,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write a block into a payload.

        What receivers will read is read from the payload itself, with `read_body`.

        Args:
            block: what to send. An accelerator with Triton writes the body itself, and that alone
                is copied to the host; another one's block is copied first. Indices are checked on
                the host only.
            step: optimizer step, 0 .. 2**32 - 1.
            bucket: index of the bucket, 0 .. 65535.
            rank: this rank, 0 .. 65535.
            signals: what this rank measured. Receivers refuse inf and nan in the block unless
                `nonfinite` is set. `written` does not travel here, see `encode_signals`.
            out: (payload_bytes,) uint8, CPU, contiguous, at any address, such as a slice of a
                larger message; overwritten. None: a new one.

        Returns:
            `out`, or the new tensor.

        Raises:
            ValueError: the block, a number or `out` is not as said above.
        """
        check_block(block)
        layout, k = block.layout, block.k
        size = self.payload_bytes(layout, k)
        if out is None:
            out = torch.empty(size, dtype=torch.uint8)
        elif out.shape != (size,) or out.dtype is not torch.uint8 or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous uint8 of shape ({size},), got {out.dtype} of shape "
                f"{tuple(out.shape)}."
            )
        payload: Bytes = out.numpy()
        cuts = self._cuts(layout, k)
        values_end, dense_end, places_end = cuts
        if accelerator.is_on(block.device):
            formats = self.values, self.dense
            out.copy_(device.write_body(block, formats, (HEADER_BYTES, *cuts), size))
        else:
            self.values.write(block.values.cpu(), payload[HEADER_BYTES:values_end])
            self.dense.write(block.dense.cpu(), payload[values_end:dense_end])
            write_places(layout, k, block.indices.cpu().numpy(), payload[dense_end:places_end])
            payload[places_end:] = 0
        header = Header(step, bucket, rank, self.codec_id, k, layout.numel, layout.crc, signals)
        seal(header, payload)
        return out

    def check(self, header: Header, payload: torch.Tensor, layout: BucketLayout) -> None:
        """Find everything that may be wrong with a body; nothing of it is kept.

        After it, `read_body` of the same bytes does not fail.

        Args:
            header: what `read_header` made of `payload`.
            payload: 1-D uint8, CPU; arbitrary bytes after the header.
            layout: the layout that the receiver expects.

        Raises:
            WireFormatError: the body is not one of this codec for this layout, or it holds inf or
                nan and the header does not say so.
        """
        data = self._body(header, payload, layout)
        _, dense_end, places_end = self._cuts(layout, header.k)
        self._check_values(header, data, layout)
        check_places(layout, header.k, data[dense_end:places_end])

    def read_body(
        self,
        header: Header,
        payload: torch.Tensor,
        layout: BucketLayout,
        out: SparseBlock | None = None,
        checked: bool = False,
    ) -> SparseBlock:
        """Read a body.

        Args:
            header: what `read_header` made of `payload`.
            payload: 1-D uint8, CPU; arbitrary bytes after the header.
            layout: the layout that the receiver expects.
            out: a block of this layout and the header's k, as `Scratch` gives it, overwritten,
                after an error with anything. None: a new one on the CPU.
            checked: `check` has accepted these bytes: values are not looked at twice.

        Returns:
            `out`, or the new block; values in float32.

        Raises:
            WireFormatError: as `check`.
            ValueError: `out` is not as said above.
        """
        data, k = self._body(header, payload, layout), header.k
        if out is None:
            out = empty_block(layout, k)
        elif out.layout is not layout or out.k != k:
            raise ValueError(
                f"out must be a block of {layout} at k = {k}, got {out.layout} at k = {out.k}."
            )
        check_block(out, "out")
        if not checked:
            self._check_values(header, data, layout)
        cuts = self._cuts(layout, k)
        values_end, dense_end, places_end = cuts
        if accelerator.is_on(out.device):
            if not checked:
                check_places(layout, k, data[dense_end:places_end])
            there = torch.from_numpy(data).to(out.device)
            device.read_body(there, (self.values, self.dense), (HEADER_BYTES, *cuts), out)
            return out
        host = out if out.device.type == "cpu" else empty_block(layout, k)
        self.values.read(data[HEADER_BYTES:values_end], host.values)
        self.dense.read(data[values_end:dense_end], host.dense)
        read_places(layout, k, data[dense_end:places_end], host.indices.numpy())
        if host is not out:
            out.values.copy_(host.values)
            out.dense.copy_(host.dense)
            out.indices.copy_(host.indices)
        return out

    def _check_values(self, header: Header, data: Bytes, layout: BucketLayout) -> None:
        values_end, dense_end, _ = self._cuts(layout, header.k)
        finite = not header.signals.nonfinite
        kept = layout.num_kept(header.k)
        self.values.check(data[HEADER_BYTES:values_end], kept, finite=finite)
        self.dense.check(data[values_end:dense_end], layout.dense_numel, finite=finite)

    def _body(self, header: Header, payload: torch.Tensor, layout: BucketLayout) -> Bytes:
        """The payload's bytes, if header, size and padding are those of this codec and layout."""
        if header.codec_id != self.codec_id:
            raise WireFormatError(
                f"payload's codec id must be {self.codec_id} ({self.name}), got {header.codec_id}."
            )
        if header.numel != layout.numel or header.layout_crc != layout.crc:
            raise WireFormatError(
                f"payload's layout must be this rank's ({layout.numel} elements, crc "
                f"{layout.crc:08x}), got {header.numel} elements, crc {header.layout_crc:08x}. Do "
                "all ranks run the same model and configuration?"
            )
        size = self.payload_bytes(layout, header.k)
        if payload.numel() != size:
            raise WireFormatError(
                f"payload must have {size} bytes with codec {self.name} at k = {header.k}, got "
                f"{payload.numel()}."
            )
        data: Bytes = np.ascontiguousarray(payload.numpy())
        if data[self._cuts(layout, header.k)[2] :].any():
            raise WireFormatError("payload's padding must be zeros.")
        return data
