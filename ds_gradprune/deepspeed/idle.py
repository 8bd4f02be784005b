"""`engine.gradprune` where nothing is exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.train.crc import crc_of
from ds_gradprune.train.report import Totals

if TYPE_CHECKING:
    from ds_gradprune.deepspeed.carried import Carried


class IdleHandle:
    """`engine.gradprune` where nothing is exchanged: DeepSpeed is left alone.

    The block is disabled, there is only one rank, or the engine has no optimizer.

    Attributes:
        engine: the DeepSpeed engine.
        config: the validated block.
        idle: true.
        report: None.
        totals: zeros.
    """

    idle = True

    def __init__(
        self, engine: Any, config: GradientPruningConfig, carried: Carried | None = None
    ) -> None:
        self._carried = carried
        self.engine = engine
        self.config = config
        self.report = None
        self.totals = Totals()

    held_bytes = 0
    """Memory that we hold beside DeepSpeed's."""

    @property
    def loop(self) -> NoReturn:
        """There is none.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("gradient pruning is idle here: there is no loop")

    session = loop

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """The model holds its own weights, which are the only ones. Local."""
        yield

    def weight_sets(self) -> Iterator[None]:
        """There is one set of weights. Local."""
        yield

    def parameters_crc(self) -> int:
        """crc32c over the bits of all parameters of this rank, in module order. Local."""
        return module_crc(self.engine.module)

    def check_alike(self, values: Mapping[str, Any]) -> None:
        """Nothing is exchanged, so nothing is compared. Local."""

    def detach(self) -> None:
        """Give DeepSpeed back what was hooked, if anything was. Local."""
        if self._carried is not None:
            self._carried.close()
            self._carried = None
        self.engine.gradprune = None


def module_crc(module: torch.nn.Module) -> int:
    """crc32c over the bits of all parameters, in module order. Local."""
    return crc_of(module.parameters())
