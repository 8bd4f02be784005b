"""A block written into the body of a payload and read from it. `base` draws the payload.

Where the kept elements lie is written by `places`, in the fewest bits for the layout and k; what
differs between codecs is how values are written. Local functions only.
"""

from __future__ import annotations

import torch

from ds_gradprune.codec.base import HEADER_BYTES, Bytes, Header, layout_crc, parse, seal
from ds_gradprune.codec.places import places_bytes, read_places, write_places
from ds_gradprune.codec.values import ValueFormat
from ds_gradprune.errors import WireFormatError
from ds_gradprune.records import BucketLayout, RankSignals, SparseBlock
from ds_gradprune.rows import num_kept


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
        """Size of every payload of this codec for this layout and k, header included."""
        places_end = self._cuts(layout, k)[2]
        return places_end + -places_end % 4

    def _cuts(self, layout: BucketLayout, k: int) -> tuple[int, int, int]:
        """Where values, dense values and places end in a payload; the rest is padding."""
        values_end = HEADER_BYTES + self.values.nbytes(num_kept(layout, k))
        dense_end = values_end + self.dense.nbytes(layout.dense_numel)
        return values_end, dense_end, dense_end + places_bytes(layout, k)

    def sent_values(self, block: SparseBlock) -> tuple[torch.Tensor, torch.Tensor]:
        """`block.values` and `block.dense` as float32, exactly as every receiver decodes them.

        Aliasing: may be the block's own tensors.
        """
        return self.values.rounded(block.values), self.dense.rounded(block.dense)

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

        Args:
            block: what to send.
            step: optimizer step, 0 .. 2**32 - 1.
            bucket: index of the bucket, 0 .. 65535.
            rank: this rank, 0 .. 65535.
            signals: what this rank measured.
            out: (payload_bytes,) uint8, CPU, contiguous, overwritten; None: a new one.

        Returns:
            `out`, or the new tensor.

        Raises:
            ValueError: the block, a number or `out` is not as said above.
        """
        layout, k = block.layout, block.k
        _check_shapes(block)
        size = self.payload_bytes(layout, k)
        if out is None:
            out = torch.empty(size, dtype=torch.uint8)
        elif out.shape != (size,) or out.dtype is not torch.uint8 or not out.is_contiguous():
            raise ValueError(f"out must be contiguous uint8 of shape ({size},), got {out.shape}.")
        payload: Bytes = out.numpy()
        values_end, dense_end, places_end = self._cuts(layout, k)
        self.values.write(block.values, payload[HEADER_BYTES:values_end])
        self.dense.write(block.dense, payload[values_end:dense_end])
        write_places(layout, k, block.indices.cpu().numpy(), payload[dense_end:places_end])
        payload[places_end:] = 0
        header = Header(
            step, bucket, rank, self.codec_id, k, layout.numel, layout_crc(layout), signals
        )
        seal(header, payload)
        return out

    def decode(self, payload: torch.Tensor, layout: BucketLayout) -> tuple[Header, SparseBlock]:
        """Read a payload of this codec.

        Args:
            payload: 1-D uint8, CPU; arbitrary bytes.
            layout: the layout that the receiver expects.

        Returns:
            The header and the block; new tensors, values in float32.

        Raises:
            WireFormatError: it is not a whole, undamaged payload of this codec for this layout.
        """
        header = parse(payload)
        if header.codec_id != self.codec_id:
            raise WireFormatError(
                f"payload's codec id must be {self.codec_id} ({self.name}), got {header.codec_id}."
            )
        return header, self.read_body(header, payload, layout)

    def read_body(self, header: Header, payload: torch.Tensor, layout: BucketLayout) -> SparseBlock:
        """The second half of `decode`: `header` is what `parse` made of `payload`."""
        if header.numel != layout.numel or header.layout_crc != layout_crc(layout):
            raise WireFormatError(
                f"payload's layout must be this rank's ({layout.numel} elements, crc "
                f"{layout_crc(layout):08x}), got {header.numel} elements, crc "
                f"{header.layout_crc:08x}. Do all ranks run the same model and configuration?"
            )
        k = header.k
        if payload.numel() != self.payload_bytes(layout, k):
            raise WireFormatError(
                f"payload must have {self.payload_bytes(layout, k)} bytes with codec {self.name} "
                f"at k = {k}, got {payload.numel()}."
            )
        values_end, dense_end, places_end = self._cuts(layout, k)
        data: Bytes = payload.contiguous().numpy()
        if data[places_end:].any():
            raise WireFormatError("payload's padding must be zeros.")
        return SparseBlock(
            layout,
            k,
            indices=torch.from_numpy(read_places(layout, k, data[dense_end:places_end])),
            values=self.values.read(data[HEADER_BYTES:values_end], num_kept(layout, k)),
            dense=self.dense.read(data[values_end:dense_end], layout.dense_numel),
        )


def _check_shapes(block: SparseBlock) -> None:
    kept = num_kept(block.layout, block.k)
    for name, tensor, numel, dtype in (
        ("indices", block.indices, kept, torch.int16),
        ("values", block.values, kept, torch.float32),
        ("dense", block.dense, block.layout.dense_numel, torch.float32),
    ):
        if tensor.shape != (numel,) or tensor.dtype is not dtype:
            raise ValueError(
                f"block.{name} must be {dtype} of shape ({numel},) at k = {block.k}, got "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}."
            )
