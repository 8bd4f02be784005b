"""What crosses between islands, and what happens when one rank of an island fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import GradPruneError, WireFormatError
from tests.helpers.shard_bench import batch, start_deepspeed
from tests.helpers.zero_bench import PRUNED, everywhere, make, traffic, train
from tests.helpers.zero_cases import KINDS, collect

TIMEOUT_S = 4
CROSSING = ("0-fp32", "1-bf16", "1-fp32-sums", "2-offload", "3-bf16")


def crosses(kind: str) -> dict[str, Any]:
    """Collectives of two islands of two ranks, in the warm-up and after it.

    Returns:
        For both: the names of those that join several islands, their bytes and what the handle
        says it has sent; the names of those inside the island.
    """
    engine = make(PRUNED | {"verify_every_steps": 2}, **KINDS[kind])
    handle = engine.gradprune
    answers: dict[str, Any] = {}
    for phase, steps in (("warm", (1, 2)), ("apart", (3, 7))):
        before = handle.totals.wire_bytes
        with traffic() as seen:
            train(engine, *steps)
        outside = [(name, size) for name, size, ranks in seen if _parts(ranks)]
        inside = [name for name, _, ranks in seen if not _parts(ranks) and len(ranks) > 1]
        sent = sum(everywhere(sum(size for _, size in outside))[:2])
        answers[phase] = {
            "outside": sorted({name for name, _ in outside}),
            "inside": sorted(set(inside)),
            "sent": sent,
            "told": handle.totals.wire_bytes - before,
            "dense": 5 * handle.report.dense_bytes,
        }
    return answers


def _parts(ranks: list[int]) -> bool:
    """Whether these ranks belong to several islands of two."""
    return len({rank // 2 for rank in ranks}) > 1


def sick(kind: str) -> dict[str, Any]:
    """A weight of one shard of island 1 becomes nan before an exchange."""
    engine = make(PRUNED, **KINDS[kind])
    handle = engine.gradprune
    train(engine, 1, 4)
    before = handle.parameters_crc()
    original = handle.islands.prepare

    def prepare(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 3:
            handle.shards.pieces()[0].own[0] = float("nan")
        return original(*args, **kwargs)

    handle.islands.prepare = prepare
    return {
        "message": everywhere(_message(lambda: train(engine, 5, 5))),
        "same": everywhere(handle.parameters_crc() == before),
    }


def fails(kind: str) -> dict[str, Any]:
    """What rank 1 receives is damaged: its island ends at once, the other one in time."""
    engine = make(PRUNED | {"timeout_s": TIMEOUT_S}, **KINDS[kind])
    handle = engine.gradprune
    train(engine, 1, 4)
    if dist.get_rank() == 1:
        handle.rounds._deliver = _raise
    before, begin_s = handle.parameters_crc(), time.monotonic()
    message = _message(lambda: train(engine, 5, 6))
    return {
        "message": message,
        "seconds": time.monotonic() - begin_s,
        "limit": TIMEOUT_S,
        "same": handle.parameters_crc() == before,
    }


def _raise(*_: Any) -> Any:
    raise WireFormatError("a payload is damaged")


def strays(kind: str) -> dict[str, Any]:
    """Rank 0 asks for a state_dict that the others of its island do not ask for."""
    engine = make(PRUNED | {"timeout_s": TIMEOUT_S}, **KINDS[kind])
    train(engine, 1, 4)
    begin_s = time.monotonic()

    def stray() -> None:
        if dist.get_rank() == 0:
            engine.module.state_dict()
        elif dist.get_rank() == 1:
            engine.gradprune.loop.signals(None)
            engine.gradprune.rounds.end_step()

    return {"message": _message(stray), "seconds": time.monotonic() - begin_s}


def alone(kind: str) -> dict[str, Any]:
    """Work of one rank inside `shared_weights` of all."""
    engine = make(PRUNED, **KINDS[kind])
    train(engine, 1, 4)
    names: list[str] = []
    loss = 0.0
    with engine.gradprune.shared_weights():
        engine.eval()
        if dist.get_rank() == 0:
            names = [*engine.module.state_dict()]
            with torch.no_grad():
                loss = float(engine(batch(9, 0, 0)))
        engine.train()
    train(engine, 5, 6)
    return {
        "names": len(names),
        "loss": loss,
        "crcs": everywhere(engine.gradprune.parameters_crc()),
    }


def _message(action: Callable[[], Any]) -> str:
    try:
        action()
    except GradPruneError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "accepted"


CHECKS: dict[str, tuple[Callable[[str], dict[str, Any]], tuple[str, ...]]] = {
    "crosses": (crosses, CROSSING),
    "sick": (sick, ("2-fp32", "3-bf16")),
    "alone": (alone, ("0-bf16", "2-fp32")),
    "strays": (strays, ("2-fp32",)),
    "fails": (fails, ("3-bf16",)),  # the last one: it leaves groups unusable
}


def run_faults() -> dict[str, Any]:
    """Two islands of two ranks."""
    start_deepspeed()

    def checks(name: str) -> Iterator[tuple[str, Any]]:
        work, kinds = CHECKS[name]
        for kind in kinds:
            yield kind, work(kind)

    return collect(checks, [*CHECKS])
