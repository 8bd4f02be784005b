"""Memory of a pruned step of gradient mode: what error feedback holds, what a step adds to it.

The bound is 4 bytes per parameter, and as much again while a step is open: the residual of a step
that may still be skipped lies beside the old one. Two ranks (threads) exchange a GPT-shaped bucket
through the product's own classes; every torch operation's new storage is seen by a dispatch mode,
numpy's by tracemalloc. (labs/exchange.py measures an exchange between islands.)

    python labs/memory.py [--numel 3300000] [--density 0.05]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The root instead of this folder: labs and ds_gradprune are found there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.gradients import Gradient, GradientPruning
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.loopback import LoopbackHub

WIDTH = 128
SIGNALS = RankSignals(1.0, False, 0.1, 0.0, 0.0, 0, 0)


class NewStorage(TorchDispatchMode):
    """Remembers the largest storage that an operation made.

    Attributes:
        largest_bytes: size of that storage.
        operation: the operation that made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; compare what came out with what went in."""
        kwargs = kwargs or {}
        before = {_storage(leaf) for leaf in tree_leaves((args, kwargs))}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _storage(leaf) not in before:
                size_bytes = leaf.untyped_storage().nbytes()
                if size_bytes > self.largest_bytes:
                    self.largest_bytes, self.operation = size_bytes, str(func)
        return result


def _storage(leaf: Any) -> int:
    return leaf.untyped_storage().data_ptr() if isinstance(leaf, torch.Tensor) else 0


def measure(numel: int, density: float, steps: int = 3) -> dict[str, Any]:
    """Reduce a GPT-shaped bucket a few times; the first steps allocate, the others are watched."""
    gradients = [
        Gradient("embedding", numel // WIDTH * WIDTH, True),
        Gradient("norm", WIDTH, False),
        Gradient("output", WIDTH * WIDTH, True),
    ]
    total, k = sum(gradient.numel for gradient in gradients), kept_per_chunk(density)
    hub = LoopbackHub(2)
    ranks = [
        GradientPruning(
            AllGather(hub.transport(rank)),
            Stopwatch(time.perf_counter),
            value_bits=4,
            error_feedback=True,
        )
        for rank in range(2)
    ]
    vectors = [torch.empty(total) for _ in ranks]
    watch = NewStorage()

    def rank_step(rank: int, step: int) -> None:
        vectors[rank].normal_(generator=torch.Generator().manual_seed(10 * step + rank))
        with watch if rank == 0 and step > 1 else contextlib.nullcontext():
            ranks[rank].begin()
            ranks[rank].reduce(vectors[rank], gradients, k, step=step, signals=SIGNALS)
            ranks[rank].commit(applied=True)

    _both_ranks(rank_step, 1)  # allocates the residual and what is kept for messages
    _both_ranks(rank_step, 2)  # the dispatch mode imports what it needs
    tracemalloc.start()
    for step in range(3, 3 + steps):
        _both_ranks(rank_step, step)
    _, numpy_peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    residual_bytes = sum(tensor.nbytes for tensor in ranks[0].residuals.state_dict().values())
    return {
        "numel": total,
        "density": density,
        "model_bytes": 4 * total,
        "residual_bytes": residual_bytes,
        "residual_bytes_per_parameter": residual_bytes / total,
        "largest_tensor_bytes": watch.largest_bytes,
        "largest_tensor_operation": watch.operation,
        "numpy_peak_bytes_both_ranks": numpy_peak_bytes,
    }


def _both_ranks(rank_step: Callable[[int, int], None], step: int) -> None:
    threads = [threading.Thread(target=rank_step, args=(rank, step)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Print a table and, last, one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numel", type=int, default=3_300_000, help="parameters of the model")
    parser.add_argument("--density", type=float, default=0.05, help="kept / all elements")
    options = parser.parse_args()
    result = measure(options.numel, options.density)
    for name, value in result.items():
        print(f"{name:32} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
