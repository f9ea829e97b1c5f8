"""Windows over a map, and the weights that blend neighbours where they overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linfusion_cli.geometry import spans

OVERLAP_SHARE = 4  # neighbours share a quarter of a window


@dataclass(frozen=True)
class Windows:
    """Windows [start, stop) along one side, and how much each counts at each of its places: the weights sum to 1."""

    spans: list[tuple[int, int]]

    @staticmethod
    def over(length: int, window: int) -> Windows:
        return Windows(spans(length, window, window // OVERLAP_SHARE))

    def scaled(self, factor: int) -> Windows:
        """The same windows on a map `factor` times as long, as decoding makes it."""
        return Windows([(start * factor, stop * factor) for start, stop in self.spans])

    def weights(self, index: int) -> Tensor:
        """A linear ramp in the middle of each overlap, 1 between them, 0 outside -> [stop - start].

        Ramps have one length wherever windows lie: where three overlap, two ramps never meet.
        """
        start, stop = self.spans[index]
        weights = torch.ones(stop - start)
        if index > 0:
            rise = self._ramp(index)
            weights[: rise[0] - start] = 0
            weights[rise[0] - start : rise[1] - start] = _rising(rise[1] - rise[0])
        if index + 1 < len(self.spans):
            fall = self._ramp(index + 1)
            weights[fall[0] - start : fall[1] - start] *= _rising(fall[1] - fall[0]).flip(0)
            weights[fall[1] - start :] = 0
        return weights

    def _ramp(self, index: int) -> tuple[int, int]:
        """Where the window before `index` gives way to it: [start, stop), in places of the whole side."""
        start, stop = self.spans[index][0], self.spans[index - 1][1]
        length = (self.spans[index][1] - start) // OVERLAP_SHARE
        middle = (start + stop - length) // 2
        return middle, middle + length

    def final(self, index: int) -> int:
        """Up to where everything is done once window `index` is: the next one's start, or the end."""
        return self.spans[index + 1][0] if index + 1 < len(self.spans) else self.spans[index][1]


def _rising(length: int) -> Tensor:
    """Rises from near 0 to near 1; the ramp and its mirror image sum to 1."""
    return (torch.arange(length) + 0.5) / length
