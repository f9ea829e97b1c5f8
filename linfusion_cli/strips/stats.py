"""Statistics of a map accumulated strip by strip: Chan, Golub and LeVeque, "Updating formulae" (1979), equation 2.1.

E[x²] − E[x]² is avoided: with a mean of 50 standard deviations it loses half of the digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linfusion_cli.strips.communicator import Communicator


@dataclass(frozen=True)
class Moments:
    """Per channel: the pixel `count`, the `mean` [B, C], and `m2` = Σ (x − mean)² [B, C]; both tensors in fp64."""

    count: int
    mean: Tensor
    m2: Tensor

    @staticmethod
    def from_rows(rows: Tensor) -> Moments:
        """Return the moments of rows [B, n, W, C]."""
        values = rows.flatten(1, 2)
        values = values.to(torch.promote_types(rows.dtype, torch.float32))
        mean = values.mean(dim=1, keepdim=True)
        m2 = (values - mean).square_().sum(dim=1)
        return Moments(values.shape[1], mean.squeeze(1).double(), m2.double())

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the pixels of both."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + delta.square() * (self.count * other.count / count))

    def reduce(self, communicator: Communicator) -> Moments:
        """Return the moments of the complete map, given that each device has those of its part."""
        count = int(communicator.all_reduce(torch.tensor(self.count)))
        mean = communicator.all_reduce(self.mean * (self.count / count))
        return Moments(count, mean, communicator.all_reduce(self.m2 + (self.mean - mean).square() * self.count))

    @staticmethod
    def concat_channels(parts: list[Moments]) -> Moments:
        """Return the moments of the channel-wise concatenation of maps of equal size."""
        mean, m2 = torch.cat([part.mean for part in parts], dim=1), torch.cat([part.m2 for part in parts], dim=1)
        return Moments(parts[0].count, mean, m2)


def group_affine(norm: nn.GroupNorm, moments: Moments) -> tuple[Tensor, Tensor]:
    """Express GroupNorm (Wu and He, arXiv 1803.08494) of a map with `moments` as x · scale + shift, each [B, 1, 1, C].

    The dtype is fp32 or that of the norm, whichever is wider: half precision loses too many digits if the mean is far
    from zero.
    """
    mean, m2 = (part.unflatten(1, (norm.num_groups, -1)) for part in (moments.mean, moments.m2))
    group_mean = mean.mean(dim=2, keepdim=True)
    spread = (mean - group_mean).square() * moments.count
    variance = (m2 + spread).sum(dim=2, keepdim=True) / (moments.count * mean.shape[2])
    scale = torch.rsqrt(variance + norm.eps) * norm.weight.unflatten(0, (norm.num_groups, -1))
    shift = norm.bias.unflatten(0, (norm.num_groups, -1)) - group_mean * scale
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    return scale.flatten(1)[:, None, None].to(wide), shift.flatten(1)[:, None, None].to(wide)
