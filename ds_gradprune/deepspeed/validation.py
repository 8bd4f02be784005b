"""A validation loss in DeepSpeed's monitor, and its distance from that of the own weights."""

from __future__ import annotations

import math
from typing import Any

from ds_gradprune.deepspeed.monitor import PREFIX


def write_validation(engine: Any, loss: float, own_loss: float | None = None) -> None:
    """Send a validation loss to DeepSpeed's monitor. Local, for rank 0.

    A forward in evaluation mode sees the shared weights without gradients, and an island's own ones
    with them (`torch.enable_grad()`). The gap says how far the islands have moved apart.

    Args:
        engine: the DeepSpeed engine.
        loss: of the shared weights.
        own_loss: of own weights on the same text; None: not measured.
    """
    if not engine.monitor.enabled:
        return
    values = {"validation_loss": loss}
    if own_loss is not None:
        values |= {"own_validation_loss": own_loss, "validation_gap": own_loss - loss}
    engine.monitor.write_events(
        [
            (PREFIX + name, value, engine.global_samples)
            for name, value in values.items()
            if math.isfinite(value)
        ]
    )
