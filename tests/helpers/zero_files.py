"""Checkpoints of islands at every ZeRO stage: what they hold, who reads them, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import CheckpointError
from tests.helpers.shard_bench import batch, start_deepspeed, weights_of
from tests.helpers.zero_bench import PRUNED, everywhere, make, masters, train
from tests.helpers.zero_cases import KINDS, collect

SCHEDULE = {
    "type": "WarmupLR",
    "params": {"warmup_max_lr": 2e-3, "warmup_num_steps": 40, "warmup_type": "linear"},
}
SAVED = ("0-bf16", "1-fp32-sums", "2-fp32", "2-offload", "3-bf16")
"""Kinds whose checkpoints are looked into."""

CONVERTED = ("2-fp32", "2-offload", "3-bf16")
"""Those that zero_to_fp32.py reads. It refuses those of BF16_Optimizer, plain ones too."""

BEGUN = ("2-fp32",)
"""Those that go on from a checkpoint of plain DeepSpeed. At stage 3 it reads no frozen parameters
that lie in other parts."""

RESUMED: dict[str, dict[str, Any]] = {
    "0-fp16": {},
    "1-fp32": {"block": {"sync_every": 2}},
    "1-fp32-sums": {},
    "2-fp16": {"spoil": (4, 1)},
    "2-offload": {"block": {"sync_every": 4, "residual_decay": 0.9}},
    "3-fp16": {"spoil": (4, 1), "block": {"slow_momentum": 1.0}},
    "3-offload": {},
}
"""Kinds that are resumed, with what is special in them."""

OWN_DISKS = ("0-fp16", "1-fp32", "2-offload", "3-offload")
"""Those of them whose islands have a disk each."""


# ---- what is in them -----------------------------------------------------------------------------


def views(kind: str, folder: str) -> dict[str, Any]:
    """Whose weights an evaluation, a state_dict, saved models and checkpoints hold."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    gathers = {"stage3_gather_16bit_weights_on_model_save": True}
    options = KINDS[kind] | {"zero": KINDS[kind].get("zero", {}) | gathers}
    engine = make(PRUNED, **options)
    train(engine, 1, 6)
    handle, tokens = engine.gradprune, batch(7, 0, 0)
    own = weights_of(engine)
    with handle.shared_weights():
        shared, fp32 = weights_of(engine), masters(engine)
        engine.eval()
        with torch.no_grad():
            loss = float(engine(tokens))
    engine.train()
    answers: dict[str, Any] = {"back": _same(weights_of(engine), own)}
    engine.eval()
    with torch.no_grad():
        answers["evaluation"] = float(engine(tokens)) == loss
    engine.train()
    engine(tokens)
    answers["training"] = _same(weights_of(engine), own)
    answers["differ"] = not _same(own, shared)
    if engine.zero_optimization_stage() < 3:
        answers["state_dict"] = _same(_named(engine.module.state_dict(), shared), shared)
    train(engine, 7, 7)  # and back to training from whatever is in the model
    own = weights_of(engine)
    engine.save_16bit_model(folder, "model.bin")
    with handle.shared_weights():
        shared, fp32 = weights_of(engine), masters(engine)
    answers["back_again"] = _same(weights_of(engine), own)
    engine.save_checkpoint(folder, tag="t")
    answers["files"] = sorted(path.name for path in (Path(folder) / "t").iterdir())
    if dist.get_rank() == 0:
        saved = torch.load(Path(folder) / "model.bin", weights_only=True)
        answers["16bit"] = _same(_named(saved, shared), shared)
        if kind in CONVERTED:
            whole = get_fp32_state_dict_from_zero_checkpoint(folder, "t")
            whole = {name: whole[name].view(-1) for name in fp32}
            answers["zero_to_fp32"] = _same(whole, fp32)
        torch.save((shared, fp32), Path(folder) / "shared.pt")
    return answers


def begins(kind: str, folder: str) -> dict[str, Any]:
    """Islands go on from a run of plain DeepSpeed, which has divided everything by four."""
    plain = make(None, **KINDS[kind])
    train(plain, 1, 2)
    plain.save_checkpoint(folder, tag="t")
    before = weights_of(plain)
    dist.barrier()
    engine = make(PRUNED, seed=9, **KINDS[kind])
    try:
        engine.load_checkpoint(folder)
        refused = ""
    except CheckpointError as exc:
        refused = str(exc)
    engine.load_checkpoint(folder, load_optimizer_states=False)
    weights = _same(weights_of(engine), before)
    train(engine, 3, 6)
    crcs = everywhere(engine.gradprune.parameters_crc())
    return {"refused": refused, "weights": weights, "crcs": crcs}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _named(state: dict[str, Any], names: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: state[name] for name in names}


def run_views(folder: str) -> dict[str, Any]:
    """Two islands of two ranks."""
    start_deepspeed()

    def checks(kind: str) -> Any:
        yield "views", views(kind, f"{folder}/{kind}")
        if kind in BEGUN:
            yield "begins", begins(kind, f"{folder}/plain_{kind}")

    return collect(checks, [*SAVED])


