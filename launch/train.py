"""Train a text generator over pruned gradients or updates.

    deepspeed --num_accelerators 2 launch/train.py --config ds_configs/laptop.json --out runs/first
    mpirun -np 2 python launch/train.py --config ds_configs/laptop.json --out runs/first
    python launch/train.py --config ds_configs/laptop.json --out runs/first

Everything that is no flag is a key of the DeepSpeed configuration. The folder --out gets the model
(<out>/model, a plain transformers folder), the resolved configuration, a log of every step, the
checkpoints, and result.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ds_gradprune.config import BLOCK, GradientPruningConfig, load_block
from ds_gradprune.errors import ConfigError, GradPruneError
from textgen.corpus import open_text
from launch.support.flags import ScriptParser, natural, positive
from launch.support.rendezvous import AbsentRanks
from launch.support.peers import (
    AgreedFault,
    Peers,
    StopSwitch,
    export_place,
    find_place,
    leave_group,
    share_cores,
)
from launch.support.run_folder import RunFolder, checkpoint_tag, write_json
from launch.support.start import (
    check_ds_config,
    choose_accelerator,
    connect,
    load_checkpoint,
    prepare_shm_op,
    read_ds_config,
)


def parser() -> ScriptParser:
    """The flags; all else is a key of the DeepSpeed configuration."""
    flags = ScriptParser("Train a text generator over pruned updates or gradients.")
    flags.add_argument(
        "--config", type=Path, required=True, help=f"DeepSpeed's JSON file, with a {BLOCK} block"
    )
    flags.add_argument(
        "--model",
        default="nano",
        help="nano (1M parameters), micro (10M) or small (124M), trained from nothing; or a "
        "transformers folder or hub name, trained on (default: nano)",
    )
    flags.add_argument(
        "--text",
        type=Path,
        help="UTF-8 file, or folder of text files (default: the help topics and docstrings of this "
        "Python)",
    )
    flags.add_argument(
        "--steps", type=positive, default=1000, help="optimizer steps in all (default: 1000)"
    )
    flags.add_argument(
        "--out", type=Path, default=Path("runs/train"), help="run folder (default: runs/train)"
    )
    flags.add_argument("--resume", action="store_true", help="continue the run in --out")
    flags.add_argument("--seed", type=natural, default=0, help="weights and order (default: 0)")
    flags.add_argument(
        "--eval-every", type=positive, default=100, help="steps between validations (default: 100)"
    )
    flags.add_argument(
        "--save-every", type=positive, default=500, help="steps between checkpoints (default: 500)"
    )
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed passes it
    return flags


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for, checked as far as no model and no peer is needed."""

    flags: argparse.Namespace
    ds_config: dict[str, Any]
    block: GradientPruningConfig
    folder: RunFolder

    @property
    def text(self) -> Path | None:
        """The text; None: the embedded one."""
        path: Path | None = self.flags.text
        return path


