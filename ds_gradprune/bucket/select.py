"""Which elements of a flat vector are kept: the largest of every row, exactly.

Knows nothing of bytes, ranks and residuals. All functions are local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import torch

from ds_gradprune.bucket import select_device
from ds_gradprune.bucket.block import SparseBlock, check_block, empty_block
from ds_gradprune.bucket.dispatch import addresses, kernels_on, tables, threads
from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout, Run
from ds_gradprune.bucket.topk_cpu import CpuTopK
from ds_gradprune.bucket.topk_torch import top_k
from ds_gradprune.native import accelerator
from ds_gradprune.native.library import Floats, Kernels

Vector = torch.Tensor | Sequence[torch.Tensor]
"""One (numel,) tensor, or one 1-D contiguous fp32 tensor per segment."""

_CPU_BLOCK_ROWS = 64
"""Rows worked on at a time: two scratch arrays of 1 MiB stay in or near a core's L2 cache."""

_DEVICE_BLOCK_ROWS = 1024
"""The same on an accelerator: large enough to fill it, small beside a model."""

_Pick = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class _Sums(TypedDict):
    """Of t = (x + a * y) + b * z what two kernels are told alike."""

    y: Floats | None
    a: float
    z: Floats | None
    b: float
    dtype: str
    threads: int


@torch.no_grad()
def select(
    vector: Vector,
    layout: BucketLayout,
    k: int,
    *,
    plus: torch.Tensor | None = None,
    plus_scale: float = 1.0,
    more: torch.Tensor | None = None,
    more_scale: float = 1.0,
    out: SparseBlock | None = None,
) -> SparseBlock:
    """Keep the k largest magnitudes of every row of t.

    ::

        t = (vector + plus_scale * plus) + more_scale * more

    Every product and every sum is rounded to float32. t exists in blocks of rows only, and the
    inputs are not changed. No dropped element of a row is larger in magnitude than a kept one; of
    equal magnitudes (0.0 and -0.0 are equal) the lowest index is kept. Infinities and NaN count as
    larger than every number, so a row that holds some has some picked.

    Args:
        vector: (layout.numel,) float32, bfloat16 or float16, contiguous; or a sequence of float32
            tensors, one per segment, (segment.numel,) and contiguous.
        layout: the bucket's layout.
        k: kept elements per full row, 1 .. CHUNK_NUMEL; a row of n < CHUNK_NUMEL elements keeps
            ceil(k * n / CHUNK_NUMEL).
        plus: (layout.numel,) float32, contiguous, on the same device; None: nothing is added.
        plus_scale: factor of `plus`; powers of two cost no rounding.
        more: as `plus`.
        more_scale: factor of `more`.
        out: a block of this layout and k on the same device, overwritten, so that nothing of the
            bucket's size is allocated; None: a new one.

    Returns:
        `out`, or the new block; dense segments hold all of t.

    Raises:
        ValueError: k, a shape, a dtype or a device is not as said above.

    References:
        Chunk-wise selection: Peng et al., "DeMo: Decoupled Momentum Optimization", 2024,
        arXiv 2411.19870, section 3; here without a transform.
    """
    source = _Source(vector, layout, ((plus, plus_scale, "plus"), (more, more_scale, "more")))
    if out is None:
        out = empty_block(layout, k, source.device)
    elif out.layout is not layout or out.k != k or out.device != source.device:
        raise ValueError(
            f"out must be a block of {layout} at k = {k} on {source.device}, got {out.layout} at "
            f"k = {out.k} on {out.device}."
        )
    check_block(out, "out")
    native = kernels_on(source.device)
    if accelerator.is_on(source.device):
        select_device.select(source.parts, source.terms, out, whole=source.is_whole)
    elif native is not None:
        source.select(native, out)
    else:
        _reference(source, out)
    return out


def _reference(source: _Source, out: SparseBlock) -> None:
    """`select` in torch and numpy, where no kernels are."""
    runs = out.layout.runs(out.k)
    _take_dense(source, out)
    for run in runs:
        if run.row_kept == run.row_numel:
            _keep_all(run, source, out)
    _prune([run for run in runs if run.row_kept < run.row_numel], source, out)


