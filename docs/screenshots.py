"""The pictures of the documents: a run, its report, and the chat page.

    python docs/screenshots.py runs/quickstart --model runs/quickstart-finetune/model

The model is chatted with, by default that of the run. Needs Chromium and the extras plot and
serve. Writes docs/images/.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    # The root instead of this folder: tests and ds_gradprune are found there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests.helpers.devtools import Browser

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
PROMPT = "What happens to the residual when I resume?"
COMMAND = [sys.executable, "-m", "ds_gradprune"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    flags = argparse.ArgumentParser(description="Draw the pictures of the documents.")
    flags.add_argument("run", type=Path, help="folder of a run with a model")
    flags.add_argument("--model", help="to chat with (default: the run's)")
    given = flags.parse_args(arguments)
    run = str(given.run.resolve())
    IMAGES.mkdir(exist_ok=True)
    call([*COMMAND, "plot", run, "--out", str(IMAGES / "run.png")])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.html"
        call([*COMMAND, "report", run, "--html", str(report)])
        with opened(report.as_uri()) as browser:
            size = {"width": 1250, "height": 1900, "deviceScaleFactor": 0.7, "mobile": False}
            browser.call("Emulation.setDeviceMetricsOverride", **size)
            browser.picture(IMAGES / "report.png")
    with served(given.model or f"{run}/model") as address, opened(address) as browser:
        chat(browser)
        browser.picture(IMAGES / "chat.png")
    return 0


def call(words: Sequence[str]) -> None:
    """Run one of our commands in the root."""
    subprocess.run(words, cwd=ROOT, check=True)


@contextmanager
def opened(address: str) -> Iterator[Browser]:
    """A browser that shows a page."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        sys.exit("Chromium must be installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(program, Path(profile))
        try:
            browser.call("Page.navigate", url=address)
            until(lambda: browser.run("document.readyState") == "complete")
            yield browser
        finally:
            browser.close()


@contextmanager
def served(model: str) -> Iterator[str]:
    """A server of a model, on a free port; its address."""
    words = [*COMMAND, "serve", "--model", model, "--port", "0"]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            told = (re.search(r"at (http://\S+)", line) for line in server.stderr)
            yield next(found[1] for found in told if found is not None)
        finally:
            server.terminate()


def chat(browser: Browser) -> None:
    """Ask once, and wait for the whole reply."""
    until(lambda: browser.run("document.getElementById('model')?.textContent || ''"))
    browser.run("document.getElementById('temperature').value = 0")
    browser.run(f"document.getElementById('text').value = {PROMPT!r}")
    browser.run("document.getElementById('form').requestSubmit()")
    until(lambda: browser.run("document.querySelector('.facts') !== null"))


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for something in the page."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit("the page has not shown what it should within a minute")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
