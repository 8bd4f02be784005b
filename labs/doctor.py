"""Does doctor's forecast hold? Its step times beside those of real runs, on hosts behind links.

    python -m labs.doctor --rates 10,100 --hosts 2,4 --text FILE --out results/doctor_202611

For every rate a bed of its own: doctor, then real runs of launch/train.py over DeepSpeed's pdsh
launcher, dense and at pinned densities, in rounds, with doctor between the rounds. Times are
means over the middle half of the steps of all rounds. Needs root and what the bed needs. Writes a
page and its JSON. With --add the cells that were measured before stay in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

from ds_gradprune.commands.step_cost import middle
from labs.machine import commit
from tools.netbed import Bed

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "5 % every step": (0.05, 1),
    "1 % every step": (0.01, 1),
    "5 % every 5 steps": (0.05, 5),
}
WARMUP = 6
"""Unpruned steps before the first pruned one."""

PARTS = ("compute_time_s", "codec_time_s", "comm_time_s")
"""Of a pruned step, in the log."""

SKIPPED = 4
"""Steps at the beginning of each part of a run that are not counted."""

Step: TypeAlias = tuple[float, tuple[float, ...]]
"""Seconds of a step, and those of `PARTS`; none of a dense one."""

TABLE_HEAD = (
    "| hosts | link | step | forecast s | real s | error |\n"
    "| ---: | ---: | --- | ---: | ---: | ---: |\n"
)


def configuration(setting: tuple[float, int] | None) -> dict[str, Any]:
    """DeepSpeed's configuration of a run; None: DeepSpeed alone."""
    config: dict[str, Any] = json.loads((ROOT / "ds_configs" / "dense.json").read_text())
    if setting is not None:
        density, every = setting
        config["gradient_pruning"] = {
            "warmup_steps": WARMUP,
            "warmup": "unpruned",
            "ramp_steps": 0,
            "window_size": 4,
            "sync_every": every,
            "density": {"initial": density, "min": density, "max": density},
            "verify_every_steps": None,
        }
    return config