def read_settings(arguments: Sequence[str] | None) -> Settings:
    """Parse and check flags, configuration, text and run folder. Local; writes nothing.

    Raises:
        ConfigError, DataError: something is wrong.
    """
    flags = parser().parse_args(arguments)
    ds_config = read_ds_config(flags.config)
    block = load_block(ds_config, flags.steps)
    folder = RunFolder(flags.out)
    faults = []
    if "optimizer" not in ds_config:
        faults.append("optimizer must be present in the DeepSpeed configuration.")
    zero = ds_config.get("zero_optimization", {})
    if isinstance(zero, dict) and zero.get("stage", 0) == 3:
        faults.append(
            "zero_optimization.stage must be at most 2 for this script, got 3: no rank holds a "
            "whole model to validate with and to write."
        )
    if faults:
        raise ConfigError(faults)
    if flags.text is not None:
        open_text(flags.text).check()
    if not flags.resume:
        folder.check_new()
    from textgen.model import check_model_name, quiet_transformers

    quiet_transformers()
    check_model_name(flags.model)
    return Settings(flags, ds_config, block, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    peers: Peers | None = None
    try:
        place = find_place(os.environ)
        export_place(place, os.environ)
        share_cores(place, os.environ)
        choose_accelerator()
        peers = connect(place, _timeout_s(arguments))
        settings = peers.together(lambda: read_settings(arguments))
        _train(settings, peers)
    except (AgreedFault, AbsentRanks) as exc:
        if place.rank == exc.rank:
            print(f"error: {exc}", file=sys.stderr, flush=True)
        if peers is not None:
            peers.gather(None)  # a launcher ends all ranks when one ends: first let it be said
        return 2
    except GradPruneError as exc:
        if peers.speaks_first() if peers is not None else os.environ.get("RANK", "0") == "0":
            print(f"error: {exc}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if peers is None or peers.rank == 0:
            print("Interrupted; nothing new was saved.", file=sys.stderr, flush=True)
        return 130
    finally:
        leave_group()
    return 0


def _timeout_s(arguments: Sequence[str] | None) -> float:
    """How long ranks wait for each other at the start; faults are told when all are there."""
    try:
        flags = parser().parse_args(arguments)
        return load_block(read_ds_config(flags.config), flags.steps).timeout_s
    except ConfigError:
        return GradientPruningConfig().timeout_s


def _train(settings: Settings, peers: Peers) -> None:
    """Everything between a checked command line and result.json. Collective."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    _show_warnings(peers.rank)
    prepare_shm_op(peers, _say)
    deepspeed.init_distributed()
    world_config = peers.together(lambda: check_ds_config(settings.ds_config))
    try:
        run = _Run(settings, peers, world_config)
    except BaseException:
        if not settings.flags.resume and peers.place.local_rank == 0:
            settings.folder.discard()
        raise
    run.train()


class _Run:
    """One run from its data to its result."""

    def __init__(self, settings: Settings, peers: Peers, world_config: Any) -> None:
        import ds_gradprune
        from textgen.data import TokenData
        from textgen.model import open_model, sequence_length
        from textgen.prepare import prepare_everywhere, prepared_tokenizer

        self.flags, self.folder, self.peers = settings.flags, settings.folder, peers
        identity = {
            "--model": self.flags.model,
            "--text": None if self.flags.text is None else str(self.flags.text),
            "--seed": self.flags.seed,
            "world size": peers.world_size,
            "train_micro_batch_size_per_gpu": world_config.train_micro_batch_size_per_gpu,
            "gradient_accumulation_steps": world_config.gradient_accumulation_steps,
        }
        self._begin(identity)
        prepare_everywhere(peers, self.folder.data, settings.text, self.flags.model)
        self.tokenizer = peers.together(lambda: prepared_tokenizer(self.folder.data))
        model = peers.together(
            lambda: open_model(self.flags.model, self.tokenizer, self.flags.seed)
        )
        self.num_parameters = model.num_parameters()
        self.data = peers.together(
            lambda: TokenData(self.folder.data, sequence_length(model), self.flags.seed)
        )
        peers.together(lambda: self.data.check_batch(world_config.train_batch_size))
        ds_config = resolved_config(settings.ds_config, settings.block, self.folder, world_config)
        if peers.rank == 0:
            write_json(self.folder.config, ds_config)
        self.engine, *_ = ds_gradprune.initialize(
            model=model, model_parameters=list(model.parameters()), config=ds_config
        )
        handle = getattr(self.engine, "gradprune", None)
        self.handle = None if handle is None or handle.idle else handle
        self.done, self.val_losses = self._resume() if self.flags.resume else (0, [])
        self._tell_start(settings.block)

    # ---- before the first step -----------------------------------------------------------------

    def _begin(self, identity: dict[str, Any]) -> None:
        """Only rank 0's folder is asked: other hosts may not share the disk."""

        def work() -> None:
            if self.peers.rank != 0:
                return
            if self.flags.resume:
                self.folder.check_resumable(identity)
            else:
                self.folder.write_identity(identity)

        self.peers.together(work)

    def _resume(self) -> tuple[int, list[tuple[int, float]]]:
        """Load the newest checkpoint. Collective."""
        state = load_checkpoint(self.engine, self.folder.checkpoints)
        done = int(state["steps"])
        if self.handle is None and self.peers.rank == 0:
            self.folder.rewind_log(done)
        return done, [(int(step), float(loss)) for step, loss in state["val_losses"]]

    def _tell_start(self, block: GradientPruningConfig) -> None:
        if self.peers.rank != 0:
            return
        lines = [
            f"model {self.flags.model}: {self.num_parameters:,} parameters; text: "
            f"{self.data.meta.num_tokens:,} tokens from {self.data.meta.source}; "
            f"{self.peers.world_size} ranks"
        ]
        if self.done:
            lines.append(f"resumed after step {self.done}")
        if not block.enabled:
            lines.append(f"{BLOCK}.enabled is false: plain DeepSpeed")
        print("\n".join(lines), file=sys.stderr, flush=True)

    # ---- the run -------------------------------------------------------------------------------

    def train(self) -> None:
        """Train, save, and write model and result. Collective."""
        from textgen import train
        from textgen.progress import Progress

        switch = StopSwitch(self.peers)
        switch.listen()
        progress = Progress(self.flags.steps, self.done, enabled=self.peers.rank == 0)
        plan = train.Plan(
            steps=self.flags.steps,
            seed=self.flags.seed,
            done=self.done,
            rank=self.peers.rank,
            world_size=self.peers.world_size,
            eval_every=self.flags.eval_every,
            save_every=self.flags.save_every,
        )
        hooks = train.Hooks(
            sum_over_ranks=self.peers.sum,
            stop=switch.agreed,
            save=self._save,
            on_step=self._log_step,
            progress_fields=self._fields,
        )
        result = train.run(
            self.engine,
            self.data,
            plan,
            hooks=hooks,
            progress=progress,
            val_losses=self.val_losses,
        )
        switch.close()
        if self.peers.rank == 0:
            self._write_result(result)
        self._close()

    def _save(self, result: Any) -> None:
        """A checkpoint that `--resume` continues from. Collective."""
        self.engine.save_checkpoint(
            str(self.folder.checkpoints),
            tag=checkpoint_tag(result.steps),
            client_state={"steps": result.steps, "val_losses": list(result.val_losses)},
        )
        if self.peers.place.local_rank == 0:
            self.folder.drop_old_checkpoints()

    def _log_step(self, record: Any) -> None:
        """Where pruning runs it writes the log itself; elsewhere it gets the plain numbers."""
        if self.handle is None and self.peers.rank == 0:
            self.folder.append_log(dataclasses.asdict(record))

    def _fields(self) -> dict[str, str]:
        report = None if self.handle is None else self.handle.report
        if report is None:
            return {}
        fields = {} if report.loss is None else {"loss": f"{report.loss:.3f}"}
        performance = "-" if report.performance is None else f"{report.performance:.2f}"
        return fields | {
            "P": performance,
            "density": "dense" if report.density == 1.0 else f"{100 * report.density:.2f} %",
            "sent": f"{report.wire_bytes / 1e6:.2f} MB",
        }

    def _write_result(self, result: Any) -> None:
        from textgen.model import save_model

        with self.handle.shared_weights() if self.handle else contextlib.nullcontext():
            save_model(self.engine.module, self.tokenizer, self.folder.model)
        totals = None if self.handle is None else self.handle.totals
        document = {
            "steps": result.steps,
            "val_loss": result.val_losses[-1][1],
            "val_loss_start": result.val_losses[0][1],
            "wire_bytes": totals.wire_bytes if totals else 0,
            "dense_bytes": totals.dense_bytes if totals else 0,
            "density_min": totals.density_min if totals else None,
            "density_max": totals.density_max if totals else None,
            "stopped": result.stopped,
            "parameters": self.num_parameters,
            "val_losses": result.val_losses,
        }
        write_json(self.folder.result, document)
        if result.stopped:
            print(
                f"Stopped after step {result.steps}; continue with --resume.",
                file=sys.stderr,
                flush=True,
            )

    def _close(self) -> None:
        if self.handle is not None:
            self.handle.detach()
        self.peers.gather(None)  # rank 0 is done writing: a launcher may end us all now


def resolved_config(
    ds_config: dict[str, Any], block: GradientPruningConfig, folder: RunFolder, world_config: Any
) -> dict[str, Any]:
    """The configuration as it is used: batch sizes and our block filled in. Local, pure.

    It is valid input again. A `log_path` that is null becomes the run folder's.
    """
    block = block.model_copy(update={"log_path": block.log_path or str(folder.log)})
    return ds_config | {
        "train_batch_size": world_config.train_batch_size,
        "train_micro_batch_size_per_gpu": world_config.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": world_config.gradient_accumulation_steps,
        BLOCK: block.model_dump(mode="json"),
    }


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _show_warnings(rank: int) -> None:
    """Our library's warnings as plain lines, once."""
    handler = logging.StreamHandler() if rank == 0 else logging.NullHandler()
    logger = logging.getLogger("ds_gradprune")
    logger.handlers = [handler]
    logger.propagate = False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
