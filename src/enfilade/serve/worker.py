"""The queue before the network: bounded, with one thread that takes requests of one kind together."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


class Full(Exception):
    """No place is left, or the service is stopping. `retry_after` is in whole seconds."""

    def __init__(self, sentence: str, retry_after: int):
        super().__init__(sentence)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """`call` answers a list of items with a list of results. Jobs whose `key` is equal, and not None, may share one
    call, that of the first."""

    call: Callable[[list[Any]], list[Any]]
    item: Any
    key: Hashable = None
    future: Future = field(default_factory=Future)


class Place:
    """A place in the queue, taken before an image is decoded, so that what waits is bounded in memory too."""

    def __init__(self, worker: "Worker"):
        self._worker, self._held = worker, True

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_) -> None:
        with self._worker.changed:
            self._worker.reserved -= self._held
            self._held = False

    def put(self, job: Job) -> Future:
        """Hand in the job that the place was for."""
        with self._worker.changed:
            if self._worker.stopping:
                raise Full("the service is stopping", 5)
            self._worker.reserved -= self._held
            self._held = False
            self._worker.queue.append(job)
            self._worker.changed.notify()
        return job.future


class Worker:
    """One thread runs the jobs: the oldest, and with it up to `batch` - 1 more of its key, for which it waits
    `patience` seconds. At most `waiting` wait. A job whose future was cancelled in time is never run."""

    def __init__(
        self,
        *,
        waiting: int,
        batch: int,
        patience: float,
        begin: Callable[[], object] = lambda: None,
        on_run: Callable[[int, float], object] = lambda count, seconds: None,
    ):
        self.waiting, self.batch, self.patience = waiting, batch, patience
        self.begin, self.on_run = begin, on_run
        self.queue: deque[Job] = deque()
        self.reserved = 0
        self.stopping = False
        self.changed = threading.Condition()
        self._pace = 1.0  # seconds an item, a running mean
        self._thread = threading.Thread(target=self._work, name="network", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def length(self) -> int:
        """How many wait, those being decoded included."""
        return len(self.queue) + self.reserved

    def place(self) -> Place:
        """Raises Full where there is none."""
        with self.changed:
            if self.stopping:
                raise Full("the service is stopping", 5)
            if self.length >= self.waiting:
                raise Full(f"{self.length} requests wait already: try again later", self._retry_after())
            self.reserved += 1
        return Place(self)

    def stop(self, timeout: float | None = None) -> None:
        """Refuse what is new or still waits, finish what runs."""
        with self.changed:
            self.stopping = True
            left, self.queue = list(self.queue), deque()
            self.changed.notify_all()
        for job in left:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Full("the service is stopping", 5))
        self._thread.join(timeout)

    def _retry_after(self) -> int:
        return min(60, max(1, math.ceil(self.length * self._pace)))

    def _work(self) -> None:
        self.begin()
        while jobs := self._take():
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if running:
                self._run(running)

    def _take(self) -> list[Job]:
        """The next jobs to run together; none when the service stops."""
        with self.changed:
            self.changed.wait_for(lambda: self.queue or self.stopping)
            if not self.queue:
                return []
            first = self.queue.popleft()
            jobs, deadline = [first], time.monotonic() + self.patience
            while first.key is not None:
                for job in [job for job in self.queue if job.key == first.key][: self.batch - len(jobs)]:
                    self.queue.remove(job)
                    jobs.append(job)
                left = deadline - time.monotonic()
                # Whoever waits for something else is not kept waiting for company
                if len(jobs) >= self.batch or self.queue or self.stopping or left <= 0:
                    break
                self.changed.wait(left)
            return jobs

    def _run(self, jobs: list[Job]) -> None:
        start = time.perf_counter()
        try:
            results = jobs[0].call([job.item for job in jobs])
            if len(results) != len(jobs):
                raise RuntimeError(f"{len(jobs)} items have {len(results)} results")
        except BaseException as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:  # one bad item does not spoil its neighbours' answers
                for job in jobs:
                    self._run([job])
            return
        seconds = time.perf_counter() - start
        self._pace = 0.8 * self._pace + 0.2 * seconds / len(jobs)
        for job, result in zip(jobs, results):
            job.future.set_result(result)
        self.on_run(len(jobs), seconds)
