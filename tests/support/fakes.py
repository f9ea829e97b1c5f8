"""Test doubles for observers, communicators and ControlNets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from linfusion_cli.core.events import Event
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import StripContext, as_nhwc
from linfusion_cli.unet.forward import Residuals

T = TypeVar("T")


class Listener:
    """An Observer that records all events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


class Rank:
    """The Communicator of one of several simulated devices: threads that make the same calls in the same order."""

    def __init__(self, number: int, barrier: threading.Barrier, table: list):
        self.number, self._barrier, self._table = number, barrier, table

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._all_gather(tensor)).sum(dim=0)

    def exchange_halo(self, part: FeatureMap, rows: int) -> tuple[Tensor | None, Tensor | None]:
        ends = [part.read(0, rows), part.read(part.height - rows, part.height)]
        edges = self._all_gather([end.clone() for end in ends])
        above = edges[self.number - 1][1] if self.number > 0 else None
        below = edges[self.number + 1][0] if self.number + 1 < len(edges) else None
        return above, below

    def _all_gather(self, value: T) -> list[T]:
        self._table[self.number] = value
        self._barrier.wait()
        values = list(self._table)
        self._barrier.wait()  # all ranks have read the table before it is written again
        return values


class ConstantControlNet:
    """A ControlNetBranch with fixed residuals [B, C, h, w]: of the skip connections, then of the middle block."""

    def __init__(self, *tensors: Tensor):
        self.tensors, self.encoder = tensors, nn.Identity()

    def compute_residuals(
        self, context: StripContext, latents, timestep, condition, previous: Residuals | None
    ) -> Residuals:
        assert previous is None  # this is the first ControlNet
        return Residuals(self._create_map(context, as_nhwc(tensor)) for tensor in self.tensors)

    def _create_map(self, context: StripContext, rows: Tensor) -> FeatureMap:
        residual = context.storage.new_skip(*rows.shape)
        residual.write(0, rows)
        return residual


def run_on_ranks(count: int, work: Callable[[Rank], T]) -> list[T]:
    """Return the results of `work` on `count` simulated devices; if one fails, the others stop waiting."""
    barrier, table = threading.Barrier(count, timeout=60), [None] * count

    def run(number: int) -> T:
        try:
            return work(Rank(number, barrier, table))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))
