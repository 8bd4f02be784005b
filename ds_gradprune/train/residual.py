"""Error feedback: what was not sent is kept and added to the next gradient.

Two phases. Selecting what to send changes nothing here; a new residual is staged when its exchange
is done, and `commit` puts all staged ones into force once the optimizer has stepped. `drop` forgets
them: the step was skipped or failed, and every residual is what it was. All amounts are in unscaled
units: a gradient under loss scaling is divided by its scale on the way in.

A residual belongs to a parameter, known by its key, wherever the parameter lies in a bucket. One
that is not trained for a while keeps its residual. All functions are local.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_gradprune.errors import CheckpointError

Keys = tuple[str, ...]


class Residuals:
    """The residuals of one rank: 4 bytes per element of every parameter that was ever pruned.

    Parameters that are reduced together share one flat vector, so that a bucket's residual needs no
    copy; it is taken apart when they part, also between two reductions of one step.
    """

    def __init__(self) -> None:
        self._flats: dict[Keys, torch.Tensor] = {}
        self._numels: dict[str, int] = {}
        self._loose: dict[str, torch.Tensor] = {}
        self._staged: dict[Keys, torch.Tensor | None] = {}
        self._staged_loose: dict[str, torch.Tensor | None] = {}

    def of(
        self, keys: Sequence[str], numels: Sequence[int], device: torch.device
    ) -> torch.Tensor | None:
        """(sum of numels,) fp32, what is owed to these parameters, one after the other.

        Args:
            keys: of the parameters, in the order of their bucket.
            numels: their elements.
            device: where the bucket lives.

        Returns:
            The residual, with what the step has staged so far; not to be changed. None: nothing.

        Raises:
            CheckpointError: a parameter's residual has another size.
        """
        together = tuple(keys)
        if together in self._staged:
            return self._staged[together]
        flat = self._flats.get(together)
        if flat is None:
            flat = self._assemble(together, numels, device)
        if flat is not None and flat.device != device:
            flat = self._flats[together] = flat.to(device)
        self._part(self._staged, self._staged_loose, together)
        if self._staged_loose.keys() & set(together):
            self._numels.update(zip(keys, numels, strict=True))
            self._staged[together] = flat = self._restage(together, flat, device)
        return flat

    def stage(self, keys: Sequence[str], numels: Sequence[int], flat: torch.Tensor | None) -> None:
        """What these parameters will be owed after the commit; None: nothing."""
        self._numels.update(zip(keys, numels, strict=True))
        together = tuple(keys)
        self._part(self._staged, self._staged_loose, together)
        for key in keys:
            self._staged_loose.pop(key, None)
        self._staged[together] = flat

    def commit(self) -> None:
        """The step was applied: what was staged holds."""
        loose = {(key,): flat for key, flat in self._staged_loose.items()}
        for keys, flat in (self._staged | loose).items():
            self._part(self._flats, self._loose, keys)
            for key in keys:
                self._loose.pop(key, None)
            if flat is None:
                self._flats.pop(keys, None)
            else:
                self._flats[keys] = flat
        self.drop()

    def drop(self) -> None:
        """The step was not applied: every residual is what it was."""
        self._staged, self._staged_loose = {}, {}

    def norm(self) -> float:
        """2-norm over everything owed."""
        every = [*self._flats.values(), *self._loose.values()]
        return math.sqrt(math.fsum(float(flat.norm()) ** 2 for flat in every))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(4 * flat.numel() for flat in [*self._flats.values(), *self._loose.values()])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What every parameter is owed, by key; parameters that are owed nothing are left out."""
        state = dict(self._loose)
        for keys, flat in self._flats.items():
            state |= zip(keys, self._split(keys, flat), strict=True)
        return state

    def read(self, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Check what `state_dict` gave; changes nothing.

        Raises:
            CheckpointError: it is no such state.
        """
        if not all(isinstance(v, torch.Tensor) and v.dim() == 1 for v in state.values()):
            raise CheckpointError("the pruning state's residuals must be 1-D tensors by parameter.")
        return dict(state)

    def take(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `read` returned."""
        self._flats = {}
        self.drop()
        self._loose = {key: flat.detach().clone() for key, flat in state.items()}
        self._numels = {key: flat.numel() for key, flat in state.items()}

    def _split(self, keys: Keys, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(flat, [self._numels[key] for key in keys])

    def _part(self, flats: dict[Keys, Any], loose: dict[str, Any], keys: Keys) -> None:
        """Take apart what any of these parameters shares with others; None: nothing is owed."""
        for other in [o for o in flats if o != keys and not set(o).isdisjoint(keys)]:
            flat = flats.pop(other)
            parts = [None] * len(other) if flat is None else self._split(other, flat)
            loose |= zip(other, parts, strict=True)

    def _restage(
        self, keys: Keys, committed: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """What the step has staged of each parameter so far, or what it was owed before."""
        was = (None,) * len(keys) if committed is None else self._split(keys, committed)
        parts = [self._staged_loose.pop(k, w) for k, w in zip(keys, was, strict=True)]
        return torch.cat(
            [
                torch.zeros(self._numels[key], device=device) if part is None else part.to(device)
                for key, part in zip(keys, parts, strict=True)
            ]
        )

    def _assemble(
        self, keys: Keys, numels: Sequence[int], device: torch.device
    ) -> torch.Tensor | None:
        """Gather one flat residual from wherever its parameters' residuals are."""
        self._part(self._flats, self._loose, keys)
        found = {key: self._loose.pop(key) for key in keys if key in self._loose}
        if not found:
            return None
        parts = []
        for key, numel in zip(keys, numels, strict=True):
            part = found.get(key)
            if part is not None and part.numel() != numel:
                raise CheckpointError(
                    f"{key} has {numel} elements, but its residual has {part.numel()}: the model "
                    "or the checkpoint is another one."
                )
            parts.append(torch.zeros(numel, device=device) if part is None else part.to(device))
        self._numels.update(zip(keys, numels, strict=True))
        self._flats[keys] = torch.cat(parts)
        return self._flats[keys]
