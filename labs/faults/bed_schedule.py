"""Schedules for the bed, drawn from a seed, and what their runs train on."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 10.0
"""`gradient_pruning.timeout_s` of these runs."""

DEEDS = ("kill", "stop", "down", "outage", "one way", "one way for a while", "rate")
LASTING = ("kill", "stop", "down", "one way")


@dataclass(frozen=True)
class BedSchedule:
    """One run on a bed.

    Attributes:
        hosts: 2 or 3.
        mode: "update", "gradient", or "lost": updates with `min_islands`.
        rate: of all links.
        supervised: started by launch/supervise.py.
        deed: see `DEEDS`.
        host: to which it is done.
        step: after which it is done.
        for_s: how long what passes lasts.
        steps: of the run.
        ranks: on each host; together they are an island.
    """

    hosts: int
    mode: str
    rate: str
    supervised: bool
    deed: str
    host: int
    step: int
    for_s: float
    steps: int = 160
    ranks: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.hosts * self.ranks

    @property
    def victim(self) -> int:
        """The rank that is killed or frozen: the last one of its host."""
        return (self.host + 1) * self.ranks - 1

    def ranks_of(self, host: int) -> range:
        """The ranks on a host."""
        return range(host * self.ranks, (host + 1) * self.ranks)


def draw(seed: int, number: int) -> BedSchedule:
    """Schedule `number` of a seed; the deeds take turns."""
    chance = random.Random(f"bed {seed}/{number}")
    hosts = chance.choice([2, 3])
    return BedSchedule(
        hosts=hosts,
        mode=chance.choice(["update", "update", "gradient"]),
        rate=chance.choice(["20mbit", "100mbit", "1gbit"]),
        supervised=number // len(DEEDS) % 3 != 2,
        deed=DEEDS[number % len(DEEDS)],
        host=chance.randrange(hosts),
        step=chance.randint(25, 60),
        for_s=chance.uniform(2.0, 5.0),
    )


def write_inputs(folder: Path) -> None:
    """A text, a model of two layers and a configuration for each mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from textgen.corpus import open_text
    from textgen.model import save_model
    from textgen.tokenizer import train_tokenizer

    text = folder / "text.txt"
    text.write_text("".join(f"{i}. the fox sees the {i * 7 % 13} hens\n" for i in range(3000)))
    tokenizer = train_tokenizer(open_text(text), 300)
    shape = {"n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = GPT2Config(vocab_size=len(tokenizer), **shape, **special)
    save_model(GPT2LMHeadModel(config), tokenizer, folder / "model")
    for mode in ("update", "gradient", "lost"):
        block = {
            "prune": "gradient" if mode == "gradient" else "update",
            "min_islands": 1 if mode == "lost" else None,
            "warmup_steps": 3,
            "ramp_steps": 0,
            "window_size": 4,
            "density": {"initial": 0.05, "min": 0.05, "max": 0.05},
            "timeout_s": TIMEOUT_S,
            "verify_every_steps": 10,
        }
        document = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "gradient_pruning": block,
        }
        (folder / f"{mode}.json").write_text(json.dumps(document))
