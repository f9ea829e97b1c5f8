"""Statistics of a map, gathered strip by strip: Chan, Golub and LeVeque, "Updating formulae" (1979), equation 2.1.

Never E[x²] − E[x]²: at a mean of 50 deviations that loses half of the digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linfusion_cli.strips.communicator import Communicator


@dataclass(frozen=True)
class Moments:
    """Per channel: how many pixels, their mean [B, C], and `m2` = Σ (x − mean)² [B, C]; both in fp64."""

    count: int
    mean: Tensor
    m2: Tensor

    @staticmethod
    def of(rows: Tensor) -> Moments:
        """The moments of rows [B, n, W, C]."""
        values = rows.flatten(1, 2)
        values = values.to(torch.promote_types(rows.dtype, torch.float32))
        mean = values.mean(dim=1, keepdim=True)
        m2 = (values - mean).square_().sum(dim=1)
        return Moments(values.shape[1], mean.squeeze(1).double(), m2.double())

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + delta.square() * (self.count * other.count / count))

    def of_all(self, exchange: Communicator) -> Moments:
        """The moments of the whole map, of which this device has seen its part."""
        count = int(exchange.sum(torch.tensor(self.count)))
        mean = exchange.sum(self.mean * (self.count / count))
        return Moments(count, mean, exchange.sum(self.m2 + (self.mean - mean).square() * self.count))

    @staticmethod
    def side_by_side(parts: list[Moments]) -> Moments:
        """The moments of maps of one size whose channels stand side by side."""
        mean, m2 = torch.cat([part.mean for part in parts], dim=1), torch.cat([part.m2 for part in parts], dim=1)
        return Moments(parts[0].count, mean, m2)


def group_affine(norm: nn.GroupNorm, moments: Moments) -> tuple[Tensor, Tensor]:
    """GroupNorm (Wu and He, arXiv 1803.08494) of a map with these moments as x · scale + shift, each [B, 1, 1, C].

    In fp32 or the norm's dtype, whichever is wider: at a mean of 50 deviations, halves would lose what is left.
    """
    mean, m2 = (part.unflatten(1, (norm.num_groups, -1)) for part in (moments.mean, moments.m2))
    group_mean = mean.mean(dim=2, keepdim=True)
    spread = (mean - group_mean).square() * moments.count
    variance = (m2 + spread).sum(dim=2, keepdim=True) / (moments.count * mean.shape[2])
    scale = torch.rsqrt(variance + norm.eps) * norm.weight.unflatten(0, (norm.num_groups, -1))
    shift = norm.bias.unflatten(0, (norm.num_groups, -1)) - group_mean * scale
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    return tuple(part.flatten(1)[:, None, None].to(wide) for part in (scale, shift))
