"""Hot reload: a newer model is loaded beside the one that serves, then takes its place."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ds_gradprune.errors import GradPruneError
from textgen.serve.engine import Engine
from textgen.serve.metrics import Metrics
from textgen.serve.sources import Source

logger = logging.getLogger("ds_gradprune.serve")


class Watcher:
    """Looks at a source again and again.

    Args:
        source: where a newer model may appear.
        engine: gets it.
        context: tokens of prompt and reply together.
        metrics: counts what came.
        say: shows one line.
    """

    def __init__(
        self,
        source: Source,
        engine: Engine,
        context: int,
        metrics: Metrics,
        say: Callable[[str], None],
    ) -> None:
        self._source, self._engine, self._context = source, engine, context
        self._metrics, self._say = metrics, say
        self._seen: str | None = engine.served.version
        self._settled = self._seen
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, seconds: float) -> None:
        """Look every so many seconds."""

        def run() -> None:
            while not self._stop.wait(seconds):
                self.look()

        self._thread = threading.Thread(target=run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking; twice is fine."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> bool:
        """Look once; returns whether a newer model was taken.

        A model is loaded when two looks in a row see the same one, and taken if it was the same
        throughout: so one that is being written is left alone. One that cannot be read is told
        once, and the old one goes on serving.
        """
        version = self._source.version()
        changed, self._seen = version != self._seen, version
        if version is None or changed or version == self._settled or self._engine.is_draining:
            return False
        try:
            served = self._source.load(self._context)
        except GradPruneError as exc:
            self._settled = version
            self._metrics.count("reloads", outcome="failed")
            self._say(f"warning: the newer model is not taken: {exc}")
            return False
        if self._source.version() != version:
            return False
        self._settled = version
        self._engine.swap(served)
        self._metrics.count("reloads", outcome="taken")
        self._say(f"serving {served.name} {version} from now on")
        return True
