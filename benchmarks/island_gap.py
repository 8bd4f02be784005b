"""Where islands fall behind dense: at the shared weights, at their own, and after an anneal.

A loss along a run says two things at once: how far training has come, and how much noise of the
moment the weights carry. Every --every steps of each method of a grid this measures, on the whole
validation part,

- shared: the loss of the shared weights;
- own: that of the weights at which gradients are taken, mean over workers;
- annealed: that of the shared weights after --anneal dense steps on other sequences, with the
  learning rate falling to nothing from where it is: how far training has come;
- squares: squared gradients of a worker's sequences at its own weights, over those at the shared
  ones. An Adam step shrinks by the root of it.

    python benchmarks/island_gap.py --grid benchmarks/grids/cause.json --text FILE --steps 3000

The last line of stdout is one JSON document: {"rows": [{"method", "step", "shared", "own",
"annealed", "squares"}]}, nats per token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.convergence_lab.adamw import learning_rate
from benchmarks.convergence_lab.base import DenseSimulation, Setting, Simulation
from benchmarks.convergence_lab.command import parser_of
from benchmarks.convergence_lab.gpt import Gpt, Gradients, validation_loss
from benchmarks.convergence_lab.grid import read_grid
from benchmarks.convergence_lab.text import Text
from benchmarks.convergence_lab.trial import simulation_of
from ds_gradprune.errors import GradPruneError

STILL_STEPS = 60
"""Dense steps that move nothing before an anneal: they fill its moments."""
BATCHES = 30
"""Over which squared gradients are summed."""
OTHER_SEED = 1_000_003
"""Added to the seed for sequences that training does not see at that time."""


def annealed(setting: Setting, text: Text, weights: torch.Tensor, done: int, steps: int) -> float:
    """Validation loss of (numel,) `weights` of step `done` after an anneal of `steps`."""
    dense = DenseSimulation(setting)
    dense.shared.copy_(weights)
    start = learning_rate(setting.train, done - 1, setting.steps)
    rates = [0.0] * STILL_STEPS + [start * (1 - step / steps) for step in range(steps)]
    for step, rate in enumerate(rates, start=done):
        tokens = text.batch(setting.seed + OTHER_SEED, step, setting.workers, setting.train.batch)
        dense.dense_step(tokens, rate)
    return validation_loss(setting.gpt, dense.shared[0], text.validation())


def squares(setting: Setting, text: Text, simulation: Simulation) -> float:
    """Squared gradients at the own weights over those at the shared ones."""
    gradients = Gradients(setting.gpt, setting.workers)
    found = []
    for rows in (simulation.seen(), simulation.shared):
        gradients.weights.copy_(rows.expand_as(gradients.weights))
        total = 0.0
        for batch in range(BATCHES):
            gradients(
                text.batch(setting.seed + OTHER_SEED, batch, setting.workers, setting.train.batch)
            )
            total += float(gradients.gradient.square().sum())
        found.append(total)
    return found[0] / found[1]


def follow(
    setting: Setting, text: Text, simulation: Simulation, every: int, anneal: int
) -> list[dict[str, float]]:
    """Train, and measure on the way."""
    rows, validation = [], text.validation()
    for step in range(setting.steps):
        tokens = text.batch(setting.seed, step, setting.workers, setting.train.batch)
        simulation.step(step, tokens, learning_rate(setting.train, step, setting.steps))
        done = step + 1
        if done % every:
            continue
        own = [validation_loss(setting.gpt, row, validation) for row in simulation.seen()]
        rows.append(
            {
                "step": done,
                "shared": validation_loss(setting.gpt, simulation.shared[0], validation),
                "own": sum(own) / len(own),
                "annealed": annealed(setting, text, simulation.shared[0], done, anneal),
                "squares": squares(setting, text, simulation),
            }
        )
    return rows


def main() -> int:
    """Run what the flags say; exit code 2 with one line for what a user can cause."""
    parser = parser_of(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--every", type=int, default=500, help="steps between measurements")
    parser.add_argument("--anneal", type=int, default=150, help="steps of an anneal")
    options = parser.parse_args()
    for name in ("steps", "workers", "every", "anneal"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(1)
    try:
        grid = read_grid(options.grid)
        text = Text(options.text, grid.model.context)
    except GradPruneError as exc:
        print(exc, file=sys.stderr)
        return 2
    gpt = Gpt(grid.model, text.vocab_size)
    found = []
    print("| method | step | shared | own | annealed | squares |\n|---|---|---|---|---|---|")
    for method in grid.with_dense():
        setting = Setting(gpt, grid.train_of(method), options.workers, options.steps, options.seed)
        simulation = simulation_of(setting, method)
        for row in follow(setting, text, simulation, options.every, options.anneal):
            found.append({"method": method.name, **row})
            losses = " | ".join(f"{row[key]:.4f}" for key in ("shared", "own", "annealed"))
            figures = f"{row['step']} | {losses} | {row['squares']:.2f}"
            print(f"| {method.name} | {figures} |", flush=True)
    print(json.dumps({"rows": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
