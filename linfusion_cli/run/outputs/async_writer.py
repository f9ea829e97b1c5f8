"""Writing beside decoding: one thread hands rows to the file while the next are computed."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from linfusion_cli.images import RowSink


class AsyncWriter:
    """Takes rows and hands them to `sink` in order, one strip behind at most; `seconds` is what that took.

    What the sink raised is raised by the next call. Leaving the context waits for the strip under way.
    """

    def __init__(self, sink: RowSink):
        self.seconds = 0.0
        self._sink, self._last = sink, None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writing")

    def take(self, rows: np.ndarray) -> None:
        """Rows of the picture, which the caller no longer changes."""
        self.finish()
        self._last: Future[None] | None = self._thread.submit(self._write, rows)

    def finish(self) -> None:
        """Wait until all rows taken so far are the sink's."""
        if self._last is not None:
            self._last.result()

    def _write(self, rows: np.ndarray) -> None:
        began = time.perf_counter()
        self._sink.write(rows)
        self.seconds += time.perf_counter() - began

    def __enter__(self) -> AsyncWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()
