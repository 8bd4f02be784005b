"""One rank of one method: trains on command.

A command is one line of JSON on standard input, its answer one line of JSON on standard output:

    {"do": "train", "steps": 20, "eval_every": 10}    -> {"steps": [...], "validations": [...],
                                                          "rest_bytes": ..., "peak_bytes": ...}
    {"do": "stop"}                                    -> the process ends

`eval_every` null: no validation. All ranks must be given the same commands. Between commands
nothing is sent, so whoever commands may count bytes or change the link.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from labs.race.engines import Engine, open_engine
from labs.race.job import Job
from labs.race.methods import parse_method
from labs.smollm2 import model_folder
from launch.support.start import end_process
from textgen.data import TokenData
from textgen.model import SIZES, open_model, quiet_transformers
from textgen.prepare import prepared_tokenizer


class Worker:
    """Everything between commands.

    Attributes:
        done: steps trained so far.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        tokenizer = prepared_tokenizer(Path(job.data))
        name = job.recipe.model if job.recipe.model in SIZES else str(model_folder(Path(job.data)))
        model = open_model(name, tokenizer, job.seed)
        self.num_parameters = model.num_parameters()
        self._data = TokenData(Path(job.data), job.recipe.seq_len, job.seed)
        self._engine: Engine = open_engine(parse_method(job.method), model, job.recipe)
        self._engine.module.train()
        self.done = 0

    def train(self, steps: int, eval_every: int | None) -> dict[str, Any]:
        """Train on, and validate after every `eval_every` steps of the run. Collective."""
        validations = []
        if eval_every is not None and self.done == 0:
            validations.append([0, *self._validate()])
        self._engine.calibrate(self._tokens())
        records = []
        for _ in range(steps):
            tokens = self._tokens()
            self.done += 1
            record = self._engine.step(tokens, self.done)
            records.append(dataclasses.asdict(record) | {"step": self.done})
            if eval_every is not None and self.done % eval_every == 0:
                validations.append([self.done, *self._validate()])
        return {"steps": records, "validations": validations, **resident()}

    def _tokens(self) -> torch.Tensor:
        return self._data.sample_batch(
            self.done,
            0,
            micro_steps=1,
            micro_batch=self._job.recipe.micro_batch,
            rank=self._job.rank,
            world_size=self._job.world_size,
        )

    def _validate(self) -> tuple[float, int]:
        """Sum of losses over this rank's share of the validation sequences, and their number."""
        total, count = 0.0, 0
        job, most = self._job, self._job.recipe.eval_sequences
        self._engine.module.eval()
        with torch.no_grad():
            for batch in self._data.validation_batches(
                job.recipe.micro_batch,
                job.rank,
                job.world_size,
                **({} if most is None else {"most": most}),
            ):
                # Also where none of them counts: under ZeRO-3 a forward pass is collective.
                loss = self._engine.module(input_ids=batch.tokens, labels=batch.tokens).loss
                total += float(loss) * batch.num_sequences
                count += batch.num_sequences
        self._engine.module.train()
        return total, count


def resident() -> dict[str, int]:
    """Memory of this process now, and at most so far, in bytes. Local."""
    lines = Path("/proc/self/status").read_text().splitlines()
    words = {line.partition(":")[0]: line.split()[1:] for line in lines}
    names = {"rest_bytes": "VmRSS", "peak_bytes": "VmHWM"}
    return {name: 1024 * int(words[field][0]) for name, field in names.items()}


def main() -> None:
    """Join the others, then obey."""
    answers = _take_stdout()
    torch.set_num_threads(1)
    quiet_transformers()
    job = Job.from_json(sys.argv[1])
    # DeepSpeed asks for what a launcher would have set.
    per_host = job.recipe.ranks_per_host
    os.environ |= {
        "RANK": str(job.rank),
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_RANK": str(job.rank % per_host),
        "LOCAL_SIZE": str(per_host),
    }
    dist.init_process_group(
        "gloo", init_method=f"file://{job.store}", rank=job.rank, world_size=job.world_size
    )
    worker = Worker(job)
    _answer(answers, {"parameters": worker.num_parameters})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            break
        result = worker.train(command["steps"], command["eval_every"])
        dist.barrier()  # no rank's last bytes are still under way when all have answered
        _answer(answers, result)
    end_process(0)


def _take_stdout() -> TextIO:
    """Standard output for answers alone: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, document: dict[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
