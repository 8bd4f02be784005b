"""One rank of the timeline laboratory: trains every case, and traces one step of each.

The link is emulated (`throttle`), so its own spans are known: they are written down where the
emulation lays a transfer on the link. Everything else comes from torch's profiler, over all
threads, and is reduced to the ranges that are named here.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "step"
RANGES = (
    *("forward", "backward", "optimizer", "select, encode", "wait for the link"),
    "decode, apply",
)
TOKENS, VOCAB = 256, 8192


def named(owner: Any, method: str, name: str) -> None:
    """Let a method appear in traces under a name."""
    original = getattr(owner, method)

    def shown(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return original(*args, **kwargs)

    setattr(owner, method, shown)


def name_ours() -> list[tuple[float, float]]:
    """Name the parts of an exchange; returns where the emulated link notes its transfers."""
    from ds_gradprune.train import convoy, flight, gradients, message, pruned
    from ds_gradprune.wire import all_gather, throttle

    named(message.Message, "write", "select, encode")
    named(gradients.GradientPruning, "_take", "decode, apply")
    named(pruned.PrunedExchange, "commit", "decode, apply")
    named(all_gather._Gathered, "wait", "wait for the link")
    named(convoy.Convoy, "land", "wait for the link")
    named(flight.Flight, "land", "wait for the link")
    spans: list[tuple[float, float]] = []
    original = throttle._ThrottledCall.__init__

    def noted(self: Any, *args: Any) -> None:
        original(self, *args)
        spans.append((self._end_s - self._wire_s, self._end_s))

    setattr(throttle._ThrottledCall, "__init__", noted)  # noqa: B010 - mypy knows its signature
    return spans


class Case:
    """An engine of one kind, with the emulated link.

    Args:
        kind: see `labs.timeline.__main__.case`.
    """

    def __init__(self, kind: dict[str, Any]) -> None:
        import ds_gradprune
        from textgen.model import build_model

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": kind["stage"], "reduce_bucket_size": 2**20},
            "steps_per_print": None,
            "gradient_pruning": {
                "prune": kind["prune"],
                "overlap": kind["overlap"],
                "warmup_steps": 0,
                "density": {name: kind["density"] for name in ("initial", "min", "max")},
                "throttle": {"schedule": [{"step": 0, "rate_mbit": kind["rate_mbit"]}]},
                "verify_every_steps": None,
            },
        }
        self.model = build_model("micro", VOCAB, 0, seed=0)
        self.engine = ds_gradprune.initialize(
            model=self.model, model_parameters=self.model.parameters(), config=config
        )[0]
        self._tokens = torch.Generator().manual_seed(1 + int(os.environ["RANK"]))

    def step(self) -> None:
        """One optimizer step."""
        tokens = torch.randint(0, VOCAB, (1, TOKENS), generator=self._tokens)
        with record_function("forward"):
            loss = self.engine(input_ids=tokens, labels=tokens).loss
        with record_function("backward"):
            self.engine.backward(loss)
        with record_function("optimizer"):
            self.engine.step()

    def measure(self, steps: int) -> dict[str, float]:
        """Medians over steps, seconds; the first two are left out."""
        rows: dict[str, list[float]] = {}
        for number in range(steps + 2):
            began_s = time.perf_counter()
            self.step()
            wall_s = time.perf_counter() - began_s
            report = self.engine.gradprune.report
            if number < 2 or report is None:
                continue
            found = {
                "step_s": wall_s,
                "compute_s": report.compute_time_s or 0.0,
                "codec_s": report.codec_time_s,
                "exposed_s": report.comm_time_s,
                "hidden_s": report.hidden_time_s,
                "wire_bytes": float(report.wire_bytes),
            }
            for name, value in found.items():
                rows.setdefault(name, []).append(value)
        return {name: statistics.median(values) for name, values in rows.items()}

    def close(self) -> None:
        """Give everything back."""
        self.engine.gradprune.detach()
        self.engine.destroy()


@contextmanager
def all_threads() -> Iterator[profile]:
    """A profile of the CPU's ranges in all threads."""
    every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=every) as trace:
        yield trace


def traced(step: Callable[[], None], spans: list[tuple[float, float]]) -> dict[str, Any]:
    """One step's named ranges, milliseconds from its begin: per thread, and on the link."""
    spans.clear()
    with all_threads() as trace:
        began_s = time.perf_counter()
        with record_function(STEP):
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    whole = next(event for event in events if event.get("name") == STEP and "dur" in event)
    threads: dict[int, list[list[Any]]] = {}
    for event in events:
        if event.get("name") in RANGES and event.get("cat") == "user_annotation":
            start_ms, long_ms = (event["ts"] - whole["ts"]) / 1e3, event["dur"] / 1e3
            row = [event["name"], round(start_ms, 1), round(long_ms, 1)]
            threads.setdefault(event["tid"], []).append(row)
    main = threads.pop(whole["tid"], [])
    link = [[round(1e3 * (a - began_s), 1), round(1e3 * (b - a), 1)] for a, b in spans]
    others = sorted((row for rows in threads.values() for row in rows), key=lambda row: row[1])
    return {
        "step_ms": round(whole["dur"] / 1e3, 1),
        "main": sorted(main, key=lambda row: row[1]),
        "thread": others,
        "link": link,
    }


def main() -> None:
    """Train what stdin says; rank 0 prints a line of JSON."""
    import deepspeed

    torch.set_num_threads(1)
    plan = json.load(sys.stdin)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "gloo",
        init_method=f"file://{plan['store']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        verbose=False,
    )
    spans = name_ours()
    rounds: list[dict[str, Any]] = []
    traces: dict[str, Any] = {}
    for number in range(plan["rounds"]):
        found = {}
        for name, kind in plan["cases"].items():
            case = Case(kind)
            found[name] = case.measure(plan["steps"])
            if number == plan["rounds"] - 1:
                traces[name] = traced(case.step, spans)
            case.close()
        rounds.append(found)
    if os.environ["RANK"] == "0":
        print(json.dumps({"rounds": rounds, "traces": traces}), flush=True)


if __name__ == "__main__":
    main()
