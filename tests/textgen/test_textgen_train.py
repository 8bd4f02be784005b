"""The loop, with a stand-in for DeepSpeed's engine: it learns, resumes, stops, and counts.

Longer than 300 lines: one stand-in engine and all that the loop does with it.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from textgen.corpus import Document, TextSource
from textgen.data import TokenData, write_tokens
from textgen.progress import Progress
from textgen.tokenizer import encode, train_tokenizer
from textgen.train import Hooks, Plan, StepRecord, TrainResult, run

SEQ_LEN = 16


class Engine:
    """One rank of a DeepSpeed engine: accumulates, steps at the boundary, counts calls."""

    def __init__(self, dropout: float = 0.0, micro_steps: int = 1, micro_batch: int = 4) -> None:
        torch.manual_seed(0)
        self.module = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=300,
                n_positions=SEQ_LEN,
                n_embd=32,
                n_layer=2,
                n_head=2,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
        self.module.loss_type = "ForCausalLM"
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=3e-3)
        self.device = torch.device("cpu")
        self._micro_steps, self._micro_batch = micro_steps, micro_batch
        self._micro_step = 0
        self.calls: list[str] = []

    def __call__(self, **inputs: Any) -> Any:
        self.calls.append("forward" if torch.is_grad_enabled() else "validate")
        assert self.module.training == torch.is_grad_enabled()
        return self.module(**inputs)

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append("backward")
        (loss / self._micro_steps).backward()

    def step(self) -> None:
        self.calls.append("step")
        self._micro_step += 1
        if self._micro_step % self._micro_steps == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradient_accumulation_steps(self) -> int:
        return self._micro_steps

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._micro_batch

    def state(self) -> Any:
        return copy.deepcopy((self.module.state_dict(), self.optimizer.state_dict()))

    def load(self, state: Any) -> None:
        self.module.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = TextSource(
        "fox", (Document("one", text="the quick brown fox jumps over the lazy dog\n" * 1000),)
    )
    tokenizer = train_tokenizer(source, 300)
    path = tmp_path_factory.mktemp("tokens")
    write_tokens(path, encode(source, tokenizer), 300, "fox")
    return path


@pytest.fixture
def data(folder: Path) -> TokenData:
    return TokenData(folder, SEQ_LEN, seed=5)


def trained(
    engine: Engine, data: TokenData, plan: Plan, hooks: Hooks | None = None, **options: Any
) -> TrainResult:
    progress = Progress(plan.steps, plan.done, stream=io.StringIO())
    return run(engine, data, plan, hooks=hooks or Hooks(), progress=progress, **options)


def test_loss_falls_on_the_tiny_text(data: TokenData) -> None:
    result = trained(Engine(), data, Plan(steps=60, seed=0))
    [(first, start), (last, end)] = result.val_losses
    assert (first, last, result.steps) == (0, 60, 60)
    # An untrained model is even over 300 tokens: ln 300 = 5.7. The text repeats one line of 12
    # tokens, so a model that has learned it is close to certain.
    assert start == pytest.approx(5.7, abs=0.3)
    assert end < 1.0


def test_each_micro_step_goes_through_the_engine(data: TokenData) -> None:
    engine = Engine(micro_steps=3)
    trained(engine, data, Plan(steps=2, seed=0))
    calls = [call for call in engine.calls if call != "validate"]
    assert calls == ["forward", "backward", "step"] * 6


def test_validation_is_due_at_start_intervals_and_end(data: TokenData) -> None:
    result = trained(Engine(), data, Plan(steps=5, seed=0, eval_every=2))
    assert [step for step, _ in result.val_losses] == [0, 2, 4, 5]
    result = trained(Engine(), data, Plan(steps=4, seed=0, eval_every=2))
    assert [step for step, _ in result.val_losses] == [0, 2, 4]


def test_validation_and_progress_do_not_change_the_run(data: TokenData) -> None:
    quiet, busy = Engine(dropout=0.3), Engine(dropout=0.3)
    trained(quiet, data, Plan(steps=4, seed=3))

    def disturb(record: StepRecord) -> None:
        torch.rand(record.step)

    trained(busy, data, Plan(steps=4, seed=3, eval_every=1), Hooks(on_step=disturb))
    assert_equal(quiet, busy)


def assert_equal(one: Engine, other: Engine) -> None:
    for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_resumed_run_equals_an_unbroken_one(data: TokenData, folder: Path, cut: int) -> None:
    losses: dict[str, list[float]] = {"whole": [], "parts": []}

    def note(name: str) -> Callable[[StepRecord], None]:
        return lambda record: losses[name].append(record.loss)

    whole, first = Engine(dropout=0.3, micro_steps=2), Engine(dropout=0.3, micro_steps=2)
    unbroken = trained(
        whole, data, Plan(steps=6, seed=3, eval_every=2), Hooks(on_step=note("whole"))
    )
    begun = trained(
        first,
        data,
        Plan(steps=6, seed=3, eval_every=2),
        Hooks(on_step=note("parts"), stop=lambda: len(losses["parts"]) == cut),
    )
    assert begun.stopped
    assert begun.steps == cut
    second = Engine(dropout=0.3, micro_steps=2)
    second.load(first.state())
    torch.rand(7)
    resumed = trained(
        second,
        TokenData(folder, SEQ_LEN, seed=5),
        Plan(steps=6, seed=3, eval_every=2, done=cut),
        Hooks(on_step=note("parts")),
        val_losses=begun.val_losses,
    )
    assert losses["parts"] == losses["whole"]
    assert resumed.val_losses == unbroken.val_losses
    assert_equal(whole, second)


def test_model_loaded_for_evaluation_is_trained_with_dropout(data: TokenData) -> None:
    engine = Engine(dropout=0.3)
    engine.module.eval()
    trained(engine, data, Plan(steps=2, seed=0, done=1), val_losses=[(0, 5.0)])
    assert engine.calls[:3] == ["forward", "backward", "step"]  # asserts the mode itself


def test_saves_are_due_at_intervals_at_a_stop_and_at_the_end(data: TokenData) -> None:
    saved: list[tuple[int, int]] = []

    def save(result: TrainResult) -> None:
        saved.append((result.steps, len(result.val_losses)))

    trained(Engine(), data, Plan(steps=5, seed=0, save_every=2), Hooks(save=save))
    assert saved == [(2, 1), (4, 1), (5, 2)]
    saved.clear()
    result = trained(
        Engine(), data, Plan(steps=5, seed=0, save_every=2), Hooks(save=save, stop=lambda: True)
    )
    assert saved == [(1, 1)]
    assert result.stopped
    assert result.val_losses[-1][0] == 0  # a stop does not wait for a validation


def test_stop_at_the_last_step_is_the_end(data: TokenData) -> None:
    steps: list[int] = []
    hooks = Hooks(on_step=lambda r: steps.append(r.step), stop=lambda: len(steps) == 3)
    result = trained(Engine(), data, Plan(steps=3, seed=0), hooks)
    assert not result.stopped
    assert [step for step, _ in result.val_losses] == [0, 3]


def test_finished_run_does_nothing_more(data: TokenData) -> None:
    engine = Engine()
    val_losses = [(0, 5.0), (3, 4.0)]
    result = trained(engine, data, Plan(steps=3, seed=0, done=3), val_losses=val_losses)
    assert engine.calls == []
    assert (result.steps, result.val_losses) == (3, val_losses)


def test_validation_loss_is_the_mean_over_all_ranks_sequences(data: TokenData) -> None:
    alone = trained(Engine(), data, Plan(steps=0, seed=0)).val_losses[0][1]
    sums: list[list[float]] = []
    for rank in range(3):

        def keep(values: Any) -> list[float]:
            sums.append(list(values))
            return list(values)

        plan = Plan(steps=0, seed=0, rank=rank, world_size=3)
        trained(Engine(), data, plan, Hooks(sum_over_ranks=keep))
    total, count = (sum(column) for column in zip(*sums, strict=True))
    # The same float32 losses added in another order, in float64: equal but for its rounding.
    assert total / count == pytest.approx(alone, rel=1e-12)


def test_ranks_draw_different_dropout(data: TokenData) -> None:
    seeds: list[int] = []
    real = torch.manual_seed

    def note(seed: int) -> torch.Generator:
        seeds.append(seed)
        return real(seed)

    engines = [Engine(micro_steps=2), Engine(micro_steps=2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", note)
        for rank, engine in enumerate(engines):
            trained(engine, data, Plan(steps=2, seed=0, rank=rank, world_size=2))
    assert len(seeds) == len(set(seeds)) == 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_progress_shows_loss_fields_and_time(data: TokenData) -> None:
    stream = io.StringIO()
    hooks = Hooks(progress_fields=lambda r: {"loss": f"{r.loss:.2f}", "density": "5.00 %"})
    plan = Plan(steps=1, seed=0)
    run(Engine(), data, plan, hooks=hooks, progress=Progress(1, stream=stream))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("validation loss 5.")
    assert lines[1].startswith("step 1/1  loss 5.")
    assert "  density 5.00 %  time 0." in lines[1]


class Island(Engine):
    """An engine that sees other weights with gradients than without, in evaluation."""

    def __call__(self, **inputs: Any) -> Any:
        if self.module.training or not torch.is_grad_enabled():
            return super().__call__(**inputs)
        self.calls.append("validate own")
        return SimpleNamespace(loss=torch.tensor(1.5, requires_grad=True))


def test_own_weights_are_validated_beside_the_shared_ones(data: TokenData) -> None:
    stream, engine = io.StringIO(), Island()
    seen: list[tuple[int, float | None]] = []
    hooks = Hooks(
        measures_own=True,
        on_validation=lambda result, own: seen.append((len(result.val_losses), own)),
    )
    plan = Plan(steps=2, seed=0, eval_every=1)
    run(engine, data, plan, hooks=hooks, progress=Progress(2, stream=stream))
    # Before the first step all weights are alike.
    assert seen == [(1, None), (2, 1.5), (3, 1.5)]
    assert "(own weights 1.5000) after step 1" in stream.getvalue()
    assert engine.calls.count("validate own") * 3 == engine.calls.count("validate") * 2


def test_engine_needs_no_more_than_it_documents(data: TokenData) -> None:
    inner = Engine()
    names = ("backward", "step", "train", "device")
    needed = {name: getattr(inner, name) for name in names}
    needed |= {
        "gradient_accumulation_steps": lambda: 1,
        "train_micro_batch_size_per_gpu": lambda: 4,
    }

    class Bare(SimpleNamespace):
        def __call__(self, **inputs: Any) -> Any:
            return inner(**inputs)

    result = run(
        Bare(**needed),
        data,
        Plan(steps=1, seed=0),
        hooks=Hooks(),
        progress=Progress(1, enabled=False),
    )
    assert result.steps == 1
