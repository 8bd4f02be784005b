"""A pre-trained Llama whose weights may differ from worker to worker: all workers in one pass.

The same protocol as `labs.convergence.gpt.Gpt`. Either all weights are trained, or LoRA adapters of
every linear layer (Hu et al. 2021, arXiv 2106.09685) beside frozen weights that all workers share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from labs.convergence.gpt import Gpt, rounded
from labs.convergence.grid import Model

LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
RANK, ALPHA = 16, 32
"""Of LoRA."""


class Llama(Gpt):
    """The shape and the arithmetic.

    Args:
        model: a `LlamaForCausalLM` with tied embeddings: where training starts.
        context: tokens per sequence.
        matmul: "bf16" rounds the factors of matrix products.
        lora: adapters alone are trained.
        device: where it is trained.
    """

    def __init__(
        self, model: Any, context: int, *, matmul: str = "bf16", lora: bool = False, device: str
    ) -> None:
        config = model.config
        self.shape = Model.model_validate(
            {
                "n_layer": config.num_hidden_layers,
                "n_head": config.num_attention_heads,
                "n_embd": config.hidden_size,
                "context": context,
                "matmul": matmul,
            }
        )
        self.vocab_size = int(config.vocab_size)
        self._kv_heads = int(config.num_key_value_heads)
        self._eps = float(config.rms_norm_eps)
        state = {name: value.detach() for name, value in model.state_dict().items()}
        self._names = list(_names(self.shape.n_layer))
        self._start = [state[name].float() for name in self._names]
        self._lora = lora
        self._frozen: list[torch.Tensor] = []
        if lora:
            self._frozen = [
                (part if part.dim() == 1 else rounded(part)).to(device) for part in self._start
            ]
            shapes = [
                shape
                for _ in range(self.shape.n_layer)
                for name in LINEARS
                for shape in _adapters(state[f"model.layers.0.{name}.weight"].shape)
            ]
        else:
            shapes = [part.shape for part in self._start]
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.numel = sum(shape.numel() for shape in self.shapes)
        parameters = getattr(config, "rope_parameters", None) or {}
        theta = float(parameters.get("rope_theta") or getattr(config, "rope_theta", 1e4))
        self._turns = _turns(theta, context, config.hidden_size // self.shape.n_head, device)

    def initial(self, seed: int) -> torch.Tensor:
        """(numel,) the pre-trained weights; adapters: A uniform as PEFT's, B zero."""
        if not self._lora:
            return torch.cat([part.reshape(-1) for part in self._start])
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for number, shape in enumerate(self.shapes):
            if number % 2:
                parts.append(torch.zeros(shape.numel()))
            else:
                bound = 1 / math.sqrt(shape[1])
                part = torch.rand(shape.numel(), generator=generator)
                parts.append((2 * part - 1) * bound)
        return torch.cat(parts)

    def losses(self, weights: list[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of every worker, nats per token; see `Gpt.losses`."""
        workers, batch, length = tokens.shape
        context, width = length - 1, self.shape.n_embd
        rest = iter(self._frozen if self._lora else weights)
        adapters = iter(weights) if self._lora else None
        table = next(rest)
        inputs = tokens[..., :-1]
        if self._lora:
            stream = F.embedding(inputs, table).float()
        else:
            shift = torch.arange(workers, device=tokens.device)[:, None, None] * self.vocab_size
            stream = F.embedding(inputs + shift, table.flatten(0, 1))
        stream = stream.view(workers, batch * context, width)
        for _ in range(self.shape.n_layer):
            stream = self._block(stream, rest, adapters, batch)
        stream = self._norm(stream, next(rest))
        logits = self._linear(stream, table)
        targets = tokens[..., 1:].reshape(-1)
        nats = F.cross_entropy(logits.view(-1, self.vocab_size), targets, reduction="none")
        return nats.view(workers, -1).mean(1)

    def _block(
        self,
        stream: torch.Tensor,
        rest: Iterator[torch.Tensor],
        adapters: Iterator[torch.Tensor] | None,
        batch: int,
    ) -> torch.Tensor:
        def linear(values: torch.Tensor) -> torch.Tensor:
            out = self._linear(values, next(rest))
            if adapters is not None:
                down, up = next(adapters), next(adapters)
                thin = self.product(values, down.transpose(1, 2))
                out = out + ALPHA / RANK * self.product(thin, up.transpose(1, 2))
            return out

        hidden = self._norm(stream, next(rest))
        query, key, value = (self._heads(linear(hidden), batch) for _ in range(3))
        query, key = self._turn(query), self._turn(key)
        groups = self.shape.n_head // self._kv_heads
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        if self.shape.matmul == "bf16":
            query, key, value = rounded(query), rounded(key), rounded(value)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).float()
        stream = stream + linear(mixed.transpose(1, 2).reshape(stream.shape))
        hidden = self._norm(stream, next(rest))
        gate, up = linear(hidden), linear(hidden)
        return stream + linear(F.silu(gate) * up)

    def _linear(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Values (workers, n, in) times a weight per worker, or one frozen for all."""
        if weight.dim() == 3:
            return self.product(values, weight.transpose(1, 2))
        factor = rounded(values) if self.shape.matmul == "bf16" else values
        return F.linear(factor, weight.to(factor.dtype)).float()

    def _norm(self, stream: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        square = stream.pow(2).mean(-1, keepdim=True)
        gain = gain if gain.dim() == 1 else gain[:, None]
        return stream * torch.rsqrt(square + self._eps) * gain

    def _heads(self, values: torch.Tensor, batch: int) -> torch.Tensor:
        """(workers, batch * context, heads * size) as (workers * batch, heads, context, size)."""
        size = self.shape.n_embd // self.shape.n_head
        workers, many, width = values.shape
        split = values.view(workers * batch, many // batch, width // size, size)
        return split.transpose(1, 2)

    def _turn(self, values: torch.Tensor) -> torch.Tensor:
        cosine, sine = (table[: values.shape[2]] for table in self._turns)
        first, second = values.chunk(2, dim=-1)
        return values * cosine + torch.cat((-second, first), dim=-1) * sine


def _names(layers: int) -> Iterator[str]:
    """All tensors in the order they lie in a row."""
    yield "model.embed_tokens.weight"
    for number in range(layers):
        here = f"model.layers.{number}"
        yield f"{here}.input_layernorm.weight"
        yield from (f"{here}.{name}.weight" for name in LINEARS[:4])
        yield f"{here}.post_attention_layernorm.weight"
        yield from (f"{here}.{name}.weight" for name in LINEARS[4:])
    yield "model.norm.weight"


def _adapters(shape: torch.Size) -> list[tuple[int, int]]:
    return [(RANK, shape[1]), (shape[0], RANK)]


def _turns(theta: float, context: int, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(context, size) cosines and sines of the rotary embedding (Su et al. 2021)."""
    rates = 1.0 / theta ** (torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(context).float(), rates).repeat(1, 2)
    return angles.cos().to(device), angles.sin().to(device)