def run_plain(folder: str) -> dict[str, Any]:
    """Plain DeepSpeed, on as many ranks as an island had, reads them and goes on."""
    start_deepspeed()

    def checks(kind: str) -> Any:
        engine = make(None, seed=9, **KINDS[kind])
        engine.load_checkpoint(f"{folder}/{kind}", tag="t")
        shared, _ = torch.load(Path(folder) / kind / "shared.pt", weights_only=True)
        yield "weights", _same(weights_of(engine), shared)
        yield "steps", engine.global_steps
        yield "loss", train(engine, 8, 9)[-1]

    return collect(checks, [*SAVED])


# ---- the same run goes on ------------------------------------------------------------------------


def run_resumed(folder: str, at: int, last: int, is_first: bool) -> dict[str, Any]:
    """Runs of two islands of two ranks.

    Args:
        folder: for checkpoints.
        at: the step after which they are saved.
        last: the last step.
        is_first: the unbroken run, which saves; else the one that is resumed.
    """
    start_deepspeed()

    def checks(kind: str) -> Any:
        special, path = RESUMED[kind], f"{folder}/{kind}"
        if kind in OWN_DISKS:
            path = f"{folder}/disk_{dist.get_rank() // 2}/{kind}"
        block = PRUNED | special.get("block", {})
        options = KINDS[kind] | {"scheduler": SCHEDULE, "gradient_accumulation_steps": 2}
        engine = make(block, seed=0 if is_first else 7, **options)
        rows: list[Any] = []

        def on_step(step: int) -> None:
            handle = engine.gradprune
            own = [float(p.own.double().sum()) for p in handle.shards.pieces()]
            rows.append([step, handle.parameters_crc(), own, float(torch.rand(1))])
            rows[-1] += [engine.get_lr(), engine.skipped_steps, engine.global_samples]
            rows[-1] += [scale_of(engine), handle.loop.decision.density, handle.totals]
            if is_first and step == at:
                engine.save_checkpoint(path, tag="t")

        if not is_first:
            engine.load_checkpoint(path)
        first = 1 if is_first else at + 1
        losses = train(engine, first, last, on_step, spoil=special.get("spoil"))
        rows = [[*row, loss] for row, loss in zip(rows, losses, strict=True)]
        yield "rows", [row for row in rows if row[0] > at]
        yield "skipped", everywhere(engine.skipped_steps)

    return collect(checks, [*RESUMED])


def scale_of(engine: Any) -> float | None:
    """The loss scale."""
    found: float | None = engine._get_optimizer_loss_scale()
    return found


# ---- another number of islands -------------------------------------------------------------------

RESIZED = ("0-fp32", "0-bf16", "1-fp32", "2-fp32", "2-offload", "3-fp32")


def run_saved(folder: str, ranks: int) -> dict[str, Any]:
    """Islands leave checkpoints for others; what they were."""
    start_deepspeed()

    def checks(kind: str) -> Any:
        engine = make(PRUNED, ranks=ranks, **KINDS[kind])
        train(engine, 1, 6)
        engine.save_checkpoint(f"{folder}/{kind}", tag="t")
        handle = engine.gradprune
        with handle.shared_weights():
            yield "before", {name: w.float() for name, w in weights_of(engine).items()}
        yield "moments", moments(engine)
        # What the islands hand over counts as one dense exchange.
        prepared = handle.islands.prepare_dense([])
        prepared.start()
        prepared.deliver()
        prepared.commit()
        handle.shards.publish()
        handle.weights.note()
        with handle.shared_weights():
            yield "shared", {name: w.float() for name, w in weights_of(engine).items()}

    return collect(checks, [*RESIZED])


def run_resized(folder: str, ranks: int) -> dict[str, Any]:
    """More or fewer islands go on."""
    start_deepspeed()

    def checks(kind: str) -> Any:
        engine = make(PRUNED, ranks=ranks, seed=5, **KINDS[kind])
        handle = engine.gradprune
        yield "idle", handle.idle
        engine.load_checkpoint(f"{folder}/{kind}")
        with handle.shared_weights():
            yield "shared", {name: w.float() for name, w in weights_of(engine).items()}
        yield "moments", moments(engine)
        yield "steps", engine.global_steps
        crcs, losses = [], []
        for step in range(7, 12):
            losses += train(engine, step, step)
            crcs.append(handle.parameters_crc())
        yield "crcs", crcs
        yield "losses", losses

    return collect(checks, [*RESIZED])


def moments(engine: Any) -> list[float]:
    """Sums over the optimizer's state, the smallest first: tensors have no name at stage 3."""
    return sorted(
        float(torch.as_tensor(value).double().sum())
        for state in engine.basic_optimizer.state.values()
        for value in state.values()
    )
