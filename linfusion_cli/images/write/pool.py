"""Work in threads whose results come back in order."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

MAX_THREADS = 8


def default_threads() -> int:
    """The CPUs this process may use (containers and `taskset` included), at most 8."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        usable = os.cpu_count() or 1
    return min(MAX_THREADS, usable)


class OrderedPool:
    """Runs jobs in threads and hands each result to `collect`, in the order of submission, in the caller's thread.

    No more than `2 * threads` jobs exist at any time, so memory is bounded however fast jobs arrive: `submit` waits
    for the oldest. An exception of a job is raised by the call that collects it.
    """

    def __init__(self, threads: int, collect: Callable[[Any], None]):
        self.limit = 2 * threads
        self._collect = collect
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="linfusion-images")
        self._jobs: deque[Future[Any]] = deque()

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        while self._jobs and (len(self._jobs) >= self.limit or self._jobs[0].done()):
            self._collect_oldest()
        self._jobs.append(self._executor.submit(function, *args))

    def finish(self) -> None:
        """Collect every result and end the threads."""
        while self._jobs:
            self._collect_oldest()
        self._executor.shutdown()

    def cancel(self) -> None:
        """Forget what was not collected; returns when no job is running."""
        self._jobs.clear()
        self._executor.shutdown(cancel_futures=True)

    def _collect_oldest(self) -> None:
        self._collect(self._jobs.popleft().result())
