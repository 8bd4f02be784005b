"""One fine-tuning from model and data to its result, on every rank alike."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import transformers

from ds_gradprune.errors import ConfigError
from ds_gradprune.trainer import follow
from textgen.model import save_model

from .any_run import AnyRun, totals_of
from .checkpoints import whole_or_nothing, whole_weights
from .peers import Peers, StopSwitch
from .place import Place
from .resumed import resumed_tag
from .run_folder import KEPT_CHECKPOINTS, write_json
from .tuning_data import TuningData, collate, read_data
from .tuning_model import add_adapters, load_tuned, pad_id_of, replies
from .tuning_order import Order, Since, read_since, write_since
from .tuning_settings import TuningSettings

LOG_LINES = 20
"""The Trainer writes so many lines about a run."""


class TuningRun(AnyRun):
    """One run from its data to its result. All methods are collective.

    Args:
        settings: flags and configuration.
        peers: all ranks.
        prompts: replied to before and after.

    Raises:
        ConfigError, DataError: something cannot be used; on all ranks alike.
    """

    def __init__(self, settings: TuningSettings, peers: Peers, prompts: list[str]) -> None:
        super().__init__(settings, peers)
        self._prompts = prompts
        tag = resumed_tag(peers, self.folder) if self.flags.resume else None
        self._resumed = None if tag is None else self.folder.checkpoints / tag
        self._begin(settings)
        arguments = peers.together(lambda: _arguments(settings, peers.place))
        self.model, self.tokenizer = peers.patiently(lambda: load_tuned(self.flags.model))
        if self.flags.lora:
            self.model = add_adapters(self.model)
        self.data = self._read_data()
        weights = [[n, list(w.shape)] for n, w in self.model.named_parameters()]
        self.counts = _counts(self.model)
        peers.check_alike({"tokens": self.data.digest, "parameters of the model": weights})
        self.on_first(lambda: write_json(self.folder.config, settings.ds_config))
        self.since = self._since()
        self.notes = Notes(self)
        self.trainer = transformers.Trainer(
            model=self.model,
            args=arguments,
            train_dataset=Order(
                self.data.train, self.flags.seed, self.flags.steps, self.per_step, self.since
            ),
            eval_dataset=self.data.evaluation,
            data_collator=partial(collate, pad_id=pad_id_of(self.tokenizer)),
            callbacks=[self.notes],
        )
        follow(self.trainer)
        peers.standing = self.standing
        self._tell_start(settings)

    def train(self) -> None:
        """Train, evaluate, and write model and result."""
        resumed, trainer = self._resumed, self.trainer
        with whole_or_nothing(self.folder, lambda: f"checkpoint-{trainer.state.global_step}"):
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        state = trainer.state
        if not any(step == state.global_step for step, _ in _losses(state, "eval_loss")):
            trainer.evaluate()
        engine: Any = trainer.model_wrapped
        with self.peers.during("writing the model"):
            with whole_weights(engine):
                after = replies(self.model, self.tokenizer, self._prompts)
                self.on_first(self._save_model)
            self.on_first(lambda: write_json(self.folder.result, self._document(after)))
        self.say_end(_losses(state, "eval_loss"), stopped=state.global_step < self.flags.steps)

    # ---- before the first step -----------------------------------------------------------------

    def _begin(self, settings: TuningSettings) -> None:
        """Claim or take over the folder."""
        config = settings.ds_config
        identity = {
            "--model": self.flags.model,
            "--lora": self.flags.lora,
            "--max-length": self.flags.max_length,
            "--seed": self.flags.seed,
            "train_micro_batch_size_per_gpu": config["train_micro_batch_size_per_gpu"],
            "gradient_accumulation_steps": config["gradient_accumulation_steps"],
            "zero_optimization.stage": config["zero_optimization"].get("stage", 0),
        }
        self.claim(identity, {})
        self.per_step = (
            self.peers.world_size
            * config["train_micro_batch_size_per_gpu"]
            * config["gradient_accumulation_steps"]
        )

    def _since(self) -> Since:
        """Where the run begins, or goes on; rank 0's host knows."""
        path = self._resumed
        if path is None:
            return Since()
        work = (lambda: vars(read_since(path))) if self.peers.rank == 0 else dict
        return Since(**self.peers.gather(self.peers.together(work))[0])

    def _read_data(self) -> TuningData:
        flags = self.flags
        return self.peers.patiently(
            lambda: read_data(flags.data, self.tokenizer, flags.max_length, flags.seed)
        )

    def _tell_start(self, settings: TuningSettings) -> None:
        data = self.data
        self.say(
            f"model {self.flags.model}: {self.counts[True]:,} parameters are trained, "
            f"{self.counts[False]:,} are frozen; "
            f"{len(data.train):,} sequences, {len(data.evaluation)} for evaluation; "
            f"{self.peers.world_size} ranks"
        )
        if data.num_skipped:
            self.say(
                f"note: {data.num_skipped} examples are left out, because their answers begin "
                f"beyond --max-length {self.flags.max_length}"
            )
        if self.since.ranks not in (0, self.peers.world_size):
            self.say(
                f"note: {self.since.ranks} ranks have trained so far, now {self.peers.world_size}: "
                f"a step takes {self.per_step} sequences"
            )
        self.say_if_plain(settings.block.enabled)

    # ---- after the last ------------------------------------------------------------------------

    def _save_model(self) -> None:
        """Local; inside `whole_weights`."""
        model = self.model
        if self.flags.lora:
            model.save_pretrained(str(self.folder.path / "adapter"))
            model = model.merge_and_unload()
        save_model(model, self.tokenizer, self.folder.model)

    def _document(self, after: list[str]) -> dict[str, Any]:
        state, notes = self.trainer.state, self.notes
        evaluated = _losses(state, "eval_loss")
        engine: Any = self.trainer.model_wrapped
        before: list[str | None] = list(notes.before) or [None] * len(after)
        return {
            "steps": state.global_step,
            "val_loss": evaluated[-1][1],
            "val_loss_start": evaluated[0][1],
            "val_losses": evaluated,
            "train_losses": _losses(state, "loss"),
            "seconds": notes.seconds,
            "step_s": _median(notes.step_s),
            "step_cpu_s": _median(notes.step_cpu_s),
            **totals_of(engine.gradprune),
            "parameters": sum(self.counts.values()),
            "trained_parameters": self.counts[True],
            "sequences": len(self.data.train),
            "stopped": state.global_step < self.flags.steps,
            "replies": [
                {"prompt": prompt, "before": old, "after": new}
                for prompt, old, new in zip(self._prompts, before, after, strict=True)
            ],
        }


