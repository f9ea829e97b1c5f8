"""A thread pool with ordered results and bounded memory."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

MAX_THREADS = 8


def count_default_threads() -> int:
    """Return the number of CPUs that this process can use (respecting containers and `taskset`), at most 8."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cpus = os.cpu_count() or 1
    return min(MAX_THREADS, cpus)


class OrderedPool:
    """Runs jobs in threads and passes the results to `collect` in the order of submission, in the caller's thread.

    At most `max_jobs = 2 * threads` jobs exist at any time: `submit` waits for the oldest job, which bounds the memory.
    An exception of a job is raised by the call that collects its result.
    """

    def __init__(self, threads: int, collect: Callable[[Any], None]):
        self.max_jobs = 2 * threads
        self._collect = collect
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="linfusion-images")
        self._jobs: deque[Future[Any]] = deque()

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Run `function(*args)` in a thread; collect finished results and, if the pool is full, wait for one."""
        while self._jobs and (len(self._jobs) >= self.max_jobs or self._jobs[0].done()):
            self._collect_oldest()
        self._jobs.append(self._executor.submit(function, *args))

    def finish(self) -> None:
        """Collect all results and stop the threads."""
        while self._jobs:
            self._collect_oldest()
        self._executor.shutdown()

    def cancel(self) -> None:
        """Discard all results that are not collected; return when no job is running."""
        self._jobs.clear()
        self._executor.shutdown(cancel_futures=True)

    def _collect_oldest(self) -> None:
        self._collect(self._jobs.popleft().result())
