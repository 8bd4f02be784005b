"""A GPT whose weights may differ from worker to worker: all workers in one pass.

Weights are rows of one matrix, (workers, numel); a linear layer is one batched product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from labs.convergence.grid import Model
from labs.convergence.recorded import Recorded


class Gpt:
    """The shape and the arithmetic; weights are given to every call.

    Pre-norm, tied embeddings, GELU, gains but no biases (Radford et al. 2019 without biases).

    Args:
        shape: layers, heads, width, context.
        vocab_size: rows of the embedding.

    Attributes:
        shapes: of all tensors, in the order they lie in a row.
        numel: elements of a row.
    """

    def __init__(self, shape: Model, vocab_size: int) -> None:
        self.shape = shape
        self.vocab_size = vocab_size
        width = shape.n_embd
        self.shapes: list[torch.Size] = [
            torch.Size((vocab_size, width)),
            torch.Size((shape.context, width)),
        ]
        for _ in range(shape.n_layer):
            block = [(width,), (width, 3 * width), (width, width)]
            block += [(width,), (width, 4 * width), (4 * width, width)]
            self.shapes += [torch.Size(s) for s in block]
        self.shapes.append(torch.Size((width,)))
        self.numel = sum(s.numel() for s in self.shapes)

    def initial(self, seed: int) -> torch.Tensor:
        """(numel,) weights: normal, projections into the residual stream smaller, gains 1."""
        generator = torch.Generator().manual_seed(seed)
        std = 0.02 * math.sqrt(768 / self.shape.n_embd)
        parts = []
        for index, size in enumerate(self.shapes):
            if len(size) == 1:
                parts.append(torch.ones(size))
                continue
            into_stream = index >= 2 and (index - 2) % 6 in (2, 5)
            factor = 1 / math.sqrt(2 * self.shape.n_layer) if into_stream else 1.0
            parts.append(torch.randn(size, generator=generator).view(-1) * std * factor)
        return torch.cat(parts)

    def views(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The tensors inside (workers, numel) rows, each (workers, *shape), without copying."""
        views, offset = [], 0
        for size in self.shapes:
            part = rows[:, offset : offset + size.numel()]
            views.append(part.unflatten(1, size))
            offset += size.numel()
        return views

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """(w, m, k) times (w, k, n), as the shape's `matmul` says."""
        return torch.bmm(left, right) if self.shape.matmul == "fp32" else _bmm_bf16(left, right)

    def losses(self, weights: list[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of every worker, nats per token.

        Args:
            weights: as `views` gives them.
            tokens: (workers, batch, context + 1).

        Returns:
            (workers,).
        """
        multiply = self.product
        workers, batch, length = tokens.shape
        context, width, heads = length - 1, self.shape.n_embd, self.shape.n_head
        table, places, *rest = weights
        shift = torch.arange(workers, device=tokens.device)[:, None, None] * self.vocab_size
        stream = F.embedding(tokens[..., :-1] + shift, table.flatten(0, 1))
        stream = (stream + places[:, None, :context]).view(workers, batch * context, width)
        for at in range(0, len(rest) - 1, 6):
            gain, qkv, out, gain_2, up, down = rest[at : at + 6]
            parts = multiply(_norm(stream, gain), qkv)
            parts = parts.view(workers * batch, context, 3, heads, width // heads)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            mixed = mixed.transpose(1, 2).reshape(workers, batch * context, width)
            stream = stream + multiply(mixed, out)
            hidden = F.gelu(multiply(_norm(stream, gain_2), up), approximate="tanh")
            stream = stream + multiply(hidden, down)
        logits = multiply(_norm(stream, rest[-1]), table.transpose(1, 2))
        targets = tokens[..., 1:].reshape(-1)
        nats = F.cross_entropy(logits.view(-1, self.vocab_size), targets, reduction="none")
        return nats.view(workers, -1).mean(1)


HAS_BF16_PRODUCTS = "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Of the processor. Without AVX-512 PyTorch multiplies bf16 matrices eighty times slower than fp32
ones."""


class _BmmBfloat16(torch.autograd.Function):
    """A batched product of bfloat16 factors, there and back; everything around it stays fp32.

    Where a processor has no such product the rounded factors are multiplied as fp32 and the
    result is rounded: the same but for the order in which fp32 sums are added up.
    """

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """(w, m, k) times (w, k, n), both rounded."""
        left, right = rounded(left), rounded(right)
        ctx.save_for_backward(left, right)
        return _product(left, right)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slopes of both factors."""
        left, right = ctx.saved_tensors
        slope = rounded(slope)
        return (
            _product(slope, right.transpose(1, 2)),
            _product(left.transpose(1, 2), slope),
        )


def rounded(values: torch.Tensor) -> torch.Tensor:
    """A factor of a bf16 product, in the dtype that the processor multiplies it in."""
    factor = values.bfloat16()
    return factor if factor.is_cuda or HAS_BF16_PRODUCTS else factor.float()


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    product = torch.bmm(left, right)
    return product.bfloat16().float()  # a bf16 product is one already


def _bmm_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _BmmBfloat16.apply(left, right)
    return product


def _norm(stream: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(stream, stream.shape[-1:]) * gain[:, None]


class Gradients:
    """Loss and gradient of all workers, written into one matrix that is reused.

    On an accelerator the pass is recorded once, as a CUDA graph, and replayed: a small model's
    pass is some hundred kernels of microseconds, which Python could not start as fast.

    Args:
        gpt: the model.
        workers: rows.
        device: where the rows are.

    Attributes:
        weights: (workers, numel); the caller writes it.
        gradient: (workers, numel) of the last call.
    """

    def __init__(self, gpt: Gpt, workers: int, device: str = "cpu") -> None:
        self._gpt = gpt
        self.weights = torch.zeros(workers, gpt.numel, device=device)
        self.gradient = torch.zeros(workers, gpt.numel, device=device)
        self._recorded: Recorded | None = None
        self._leaves = [view.detach().requires_grad_() for view in gpt.views(self.weights)]
        self._parts = gpt.views(self.gradient)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Fill `gradient` with every worker's own; (workers,) losses."""
        if not tokens.is_cuda:
            return self._fill(tokens)
        if self._recorded is None:
            self._recorded = Recorded(self._fill, tokens)
        return self._recorded(tokens)

    def _fill(self, tokens: torch.Tensor) -> torch.Tensor:
        losses = self._gpt.losses(self._leaves, tokens)
        for part, grad in zip(
            self._parts, torch.autograd.grad(losses.sum(), self._leaves), strict=True
        ):
            part.copy_(grad)
        return losses.detach()


@torch.no_grad()
def validation_loss(gpt: Gpt, weights: torch.Tensor, sequences: torch.Tensor) -> float:
    """Mean loss of (numel,) weights over (n, context + 1) sequences, nats per token."""
    views = gpt.views(weights[None])
    total = 0.0
    for rows in sequences.split(1024 if sequences.is_cuda else 64):
        total += float(gpt.losses(views, rows[None])) * len(rows)
    return total / len(sequences)
