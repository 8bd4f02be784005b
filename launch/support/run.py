"""One run of launch/train.py from its data to its result, on every rank alike."""

from __future__ import annotations

import dataclasses
from typing import Any

from ds_gradprune.config import BLOCK, GradientPruningConfig
from textgen.data import START, Position

from .any_run import AnyRun, totals_of
from .checkpoints import load_checkpoint, save_checkpoint, whole_weights
from .peers import Peers, StopSwitch
from .run_folder import RunFolder, write_json
from .settings import Settings
from .shown import Validations, live_fields, say


class Run(AnyRun):
    """One run from its data to its result.

    Args:
        settings: flags and configuration.
        peers: all ranks.
        world_config: DeepSpeed's reading of it.
        text: what tells it from another.
        tag: of the checkpoint that the run goes on from; None: it begins.
    """

    def __init__(
        self, settings: Settings, peers: Peers, world_config: Any, text: str, tag: str | None
    ) -> None:
        super().__init__(settings, peers)
        self._begin(settings, world_config, text)
        model = self._prepare(settings, world_config)
        ds_config = resolved_config(settings.ds_config, settings.block, self.folder, world_config)
        self.on_first(lambda: write_json(self.folder.config, ds_config))
        with peers.during("starting the engine"):
            import ds_gradprune
            from ds_gradprune.deepspeed.monitor import StepLog

            self.engine, *_ = ds_gradprune.initialize(
                model=model, model_parameters=list(model.parameters()), config=ds_config
            )
            handle = getattr(self.engine, "gradprune", None)
            self.handle = None if handle is None or handle.idle else handle
            self.since, self.val_losses, self.steps_done = START, list[tuple[int, float]](), 0
            if peers.joins:
                self._join()
            elif tag is not None:
                self._resume(tag)
            # Where pruning runs it writes the log itself; elsewhere it gets the plain numbers.
            is_plain = self.handle is None and peers.rank == 0
            self._plain_log = StepLog(str(self.folder.log) if is_plain else None)
            self._plain_log.rewind(self.since.step)
        if self.handle is not None and self.handle.crew is not None:
            self.handle.tells = self._tells
        peers.standing = self.standing
        peers.adopt(self.handle)
        self._tell_start(settings)

    # ---- before the first step -----------------------------------------------------------------

    def _begin(self, settings: Settings, world_config: Any, text: str) -> None:
        """Claim or take over the folder. Collective."""
        identity = {
            "--model": self.flags.model,
            "--text": None if self.flags.text is None else str(self.flags.text),
            "--seed": self.flags.seed,
            "train_micro_batch_size_per_gpu": world_config.train_micro_batch_size_per_gpu,
            "gradient_accumulation_steps": world_config.gradient_accumulation_steps,
            "optimizer.type": settings.ds_config["optimizer"].get("type"),
        }
        notes = {"text": text, "optimizer": settings.ds_config["optimizer"]}
        before = self.claim(identity, notes)
        if before.get("text", text) != text:
            self.say(f"note: --text has changed; the run goes on with {self.folder.data}")
        optimizer = before.get("optimizer", notes["optimizer"])
        if optimizer != notes["optimizer"]:
            self.say(
                f"note: optimizer has changed in --config; the run goes on with {optimizer}, "
                "which its checkpoint brings"
            )
            settings.ds_config["optimizer"] = optimizer

    def _prepare(self, settings: Settings, world_config: Any) -> Any:
        """Tokens, tokenizer and model; the model is returned. Collective."""
        from textgen.data import TokenData
        from textgen.model import open_model, sequence_length
        from textgen.prepare import prepare, prepared_tokenizer

        def tokens_on(is_mine: bool) -> None:
            if is_mine:
                prepare(self.folder.data, self.flags.text, self.flags.model)

        peers = self.peers
        peers.patiently(lambda: tokens_on(peers.rank == 0))
        # Then every host that does not see rank 0's files.
        peers.patiently(lambda: tokens_on(peers.place.local_rank == 0))
        self.tokenizer = peers.together(lambda: prepared_tokenizer(self.folder.data))
        model = peers.patiently(
            lambda: open_model(self.flags.model, self.tokenizer, self.flags.seed)
        )
        self.num_parameters = model.num_parameters()
        self.data = peers.together(
            lambda: TokenData(self.folder.data, sequence_length(model), self.flags.seed)
        )
        shapes = [[name, list(weight.shape)] for name, weight in model.named_parameters()]
        peers.check_alike({"tokens": self.data.meta.digest, "parameters of the model": shapes})
        peers.together(lambda: self.data.check_batch(world_config.train_batch_size))
        return model

    def _tells(self) -> dict[str, Any]:
        """What a rank that comes back must know of the run. Local."""
        return {"since": dataclasses.astuple(self.since), "val_losses": list(self.val_losses)}

    def _join(self) -> None:
        """Take part in the run that goes on. Collective: its ranks do so before their next step."""
        assert self.handle is not None
        say(f"rank {self.peers.rank} waits until the run lets it in")
        state = self.handle.join()
        self.since, self.val_losses = Position(*state["since"]), state["val_losses"]
        self.steps_done = int(self.engine.global_steps)
        say(f"rank {self.peers.rank} takes part again after step {self.steps_done}")

    def _resume(self, tag: str) -> None:
        """Load a checkpoint. Collective."""
        state = load_checkpoint(self.engine, self.folder, tag)
        self.since = Position(*state["position"])
        self.steps_done = self.since.step
        self.val_losses = [(int(step), float(loss)) for step, loss in state["val_losses"]]
        if state["world_size"] != self.peers.world_size:
            self.say(
                f"note: {state['world_size']} ranks have trained so far, now "
                f"{self.peers.world_size}: a step takes {self._windows_per_step()} sequences"
            )

    def _windows_per_step(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        micro_steps: int = self.engine.gradient_accumulation_steps()
        micro_batch: int = self.engine.train_micro_batch_size_per_gpu()
        return micro_steps * micro_batch * self.peers.world_size

    def _tell_start(self, settings: Settings) -> None:
        self.say(
            f"model {self.flags.model}: {self.num_parameters:,} parameters; text: "
            f"{self.data.meta.num_tokens:,} tokens from {self.data.meta.source}; "
            f"{self.peers.world_size} ranks"
        )
        if self.since.step:
            self.say(f"resumed after step {self.since.step}")
        if settings.note:
            self.say(settings.note)
        self.say_if_plain(settings.block.enabled)

    # ---- the run -------------------------------------------------------------------------------

    def train(self) -> None:
        """Train, save, and write model and result. Collective."""
        from textgen import train
        from textgen.progress import Progress

        switch = StopSwitch(self.peers, self.handle)
        switch.listen()
        progress = Progress(self.flags.steps, self.steps_done, enabled=self.peers.rank == 0)
        self.messages.show = progress.note
        plan = train.Plan(
            steps=self.flags.steps,
            seed=self.flags.seed,
            done=self.steps_done,
            since=self.since,
            rank=self.peers.rank,
            world_size=self.peers.world_size,
            eval_every=self.flags.eval_every,
            save_every=self.flags.save_every,
        )
        tokens_per_step = self._windows_per_step() * self.data.seq_len
        validations = Validations(self.folder.path / "validation.json", self.engine)
        validations.resume(self.steps_done)

        def validated(result: Any, own_loss: float | None) -> None:
            self.val_losses = result.val_losses
            self.on_first(lambda: validations.add(result.val_losses, own_loss))

        hooks = train.Hooks(
            sum_over_ranks=self.peers.sum,
            share=self._share,
            stop=switch.agreed,
            save=self._save,
            on_step=self._log_step,
            progress_fields=lambda record: live_fields(self.handle, record, tokens_per_step),
            on_validation=validated,
            measures_own=self.handle is not None and self.handle.config.prune == "update",
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
        self._finish(result)

    def _share(self) -> tuple[int, int]:
        """Which part of the validation text is this rank's, and how many there are."""
        crew = self.peers.crew
        if crew is None:
            return self.peers.rank, self.peers.world_size
        return crew.place, crew.world_size

    def _save(self, result: Any) -> None:
        """A checkpoint that `--resume` continues from. Collective."""
        position = self.data.position(result.steps, self._windows_per_step(), self.since)
        state = {
            "position": dataclasses.astuple(position),
            "world_size": self.peers.world_size,
            "val_losses": list(result.val_losses),
        }
        with self.peers.during("saving a checkpoint"):
            save_checkpoint(self.engine, self.folder, self.peers, result.steps, state)

    def _log_step(self, record: Any) -> None:
        self.steps_done = record.step
        self._plain_log.write(record)

    def _finish(self, result: Any) -> None:
        """Write model and result; rank 0 is done writing when this returns. Collective."""
        from textgen.model import save_model

        with self.peers.during("writing the model"), whole_weights(self.engine):
            self.on_first(lambda: save_model(self.engine.module, self.tokenizer, self.folder.model))
        self.on_first(lambda: write_json(self.folder.result, self._document(result)))
        self._plain_log.close()
        self.say_end(result.val_losses, stopped=result.stopped)
        if self.handle is not None:
            self.handle.detach()

    def _document(self, result: Any) -> dict[str, Any]:
        return {
            "steps": result.steps,
            "val_loss": result.val_losses[-1][1],
            "val_loss_start": result.val_losses[0][1],
            **totals_of(self.handle),
            "islands_left": None if self.peers.crew is None else len(self.peers.crew.islands),
            "stopped": result.stopped,
            "parameters": self.num_parameters,
            "val_losses": result.val_losses,
        }


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
