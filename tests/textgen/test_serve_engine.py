"""The engine: every request ends once, texts equal the replier's, models change under way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from ds_gradprune.errors import UnsupportedError
from tests.helpers.served import CONTEXT, write_model
from textgen.generate import Replier, Sampling
from textgen.serve.engine import End, Engine, Job, Piece, QueueFull
from textgen.serve.metrics import Metrics
from textgen.serve.served import Served, Writer
from textgen.serve.slots import Slots
from textgen.serve.sources import FolderSource
from textgen.serve.watch import Watcher

PROMPTS = ["the quick", "fox", "", "a lazy dog jumps over the " * 9, "the the the", "x" * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    return FolderSource(str(folder), "tiny").load(1024)


@pytest.fixture(scope="module")
def replier(folder: Path) -> Replier:
    return Replier.load(str(folder), "cpu")


class Asker:
    """Makes jobs and keeps what they were told."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[list[Any]] = []

    def ask(self, prompt: str, sampling: Sampling, **more: Any) -> Job:
        served = self.engine.served
        told: list[Any] = []
        self.events.append(told)
        more = {"deadline": float("inf")} | more
        ids, _ = served.encode(prompt, sampling.max_new_tokens)
        job = Job(served, prompt, ids, sampling, emit=told.append, **more)
        self.engine.submit([job])
        return job

    def run(self, turns: int = 400) -> None:
        """Turn the engine, without its thread, until nothing is left."""
        for _ in range(turns):
            if not (self.engine.num_waiting or self.engine.num_running):
                break
            self.engine.turn()
        assert not self.engine.num_waiting
        assert not self.engine.num_running

    def texts(self) -> list[str]:
        return ["".join(e.text for e in told if isinstance(e, Piece)) for told in self.events]

    def ends(self) -> list[str]:
        ends = [[e.reason for e in told if isinstance(e, End)] for told in self.events]
        assert all(len(reasons) == 1 for reasons in ends), "every request ends exactly once"
        return [reasons[0] for reasons in ends]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_equal_the_repliers_however_they_are_batched(
    served: Served, replier: Replier, temperature: float
) -> None:
    asker = Asker(Engine(served, rows=3, max_queue=100))
    samplings = [
        Sampling(temperature, top_p=0.9, max_new_tokens=3 + 5 * number, seed=number)
        for number in range(len(PROMPTS))
    ]
    for prompt, sampling in zip(PROMPTS, samplings, strict=True):
        asker.ask(prompt, sampling)
    asker.run()
    expected = [replier.reply(p, s) for p, s in zip(PROMPTS, samplings, strict=True)]
    assert asker.texts() == expected
    assert set(asker.ends()) <= {"stop", "length"}


