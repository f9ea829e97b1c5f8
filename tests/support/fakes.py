"""Stand-ins for what a run talks to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from linfusion_cli.core.events import Event
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import Strips, as_nhwc
from linfusion_cli.unet.forward import Residuals

T = TypeVar("T")


class Listener:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


class Rank:
    """The Exchange of one of several devices, which are threads: all make the same calls in the same order."""

    def __init__(self, number: int, barrier: threading.Barrier, table: list):
        self.number, self._barrier, self._table = number, barrier, table

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._said_by_all(tensor)).sum(dim=0)

    def halo(self, part: FeatureMap, rows: int) -> tuple[Tensor | None, Tensor | None]:
        ends = [part.read(0, rows), part.read(part.height - rows, part.height)]
        edges = self._said_by_all([end.clone() for end in ends])
        above = edges[self.number - 1][1] if self.number > 0 else None
        below = edges[self.number + 1][0] if self.number + 1 < len(edges) else None
        return above, below

    def _said_by_all(self, mine: T) -> list[T]:
        self._table[self.number] = mine
        self._barrier.wait()
        said = list(self._table)
        self._barrier.wait()  # nobody says the next thing before all have heard this one
        return said


class GivenControl:
    """A Control that adds these tensors [B, C, h, w], whatever it hears: to the skip connections, and to the middle."""

    def __init__(self, *tensors: Tensor):
        self.tensors, self.encoder = tensors, nn.Identity()

    def residuals(self, run: Strips, latents, timestep, condition, before: Residuals | None) -> Residuals:
        assert before is None  # it is the first
        return Residuals(self._map(run, as_nhwc(tensor)) for tensor in self.tensors)

    def _map(self, run: Strips, rows: Tensor) -> FeatureMap:
        made = run.storage.new_waiting(*rows.shape)
        made.write(0, rows)
        return made


def on_ranks(count: int, work: Callable[[Rank], T]) -> list[T]:
    """What `work` returns on each of so many simulated devices; if one fails, none waits for it."""
    barrier, table = threading.Barrier(count, timeout=60), [None] * count

    def run(number: int) -> T:
        try:
            return work(Rank(number, barrier, table))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))