class Notes(transformers.TrainerCallback):
    """What happens beside the training: replies before it, times, checkpoints named, stopping.

    Attributes:
        before: replies of the model as it was; empty if there are no prompts, or after a resume.
        step_s: seconds of every step from its first forward to its end.
        step_cpu_s: seconds that all cores together have worked for this process meanwhile.
        seconds: of the whole training, evaluations included.
    """

    def __init__(self, run: TuningRun) -> None:
        self.before: list[str] = []
        self.step_s: list[float] = []
        self.step_cpu_s: list[float] = []
        self.seconds = 0.0
        self._run = run
        self._switch = StopSwitch(run.peers)
        self._begin_s = self._step_begin_s = self._step_begin_cpu_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine is there, the model as it was given."""
        run = self._run
        run.steps_done = state.global_step
        if not run.flags.resume:
            self.before = replies(kwargs["model"], run.tokenizer, run._prompts)
        self._switch.listen()
        self._begin_s = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first micro-step begins."""
        self._step_begin_s, self._step_begin_cpu_s = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All ranks stop after the same step, if one is asked to."""
        self._run.steps_done = state.global_step
        self.step_s.append(time.perf_counter() - self._step_begin_s)
        self.step_cpu_s.append(time.process_time() - self._step_begin_cpu_s)
        if self._switch.agreed():
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All ranks have written: this is the checkpoint to resume from."""
        run, step = self._run, state.global_step
        used = Since(step, run.since.after(step, run.per_step), run.peers.world_size)
        name = f"checkpoint-{step}"
        run.on_first(lambda: write_since(run.folder.checkpoints / name, used))
        run.on_first(lambda: run.folder.name_newest(name))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening."""
        self.seconds = time.perf_counter() - self._begin_s
        self._switch.close()


def _arguments(settings: TuningSettings, place: Place) -> Any:
    """The Trainer's arguments; what the DeepSpeed configuration says, they say, too. Local."""
    from deepspeed.accelerator import get_accelerator

    flags, config = settings.flags, settings.ds_config
    params = config["optimizer"]["params"]
    names = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
    options = {names[key]: value for key, value in params.items() if key in names}
    if "betas" in params:
        options["adam_beta1"], options["adam_beta2"] = params["betas"]
    try:
        return transformers.TrainingArguments(
            output_dir=str(settings.folder.checkpoints),
            max_steps=flags.steps,
            per_device_train_batch_size=config["train_micro_batch_size_per_gpu"],
            per_device_eval_batch_size=config["train_micro_batch_size_per_gpu"],
            gradient_accumulation_steps=config["gradient_accumulation_steps"],
            max_grad_norm=config["gradient_clipping"],
            bf16=config["bf16"]["enabled"],
            use_cpu=get_accelerator().device_name() == "cpu",
            deepspeed=dict(config),
            logging_steps=max(1, flags.steps // LOG_LINES),
            eval_strategy="steps",
            eval_steps=flags.eval_every or flags.steps,
            eval_on_start=not flags.resume,
            save_strategy="steps" if flags.save_every else "no",
            save_steps=flags.save_every or flags.steps,
            save_total_limit=KEPT_CHECKPOINTS,
            train_sampling_strategy="sequential",  # `Order` has mixed them
            report_to=[],
            seed=flags.seed,
            disable_tqdm=place.rank != 0,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **options,
        )
    except (TypeError, ValueError) as exc:
        reason = " ".join(str(exc).split())
        raise ConfigError(f"transformers refuses the configuration: {reason}") from exc


def _counts(model: Any) -> dict[bool, int]:
    """Number of parameters that are trained (true), and that are frozen; stage 3 or not."""
    counts = {True: 0, False: 0}
    for weight in model.parameters():
        counts[weight.requires_grad] += getattr(weight, "ds_numel", weight.numel())
    return counts


def _median(seconds: list[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


def _losses(state: Any, name: str) -> list[tuple[int, float]]:
    """(step, loss) of every line of the Trainer's history that has it."""
    return [(int(line["step"]), float(line[name])) for line in state.log_history if name in line]