class _Source:
    """t, computed where it is asked for; see `select`.

    Args:
        vector: see `select`.
        layout: the bucket's layout.
        terms: addends, their factors and their names; None: no such addend.
    """

    def __init__(
        self,
        vector: Vector,
        layout: BucketLayout,
        terms: Sequence[tuple[torch.Tensor | None, float, str]],
    ) -> None:
        self.layout = layout
        self.is_whole = isinstance(vector, torch.Tensor)
        parts = [vector] if isinstance(vector, torch.Tensor) else vector
        self.parts = [part.detach() for part in parts]
        self.device = self._check_vector()
        self.terms: list[tuple[torch.Tensor, float]] = []
        for tensor, scale, name in terms:
            if tensor is not None:
                self._check_term(tensor, name)
                self.terms.append((tensor.detach(), scale))
        self.block_rows = _CPU_BLOCK_ROWS if self.device.type == "cpu" else _DEVICE_BLOCK_ROWS
        self._product = torch.empty(0)

    def select(self, native: Kernels, out: SparseBlock) -> None:
        """Fill `out` by the kernels; everything is on the CPU."""
        rows, pieces, row_segments, piece_segments = tables(self.layout, out.k)
        terms = [(tensor.numpy(), scale) for tensor, scale in self.terms]
        (y, a), (z, b) = [*terms, (None, 1.0), (None, 1.0)][:2]
        dtype = str(self.parts[0].dtype).removeprefix("torch.") if self.parts else "float32"
        sums: _Sums = {"y": y, "a": a, "z": z, "b": b, "dtype": dtype, "threads": threads()}
        at = addresses(self.parts, self.layout, pieces, piece_segments)
        native.load(pieces, at, out.dense.numpy(), **sums)
        at = addresses(self.parts, self.layout, rows, row_segments)
        native.select(rows, at, out.indices.numpy(), out.values.numpy(), **sums)

    def load(self, segment: int, start: int, out: torch.Tensor) -> None:
        """Write t[start : start + out.numel()] into `out`, float32, contiguous.

        Args:
            segment: the segment in which the elements lie.
            start: first element, counted from the start of the bucket.
            out: receives them.
        """
        span = self.block_rows * CHUNK_NUMEL
        for first in range(0, out.numel(), span):
            self._load(segment, start + first, out[first : first + span])

    def _load(self, segment: int, start: int, out: torch.Tensor) -> None:
        numel = out.numel()
        if self.is_whole:
            filled = self.parts[0][start : start + numel]
        else:
            inside = start - self.layout.segments[segment].offset
            filled = self.parts[segment][inside : inside + numel]
        for tensor, scale in self.terms:
            term = tensor[start : start + numel]
            if scale not in (1.0, -1.0):
                term = torch.mul(term, scale, out=self._room(numel))
            # Not alpha: whether that is one rounding or two depends on the processor.
            if filled.dtype is not torch.float32:
                filled = out.copy_(filled)
            filled = (torch.sub if scale == -1.0 else torch.add)(filled, term, out=out)
        if filled is not out:
            out.copy_(filled)

    def _room(self, numel: int) -> torch.Tensor:
        if self._product.numel() < numel:
            self._product = torch.empty(numel, dtype=torch.float32, device=self.device)
        return self._product[:numel]

    def _check_vector(self) -> torch.device:
        sizes = [self.layout.numel]
        allowed: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
        if not self.is_whole:
            sizes = [segment.numel for segment in self.layout.segments]
            allowed = (torch.float32,)
            if len(self.parts) != len(sizes):
                raise ValueError(
                    f"vector must have one tensor for each of {len(sizes)} segments, got "
                    f"{len(self.parts)}."
                )
        device = self.parts[0].device if self.parts else torch.device("cpu")
        for number, (part, numel) in enumerate(zip(self.parts, sizes, strict=True)):
            name = "vector" if self.is_whole else f"vector[{number}]"
            if part.shape != (numel,) or not part.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous with shape ({numel},), got {tuple(part.shape)}."
                )
            if part.dtype not in allowed:
                names = " or ".join(str(dtype) for dtype in allowed)
                raise ValueError(f"{name} must be {names}, got {part.dtype}.")
            if part.device != device:
                raise ValueError(f"{name} must be on {device}, got {part.device}.")
        return device

    def _check_term(self, tensor: torch.Tensor, name: str) -> None:
        numel = self.layout.numel
        if tensor.shape != (numel,) or tensor.dtype is not torch.float32:
            raise ValueError(
                f"{name} must be float32 with shape ({numel},), got {tensor.dtype} "
                f"{tuple(tensor.shape)}."
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous.")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, got {tensor.device}.")


def _take_dense(source: _Source, block: SparseBlock) -> None:
    """Dense segments: every element is kept."""
    filled = 0
    for number, segment in enumerate(source.layout.segments):
        if not segment.pruned:
            stop = filled + segment.numel
            source.load(number, segment.offset, block.dense[filled:stop])
            filled = stop


def _keep_all(run: Run, source: _Source, block: SparseBlock) -> None:
    """Rows of which every element is kept: a copy."""
    kept = slice(run.kept_start, run.kept_stop)
    source.load(run.segment, run.bucket_start, block.values[kept])
    order = torch.arange(run.row_numel, dtype=torch.int16, device=block.device)
    block.indices[kept].view(run.num_rows, run.row_numel).copy_(order)


def _prune(runs: Sequence[Run], source: _Source, block: SparseBlock) -> None:
    """Fill scratch memory with rows of equal length and pick from it, block after block."""
    if not runs:
        return
    most = min(source.block_rows, sum(run.num_rows for run in runs)) * CHUNK_NUMEL
    scratch = torch.empty(most, dtype=torch.float32, device=block.device)
    pick: _Pick = CpuTopK(most) if block.device.type == "cpu" else top_k
    for pieces in _blocks(runs, source.block_rows):
        row_numel, row_kept = pieces[0].row_numel, pieces[0].row_kept
        filled = 0
        for piece in pieces:
            stop = filled + piece.num_rows * row_numel
            source.load(piece.segment, piece.bucket_start, scratch[filled:stop])
            filled = stop
        kept = slice(pieces[0].kept_start, pieces[-1].kept_stop)
        pick(
            scratch[:filled].view(-1, row_numel),
            block.indices[kept].view(-1, row_kept),
            block.values[kept].view(-1, row_kept),
        )


def _blocks(runs: Sequence[Run], block_rows: int) -> Iterator[list[Run]]:
    """Cut runs into blocks of at most `block_rows` rows of one length.

    A block may gather rows from several segments; its kept elements lie together.
    """
    block: list[Run] = []
    room = block_rows
    for run in runs:
        if block and (block[-1].kept_stop, block[-1].row_numel) != (run.kept_start, run.row_numel):
            yield block
            block, room = [], block_rows
        start = 0
        while start < run.num_rows:
            stop = min(run.num_rows, start + room)
            block.append(run.rows(start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield block
                block, room = [], block_rows
    if block:
        yield block
