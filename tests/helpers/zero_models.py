"""Models and optimizers with what people add to a training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.shard_bench import VOCAB, WIDTH, Odd
from tests.helpers.zero_bench import SGD_LR


class Rich(Odd):
    """Tied weights, a layer without use, activations that are computed twice, an adapter."""

    def __init__(self, *, trains_all: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(WIDTH, 7)
        self.low = nn.Linear(WIDTH, 8, bias=False)
        self.high = nn.Linear(8, WIDTH, bias=False)
        if not trains_all:
            self.requires_grad_(False)
            self.low.requires_grad_(True)
            self.high.requires_grad_(True)

    def _middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(hidden))) + self.high(self.low(hidden))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens[:, :-1]) * self.gain
        middle: Any = checkpoint(self._middle, hidden, use_reentrant=False)
        logits = self.head(self.norm(hidden + middle + self.frozen(hidden)))
        return nn.functional.cross_entropy(
            logits.float().reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)
        )


def rich(*, trains_all: bool = True) -> Rich:
    torch.manual_seed(3)
    return Rich(trains_all=trains_all)


class Few(Odd):
    """So little is trained that one rank of an island has nothing to exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.gain.requires_grad_(True)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv 2302.06675, as a client's optimizer."""

    def __init__(self, params: Any, lr: float = 2e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    mean = state.setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(torch.lerp(p.grad, mean, 0.9).sign(), alpha=group["lr"])
                    mean.lerp_(p.grad, 0.01)


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices and the rest, with different rates."""
    trained = [p for p in model.parameters() if p.requires_grad]
    shapes = [len(getattr(p, "ds_shape", p.shape)) for p in trained]
    return [
        {"params": [p for p, dims in zip(trained, shapes, strict=True) if dims > 1]},
        {
            "params": [p for p, dims in zip(trained, shapes, strict=True) if dims < 2],
            "lr": 2 * SGD_LR,
        },
    ]
