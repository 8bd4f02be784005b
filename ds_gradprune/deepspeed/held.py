"""DeepSpeed's buckets at ZeRO stages 1 and 2, held back while their reduction travels (`overlap`).

DeepSpeed 0.19.8 reduces a bucket, copies the sums into its partition, and fills the bucket anew
(`reduce_ipg_grads`). So a bucket is averaged twice here. The first time the collective only takes
what would be reduced; the bucket is noted, emptied, and backward goes on. The second time, when
backward is over, the collective gives the sum, and DeepSpeed does with it what it always does. What
it computes before the collective is done twice and used once. All functions are local, but what
the reductions themselves do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.torch_autocast import sort_dtypes


@dataclass(frozen=True, slots=True)
class _Held:
    """A bucket, as it was.

    Attributes:
        dtype: of its communication; its key.
        params: DeepSpeed's places of the parameters in it.
        grads: their gradients.
        elements: together.
        has_moe_params: DeepSpeed's flag.
        large: a parameter that is larger than a bucket; None: there is none.
    """

    dtype: torch.dtype
    params: list[Any]
    grads: list[torch.Tensor]
    elements: int
    has_moe_params: bool
    large: torch.nn.Parameter | None


class HeldBuckets:
    """The buckets of one round.

    Args:
        optimizer: `DeepSpeedZeroOptimizer`.

    Attributes:
        is_holding: collectives only take what would be reduced.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._held: list[_Held] = []
        self.is_holding = False

    def dtypes(self, comm_dtype: torch.dtype | None) -> Iterable[torch.dtype]:
        """Keys of the buckets that DeepSpeed wants to reduce."""
        if comm_dtype is not None:
            return [comm_dtype]
        return list(sort_dtypes(self._optimizer.ipg_buckets.keys()))

    def hold(self, dtype: torch.dtype) -> None:
        """Let DeepSpeed average a bucket, and keep it from going on with it."""
        optimizer = self._optimizer
        bucket = optimizer.ipg_buckets[dtype]
        if not bucket.params:
            return
        self.is_holding = True
        try:
            self._average(bucket, dtype)
        finally:
            self.is_holding = False
        for _, _, number in bucket.params:  # DeepSpeed finds those that come twice
            optimizer.params_already_reduced[number] = True
        self._held.append(
            _Held(
                dtype,
                list(bucket.params),
                list(bucket.grads),
                bucket.elements,
                bucket.has_moe_params,
                optimizer.extra_large_param_to_reduce.pop(dtype, None),
            )
        )
        bucket.clear()

    def release(self, reduce: Callable[[torch.dtype], Any]) -> None:
        """Give every bucket back to DeepSpeed, in order.

        Args:
            reduce: DeepSpeed's own reduction of the bucket of a data type.
        """
        held, self._held = self._held, []
        for was in held:
            self._fill(was)
            reduce(was.dtype)

    def forget(self) -> None:
        """The step has failed."""
        for was in self._held:
            for _, _, number in was.params:
                self._optimizer.params_already_reduced[number] = False
        self._held = []

    def hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        """Methods of the optimizer that add sums to a partition; none are there while it holds."""
        names = ("_add_to_grad_partition_buffer", "_add_full_reduction_to_compact_grad_partition")
        return [(name, self._unless_holding) for name in names]

    def _unless_holding(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not self.is_holding:
            original(*args, **kwargs)

    def _average(self, bucket: Any, dtype: torch.dtype) -> None:
        """The first half of `reduce_ipg_grads`, up to its collectives."""
        optimizer = self._optimizer
        if optimizer.contiguous_gradients:
            large = optimizer.extra_large_param_to_reduce.get(dtype)
            if large is None:
                flat = bucket.buffer[bucket.index].narrow(0, 0, bucket.elements)
            else:
                flat = optimizer.get_gradient_for_reduction(large).view(-1)
            optimizer.average_tensor(flat, dtype)
        elif any(
            optimizer._use_compact_grad_partition_buffer(group) for group, _, _ in bucket.params
        ):
            optimizer._buffered_reduce_fallback_preserving_fp32(
                bucket.grads, bucket.params, dtype, elements_per_buffer=bucket.elements
            )
        else:
            optimizer.buffered_reduce_fallback(
                None, bucket.grads, dtype, elements_per_buffer=bucket.elements
            )

    def _fill(self, was: _Held) -> None:
        """As `reduce_independent_p_g_buckets_and_remove_grads` left the bucket; values are junk."""
        optimizer = self._optimizer
        bucket = optimizer.ipg_buckets[was.dtype]
        for _, _, number in was.params:
            optimizer.params_already_reduced[number] = False
        bucket.params.extend(was.params)
        bucket.grads.extend(was.grads)
        bucket.elements, bucket.has_moe_params = was.elements, was.has_moe_params
        if was.large is not None:
            optimizer.extra_large_param_to_reduce[was.dtype] = was.large
        elif optimizer.contiguous_gradients:
            start = 0
            for grad in was.grads:
                place = bucket.buffer[bucket.index].narrow(0, start, grad.numel())
                grad.data = place.view_as(grad)
                start += grad.numel()