def doctor(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """What doctor forecasts on this bed."""
    words = [sys.executable, "-m", "ds_gradprune", "doctor", "--json"]
    words += ["--hostfile", str(bed.hostfile), "--model", options.model]
    done = bed.hosts[0].run(words, cwd=ROOT, env=bed.environ(), capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"doctor failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def step_times(bed: Bed, name: str, options: argparse.Namespace, folder: Path) -> list[Step]:
    """The steps of one real run."""
    setting = SETTINGS.get(name)
    path, out = folder / "config.json", folder / "run"
    path.write_text(json.dumps(configuration(setting)))
    steps = options.steps + (WARMUP if setting else 0)
    if setting:
        steps += options.steps * (setting[1] - 1) // 2
    words = [str(ROOT / ".venv" / "bin" / "deepspeed"), "--hostfile", str(bed.hostfile)]
    words += ["--launcher", "pdsh", "--master_addr", bed.hosts[0].address]
    words += ["launch/train.py", "--config", str(path), "--model", options.model]
    words += ["--text", options.text, "--steps", str(steps), "--out", str(out)]
    words += ["--eval-every", "100000", "--save-every", "100000"]
    env = bed.environ(DS_ACCELERATOR="cpu") | {"DS_ACCELERATOR": "cpu"}
    env["PATH"] = f"{ROOT / '.venv' / 'bin'}:{env['PATH']}"
    done = bed.hosts[0].run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    subprocess.run(["rm", "-rf", str(out)], check=True)
    if setting is None:
        return [(line["step_time_s"], ()) for line in lines[SKIPPED:]]
    pruned = [line for line in lines if line["density"] < 1.0 and line["step_time_s"] is not None]
    return [
        (line["step_time_s"] / line["steps"], tuple(line[part] / line["steps"] for part in PARTS))
        for line in pruned[2:]
    ]


def measure(rate: str, hosts: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One link: rows of forecast and real step times."""
    names = ["dense", *SETTINGS]
    found: dict[str, list[Step]] = {name: [] for name in names}
    said: list[dict[str, Any]] = []
    with (
        Bed(hosts, None if rate == "none" else f"{rate}mbit") as bed,
        tempfile.TemporaryDirectory() as folder,
    ):
        for _ in range(options.rounds):
            said.append(doctor(bed, options))
            for name in names:
                found[name] += step_times(bed, name, options, Path(folder))
                print(f"{rate} {name} {found[name]}", flush=True)
        said.append(doctor(bed, options))
    rows = []
    for name in names:
        forecasts = [
            d["dense_step_s"] if name == "dense" else d["pruned_step_s"][name] for d in said
        ]
        times_s = middle([step_s for step_s, _ in found[name]])
        parts = zip(*(parts for _, parts in found[name]), strict=True)
        real_s, forecast_s = statistics.fmean(times_s), statistics.median(forecasts)
        rows.append(
            {
                "hosts": hosts,
                "rate": rate,
                "name": name,
                "forecast_s": forecast_s,
                "forecasts_s": [min(forecasts), max(forecasts)],
                "real_s": real_s,
                "quartiles_s": [times_s[0], times_s[-1]],
                "error": forecast_s / real_s - 1.0,
                "commit": commit(ROOT),
                "load": os.getloadavg()[0],
                "link_mbit": statistics.median(d["link_mbit"] for d in said),
                "real_parts_s": dict(zip(PARTS, map(statistics.fmean, parts), strict=False)),
                "forecast_parts_s": [
                    {part: d[part] for part in ("compute_s", "watch_s", "wait_s")}
                    | {"local_s": d["local_s"].get(name)}
                    for d in said
                ],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def page(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The page of the results."""
    lines = []
    for row in rows:
        (low, high), (lower, upper) = row["forecasts_s"], row["quartiles_s"]
        cells = [
            str(row["hosts"]),
            f"{row['rate']} Mbit/s",
            row["name"],
            f"{row['forecast_s']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['real_s']:.3f} ({lower:.3f} to {upper:.3f})",
            f"{100 * row['error']:+.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    loads = [row["load"] for row in rows]
    table = "\n".join(lines)
    rates = ",".join(options.rates)
    hosts = ",".join(map(str, options.hosts))
    return (
        "# Does doctor's forecast hold?\n\n"
        f"`python -m labs.doctor --rates {rates} --hosts {hosts} --model {options.model} "
        f"--steps {options.steps} --rounds {options.rounds} --text FILE`, the cells of a "
        f"link in one call each, commit {commits}, {platform.machine()}, {os.cpu_count()} cores, "
        f"load average {min(loads):.1f} to {max(loads):.1f}. Forecast: median of doctor's runs "
        "before, between and after the rounds, with the least and the most. Real: mean over the "
        "middle half of the steps, with its ends. The hosts share the machine's cores, two of four "
        f"hosts each one.\n\n{TABLE_HEAD}{table}\n"
    )


def joined(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both, those of cells that were measured again only once, in the page's order."""
    again = {(row["hosts"], row["rate"]) for row in new}
    rows = [row for row in old if (row["hosts"], row["rate"]) not in again] + new
    return sorted(rows, key=lambda row: (row["hosts"], float(row["rate"])))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure, and write page and JSON."""
    parser = argparse.ArgumentParser(description="Compare doctor's forecast with real runs.")
    parser.add_argument("--rates", type=lambda text: text.split(","), default=["100"])
    parser.add_argument("--hosts", type=_numbers, default=[2])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="to the cells that --out holds")
    options = parser.parse_args()
    rows = [
        row
        for hosts in options.hosts
        for rate in options.rates
        for row in measure(rate, hosts, options)
    ]
    if options.add:
        rows = joined(json.loads(options.out.with_suffix(".json").read_text()), rows)
    text = page(rows, options)
    if options.out:
        name = options.out.with_suffix(".json").name
        text += f"\nAll numbers: [{name}]({name}).\n"
    print(text)
    if options.out:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
