"""Write rows in a background thread while the next rows are computed."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from linfusion_cli.images import RowSink


class AsyncWriter:
    """Pass rows to `sink` in order, in a thread, at most one strip behind; `seconds` is the time spent writing.

    An error of the sink is raised by the next call. Leaving the context waits for the strip that is being written.
    """

    def __init__(self, sink: RowSink):
        self.seconds = 0.0
        self._sink = sink
        self._pending: Future[None] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="writing")

    def write(self, rows: np.ndarray) -> None:
        """Write rows of the image; the caller must not change the array afterwards."""
        self.finish()
        self._pending = self._executor.submit(self._write, rows)

    def finish(self) -> None:
        """Wait until the sink has written all rows."""
        if self._pending is not None:
            self._pending.result()

    def _write(self, rows: np.ndarray) -> None:
        started = time.perf_counter()
        self._sink.write(rows)
        self.seconds += time.perf_counter() - started

    def __enter__(self) -> AsyncWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._executor.shutdown()
