"""The queue and the thread that runs the model. Knows nothing of HTTP.

Every request that was taken gets exactly one `End`, whatever happens to it.

Longer than 300 lines: one engine thread and all that its requests may meet.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from textgen.generate import Sampling
from textgen.serve.batch import PREFILL_TOKENS, Batch, Row
from textgen.serve.served import Served, Writer

logger = logging.getLogger("ds_gradprune.serve")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has become certain; may be empty. The first one tells that the prompt was read."""

    text: str


@dataclass(frozen=True, slots=True)
class End:
    """The last event of a request.

    Attributes:
        reason: "stop", "length"; "timeout", "cancelled" or "error" when something came between.
        num_new: tokens of the reply.
        message: what went wrong.
    """

    reason: str
    num_new: int
    message: str = ""


@dataclass(eq=False)
class Job:
    """One reply that was asked for.

    Attributes:
        served: the model that `ids` was made for.
        prompt: the text, to be encoded again when a newer model has come meanwhile.
        ids: tokens of the prompt.
        sampling: how tokens are chosen.
        stops: texts that end the reply.
        top_k: draw among so many; 0: all.
        deadline: of the engine's clock; then the reply ends.
        emit: gets every event, in the engine's thread.
    """

    served: Served
    prompt: str
    ids: list[int]
    sampling: Sampling
    deadline: float
    emit: Callable[[Piece | End], None]
    stops: Sequence[str] = ()
    top_k: int = 0
    cancelled: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Whoever asked has left; may be called from any thread, also after the end."""
        self.cancelled = True


class QueueFull(Exception):
    """As many wait as may wait.

    Attributes:
        retry_after: whole seconds until a place is likely.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Engine:
    """Continues texts on one thread, in the order they came.

    Args:
        served: the model.
        rows: texts that are continued together.
        max_queue: texts that may wait beside them.
        clock: seconds, rising.
    """

    def __init__(
        self,
        served: Served,
        *,
        rows: int = 16,
        max_queue: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.max_queue = max_queue
        self.max_rows = rows
        self._batches = [Batch(served, rows)]
        self._queue: deque[Job] = deque()
        self._next: Served | None = None
        self._wake = threading.Condition()
        self._ending = False
        self._job_seconds = 1.0  # a moving mean, for Retry-After
        self._begun: dict[Job, float] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- from any thread -----------------------------------------------------------------------

    @property
    def served(self) -> Served:
        """The newest model."""
        return self._next or self._batches[-1].served

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Texts in the queue."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Texts that are being continued."""
        return sum(len(batch.rows) for batch in self._batches)

    @property
    def is_draining(self) -> bool:
        """Whether replies of an older model are still being written."""
        return self._next is not None or len(self._batches) > 1

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """End every request and the thread; twice is fine."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take requests, all or none.

        Raises:
            QueueFull: there is no room for all of them.
        """
        with self._wake:
            room = self.max_queue + max(0, self.max_rows - self.num_running)
            if self._ending or len(self._queue) + len(jobs) > room:
                raise QueueFull(self._retry_after())
            self._queue.extend(jobs)
            self._wake.notify()

    def swap(self, served: Served) -> None:
        """Serve a newer model from the next request on; replies under way end with theirs."""
        with self._wake:
            self._next = served
            self._wake.notify()

    # ---- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                self.turn()
        finally:
            self._ending = True
            for batch in self._batches:
                self._fail(batch, "the server is going down")
            while self._queue:
                self._end(self._queue.popleft(), End("error", 0, "the server is going down"))

    def _wait(self) -> bool:
        with self._wake:
            while not (self._ending or self._queue or self.num_running or self._next):
                self._wake.wait()
            return not self._ending

    def turn(self) -> None:
        """One round: models change, texts leave and join, every text gets a token."""
        self._change_model()
        self._let_go()
        current = self._batches[-1]
        jobs = self._admit(current)
        if jobs:
            rows = [_row(job, current.served) for job in jobs]
            self._work(current, lambda: current.join(rows), rows)
        for batch in self._batches:
            if batch.rows:
                self._work(batch, batch.step, batch.rows)

    def _change_model(self) -> None:
        with self._wake:
            served, self._next = self._next, None
        if served is not None:
            self._batches.append(Batch(served, self.max_rows))
        self._batches = [b for b in self._batches[:-1] if b.rows] + self._batches[-1:]

    def _let_go(self) -> None:
        """Texts that nobody waits for any more, or that have taken too long."""
        now = self.clock()
        for batch in self._batches:
            gone = [row for row in batch.rows if self._over(row.owner, now)]
            batch.drop(gone)
            for row in gone:
                self._end(row.owner, _cut_short(row.owner, row.num_new))
        with self._wake:
            over = [job for job in self._queue if self._over(job, now)]
            for job in over:
                self._queue.remove(job)
        for job in over:
            self._end(job, _cut_short(job, 0))

    @staticmethod
    def _over(job: Job, now: float) -> bool:
        return job.cancelled or now >= job.deadline

    def _admit(self, batch: Batch) -> list[Job]:
        """The texts that join next: as many as there is room for, and a pass can read."""
        jobs: list[Job] = []
        room = batch.room - sum(len(older.rows) for older in self._batches[:-1])
        longest = 0
        while len(jobs) < room:
            with self._wake:
                if not self._queue:
                    break
                job = self._queue[0]
                longest = max(longest, len(job.ids))
                if jobs and longest * (len(jobs) + 1) > PREFILL_TOKENS:
                    break
                self._queue.popleft()
            if job.served is not batch.served:
                job.served = batch.served
                job.ids, _ = batch.served.encode(job.prompt, job.sampling.max_new_tokens)
            self._begun[job] = self.clock()
            jobs.append(job)
        return jobs

    def _work(
        self, batch: Batch, work: Callable[[], list[tuple[Row, str]]], rows: Sequence[Row]
    ) -> None:
        """Run one pass and hand out what it made; a pass that fails ends the texts in it."""
        try:
            made = work()
        # Out of memory, or a fault in the model: told to everybody in it, and the next ones go on.
        except Exception as exc:
            logger.exception("a pass of the model failed")
            message = f"the model failed: {type(exc).__name__}"
            for row in [row for row in rows if row not in batch.rows]:
                self._end(row.owner, End("error", row.num_new, message))
            self._fail(batch, message)
            return
        for row, text in made:
            if not row.owner.cancelled:
                row.owner.emit(Piece(text))
            if row.reason is not None:
                self._end(row.owner, End(row.reason, row.num_new))

    def _fail(self, batch: Batch, message: str) -> None:
        rows, batch.rows = batch.rows, []
        for row in rows:
            self._end(row.owner, End("error", row.num_new, message))

    def _end(self, job: Job, end: End) -> None:
        begun = self._begun.pop(job, None)
        if begun is not None:
            self._job_seconds += 0.1 * (self.clock() - begun - self._job_seconds)
        if not job.ended:
            job.ended = True
            job.emit(end)

    def _retry_after(self) -> int:
        rounds = (len(self._queue) + 1) / self.max_rows
        return min(60, max(1, round(rounds * self._job_seconds)))


def _cut_short(job: Job, num_new: int) -> End:
    if job.cancelled:
        return End("cancelled", num_new)
    return End("timeout", num_new, "the reply took longer than the server allows")


def _row(job: Job, served: Served) -> Row:
    writer = Writer(served.tokenizer, job.stops)
    return Row(job.ids, job.sampling, writer, job, job.top_k)
