"""Where the time of a step goes, with the exchange waited for and hidden: figures and a picture.

Two ranks on this machine, one thread each, an emulated link. Every case is trained in every round,
and rank 0's last step of the last round is traced by torch's profiler.

    python -m labs.timeline --out results/timeline_cpu_202611.md

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from labs.machine import commit, machine

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("step_s", "compute_s", "codec_s", "exposed_s", "hidden_s")
COLORS = {
    "forward": "#9ecae1",
    "backward": "#4292c6",
    "optimizer": "#084594",
    "select, encode": "#fdae6b",
    "decode, apply": "#d94801",
    "wait for the link": "#d9d9d9",
    "transfer": "#41ab5d",
}


def case(prune: str, stage: int, rate_mbit: float, overlap: Any, density: float) -> dict[str, Any]:
    """What a rank needs to know of a case."""
    return {
        "prune": prune,
        "stage": stage,
        "rate_mbit": rate_mbit,
        "overlap": overlap,
        "density": density,
    }


def cases(density: float) -> dict[str, dict[str, Any]]:
    """Name -> case; each exchange is waited for, and hidden."""
    kinds = (
        ("gradient", 0, 100),
        ("gradient", 2, 100),
        ("update", 0, 100),
        ("gradient", 0, 20),
    )
    return {
        f"{prune}, stage {stage}, {rate} Mbit/s, {'hidden' if overlap else 'waited for'}": case(
            prune, stage, rate, overlap, density
        )
        for prune, stage, rate in kinds
        for overlap in (False, "auto")
    }


def train(plan: dict[str, Any]) -> dict[str, Any]:
    """Both ranks; what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        plan = plan | {"store": str(Path(folder) / "store")}
        env = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "labs.timeline.rank"]
        ranks = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(plan))
            rank.stdin.close()
            rank.stdin = None
        outputs = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        if rank.returncode:
            raise SystemExit(f"a rank has failed:\n{errors[-3000:]}")
    found: dict[str, Any] = json.loads(outputs[0][0].splitlines()[-1])
    return found


def summed(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Per case: medians over rounds, the range of the step, the share that was hidden."""
    table = {}
    for name in rounds[0]:
        row: dict[str, Any] = {
            field: round(statistics.median(r[name][field] for r in rounds), 4) for field in TIMES
        }
        steps = [r[name]["step_s"] for r in rounds]
        row["spread_s"] = [round(min(steps), 4), round(max(steps), 4)]
        row["wire_bytes"] = int(rounds[-1][name]["wire_bytes"])
        wire_s = row["exposed_s"] + row["hidden_s"]
        row["hidden_fraction"] = round(row["hidden_s"] / wire_s, 3) if wire_s else 0.0
        table[name] = row
    return table


def page(document: dict[str, Any], command: str, name: str) -> str:
    """The results page."""
    made, facts = document["machine"], document["machine"]["versions"]
    lines = [
        "# Where the time of a step goes",
        "",
        f"`{command}`. Commit {document['commit']}; {document['date']}; {made['cpu']}, "
        f"{made['cores']} cores; torch {facts['torch']}, deepspeed {facts['deepspeed']}; load "
        f"{made['load_average'][0]:.2f}.",
        "",
        f"Two ranks, one thread each, a GPT of 10M parameters, 256 tokens per rank and step, "
        f"density {document['density']:g}, 4 bits, an emulated link. Milliseconds of rank 0: "
        f"medians of {document['steps']} steps, then of {document['rounds']} rounds in turns. In "
        "brackets are the lowest and highest round.",
        "",
        "| case | step | computation | codec | exposed wire | hidden wire | hidden | MB sent |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in document["cases"].items():
        low, high = (1e3 * value for value in row["spread_s"])
        cells = [f"{1e3 * row['step_s']:.0f} ({low:.0f} to {high:.0f})"]
        cells += [f"{1e3 * row[field]:.0f}" for field in TIMES[1:]]
        cells += [f"{100 * row['hidden_fraction']:.0f} %", f"{row['wire_bytes'] / 1e6:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"![a step's timeline, three rows per case]({name}.png)",
        "",
        "One traced step per case. Tracing makes a step longer. In the thread's row are the ranges "
        "of all threads but the main one. What is encoded there counts as computation in the "
        "table, because it takes the processor while the main thread computes. All ranges: "
        f"[{name}.json]({name}.json).",
        "",
    ]
    return "\n".join(lines)


def draw(traces: dict[str, Any], path: Path) -> None:
    """Rank 0's timelines: for every case the main thread, the other ones, the link."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(len(traces), 1, figsize=(11, 1.45 * len(traces) + 0.8))
    longest = max(trace["step_ms"] for trace in traces.values())
    for axis, (name, trace) in zip(axes, traces.items(), strict=True):
        link = [["transfer", *span] for span in trace["link"]]
        for height, rows in enumerate((link, trace["thread"], trace["main"])):
            for label, start, long in rows:
                axis.broken_barh([(start, long)], (height - 0.4, 0.8), color=COLORS[label])
        axis.axvline(trace["step_ms"], color="black", linewidth=0.8)
        axis.set_yticks(range(3), ["link", "thread", "main"], fontsize=8)
        axis.set_xlim(0, 1.05 * longest)
        axis.set_ylim(-0.6, 2.6)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(name, fontsize=9, loc="left", pad=2)
    axes[-1].set_xlabel("ms from the step's begin", fontsize=8)
    patches = [Patch(color=color, label=label) for label, color in COLORS.items()]
    figure.legend(handles=patches, loc="lower center", ncol=len(COLORS), fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=90)


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="page to write; data and picture lie beside it")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in turns")
    parser.add_argument("--steps", type=int, default=8, help="measured steps per round and case")
    parser.add_argument("--density", type=float, default=0.05, help="share that is sent")
    flags = parser.parse_args()
    plan = {"cases": cases(flags.density), "rounds": flags.rounds, "steps": flags.steps}
    document = {
        "commit": commit(ROOT),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "density": flags.density,
        "rounds": flags.rounds,
        "steps": flags.steps,
    }
    found = train(plan)
    document["cases"], document["traces"] = summed(found["rounds"]), found["traces"]
    if flags.out is not None:
        command = f"python -m labs.timeline --out {flags.out}"
        picture = flags.out.with_suffix(".png")
        draw(document["traces"], picture)
        flags.out.with_suffix(".json").write_text(json.dumps(document) + "\n")
        flags.out.write_text(page(document, command, flags.out.stem))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
