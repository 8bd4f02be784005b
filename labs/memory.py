"""Memory of a pruned step: what error feedback holds, and what a step allocates on top.

The bound is 4 bytes per parameter, allocated once; beyond that no step may allocate a tensor as
large as the model. Two ranks (threads) exchange a GPT-shaped bucket through the real reducer; every
torch operation's new storage is seen by a dispatch mode, numpy's by tracemalloc.

    python labs/memory.py [--numel 3300000] [--density 0.05]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_gradprune.controller import kept_per_chunk
from ds_gradprune.exchange import AllGather
from ds_gradprune.records import RankSignals
from ds_gradprune.reducer import Reducer
from ds_gradprune.sparsify import layout_of
from ds_gradprune.transport.loopback import LoopbackHub


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
    width = 128
    shapes = [torch.Size((numel // width, width)), torch.Size((width,)), torch.Size((width, width))]
    layout = layout_of(shapes, min_numel=4096)
    k = kept_per_chunk(density)
    hub = LoopbackHub(2)
    reducers = [Reducer(AllGather(hub.transport(rank))) for rank in range(2)]
    vectors = [torch.empty(layout.numel) for _ in range(2)]
    signals = RankSignals(1.0, False, 0.1, 0.0, 0.0, 0, 0)
    watch = NewStorage()

    def rank_step(rank: int, step: int) -> None:
        vectors[rank].normal_(generator=torch.Generator().manual_seed(10 * step + rank))
        with watch if rank == 0 and step > 1 else contextlib.nullcontext():
            reducers[rank].reduce(vectors[rank], layout, k, step=step, bucket=0, signals=signals)

    _both_ranks(rank_step, 1)  # allocates the residual, the receive buffer, cached positions
    _both_ranks(rank_step, 2)  # the dispatch mode imports what it needs
    tracemalloc.start()
    for step in range(3, 3 + steps):
        _both_ranks(rank_step, step)
    _, numpy_peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "numel": layout.numel,
        "density": density,
        "model_bytes": 4 * layout.numel,
        "residual_bytes": reducers[0].residuals.nbytes(),
        "residual_bytes_per_parameter": reducers[0].residuals.nbytes() / layout.numel,
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--numel", type=int, default=3_300_000, help="parameters of the model")
    parser.add_argument("--density", type=float, default=0.05, help="kept / all elements")
    options = parser.parse_args()
    result = measure(options.numel, options.density)
    for name, value in result.items():
        print(f"{name:32} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