def test_a_prompt_keeps_its_end_and_leaves_room_for_the_reply(served: Served) -> None:
    for prompt in PROMPTS:
        whole = served.tokenizer.encode(prompt) or [served.tokenizer.eos_token_id]
        for new in (1, 30, CONTEXT, 500):
            ids, cut = served.encode(prompt, new)
            assert ids == whole[cut:]
            room = min(CONTEXT - 1, max(CONTEXT - new, (CONTEXT + 1) // 2))
            assert len(ids) == min(len(whole), room)


def test_a_full_queue_refuses_and_says_when_to_come_back(served: Served) -> None:
    asker = Asker(Engine(served, rows=2, max_queue=3))
    for _ in range(5):
        asker.ask("fox", Sampling(max_new_tokens=2))
    with pytest.raises(QueueFull, match="try again in 3 s"):
        asker.ask("fox", Sampling(max_new_tokens=2))
    asker.events.pop()
    asker.run()
    assert asker.ends() == ["length"] * 5


def test_those_who_leave_and_those_who_take_too_long_end(served: Served) -> None:
    now = [0.0]
    asker = Asker(Engine(served, rows=2, max_queue=9, clock=lambda: now[0]))
    long = Sampling(temperature=0.0, max_new_tokens=40)
    running = [asker.ask("fox", long), asker.ask("the", long, deadline=5.0)]
    waiting = [asker.ask("dog", long), asker.ask("dog", long, deadline=5.0), asker.ask("x", long)]
    asker.engine.turn()
    assert (asker.engine.num_running, asker.engine.num_waiting) == (2, 3)
    running[0].cancel()
    waiting[0].cancel()
    now[0] = 6.0
    asker.engine.turn()
    asker.run()
    assert asker.ends() == ["cancelled", "timeout", "cancelled", "timeout", "length"]


def test_texts_that_leave_do_not_disturb_the_others(served: Served, replier: Replier) -> None:
    asker = Asker(Engine(served, rows=4, max_queue=9))
    sampling = Sampling(temperature=0.0, max_new_tokens=30)
    jobs = [asker.ask(prompt, sampling) for prompt in PROMPTS[:4]]
    for _ in range(4):
        asker.engine.turn()
    jobs[0].cancel()
    jobs[2].cancel()
    asker.ask("over the", sampling)
    asker.run()
    for number, prompt in ((1, PROMPTS[1]), (3, PROMPTS[3]), (4, "over the")):
        assert asker.texts()[number] == replier.reply(prompt, sampling)


def test_a_failing_pass_ends_its_texts_and_nothing_else(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asker = Asker(Engine(served, rows=2, max_queue=9))

    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(type(served.model), "forward", broken)
        asker.ask("fox", Sampling(max_new_tokens=2))
        asker.engine.turn()
    asker.ask("fox", Sampling(max_new_tokens=2))
    asker.run()
    assert asker.ends() == ["error", "length"]
    assert "MemoryError" in asker.events[0][-1].message
    assert "a pass of the model failed" in caplog.text


def test_close_ends_what_is_left(served: Served) -> None:
    engine = Engine(served, rows=1, max_queue=9)
    asker = Asker(engine)
    for _ in range(3):
        asker.ask("fox", Sampling(max_new_tokens=60, temperature=0.0))
    engine.start()
    engine.close()
    engine.close()
    assert set(asker.ends()) <= {"error", "length", "stop"}
    with pytest.raises(QueueFull, match="the queue is full"):
        asker.ask("fox", Sampling())


# ---- text ----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(text=st.text(max_size=20))
def test_pieces_make_up_the_text(served: Served, text: str) -> None:
    ids = served.tokenizer.encode(text + "é日🙂")
    writer = Writer(served.tokenizer)
    pieces = [writer.add(token) for token in ids] + [writer.end()]
    assert "".join(pieces) == served.tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("one END two STOP", ["STOP", "END"], "one "),
        ("ENDless", ["END"], ""),
        ("ends with EN", ["END"], "ends with EN"),
        ("aaab", ["aab"], "a"),
    ],
)
def test_stops_are_never_shown(served: Served, text: str, stops: list[str], expected: str) -> None:
    writer, said = Writer(served.tokenizer, stops), ""
    for token in served.tokenizer.encode(text):
        said += writer.add(token)
        if writer.stopped:
            break
    assert said + writer.end() == expected


# ---- models --------------------------------------------------------------------------------------


def test_a_newer_model_takes_over_between_requests(folder: Path, tmp_path: Path) -> None:
    source = FolderSource(str(write_model(tmp_path / "model", seed=0)), "tiny")
    engine = Engine(source.load(1024), rows=2, max_queue=9)
    asker = Asker(engine)
    lines: list[str] = []
    watcher = Watcher(source, engine, 1024, Metrics(), lines.append)
    old, sampling = Replier.load(source.path, "cpu"), Sampling(0.0, max_new_tokens=20)
    for prompt in ("fox", "the quick", "dog"):  # the third waits, and is answered by the newer one
        asker.ask(prompt, sampling)
    engine.turn()
    assert not watcher.look()
    write_model(tmp_path / "model", seed=1)
    new = Replier.load(source.path, "cpu")
    assert [watcher.look(), watcher.look(), watcher.look()] == [False, True, False]
    asker.ask("dog", sampling)
    asker.run()
    expected = [old.reply("fox", sampling), old.reply("the quick", sampling)]
    assert asker.texts() == [*expected, *[new.reply("dog", sampling)] * 2]
    assert old.reply("dog", sampling) != new.reply("dog", sampling)
    assert len(lines) == 1


def test_a_damaged_newer_model_is_told_once_and_not_taken(tmp_path: Path) -> None:
    source = FolderSource(str(write_model(tmp_path / "model")), "tiny")
    engine = Engine(source.load(1024))
    lines: list[str] = []
    watcher = Watcher(source, engine, 1024, Metrics(), lines.append)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    assert [watcher.look() for _ in range(4)] == [False] * 4
    assert len(lines) == 1
    assert "must be a readable model folder" in lines[0]
    (tmp_path / "model" / "config.json").unlink()
    assert source.version() is None
    assert not watcher.look()


def test_models_whose_layers_forget_are_refused() -> None:
    config = MistralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    with pytest.raises(UnsupportedError, match=r"attend to all earlier tokens.*SlidingWindow"):
        Slots(MistralForCausalLM(config), 2, 16)


def test_rows_of_shared_heads_and_rotary_positions_equal_generate(folder: Path) -> None:
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        max_position_embeddings=CONTEXT,
    )
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MistralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    replier = Replier(model, tokenizer, "cpu")
    asker = Asker(Engine(Served.of(model, tokenizer, "m", "1", 1024), rows=4))
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    for prompt in PROMPTS:
        asker.ask(prompt, sampling)
    asker.run()
    assert asker.texts() == [replier.reply(prompt, sampling) for prompt in PROMPTS]
