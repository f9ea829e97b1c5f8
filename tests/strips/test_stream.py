"""A streamed network equals the network, for all strip heights, odd sizes, strides and upscaling."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linfusion_cli.strips.stats import Moments
from linfusion_cli.strips.stream import (
    Add,
    Convolution,
    Edges,
    FrozenNorm,
    Pointwise,
    ResidualBuffer,
    receptive_radius,
    stream,
)

CHANNELS = 4


class Network(nn.Module):
    """The layers of a VAE: a normalised block with a shortcut, downsampling, upsampling and a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, CHANNELS) for _ in range(2))
        self.block = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.shortcut = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.down, self.even = nn.Conv2d(CHANNELS, 6, 3, stride=2), nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.up, self.out = nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        hidden = self.block[0](F.silu(self.norms[0](x)))
        x = self.shortcut(x) + self.block[1](torch.tanh(self.norms[1](hidden)))
        x = self.even(self.down(F.pad(x, (0, 1, 0, 1))))
        return self.out(self.up(F.interpolate(x, scale_factor=2.0)))

    def stages(self, x):
        """Return the same network as stages, with the statistics of `x`."""
        norms = [FrozenNorm(norm, act) for norm, act in zip(self.norms, (nn.SiLU(), nn.Tanh()), strict=True)]
        hidden = self.block[0](F.silu(self.norms[0](x)))
        for norm, inputs in zip(norms, (x, hidden), strict=True):
            norm.freeze(Moments.from_rows(inputs.permute(0, 2, 3, 1)))
        buffer = ResidualBuffer()
        return [
            Convolution(self.block[0], norms[0], residual=buffer),
            Convolution(self.block[1], norms[1]),
            Add(buffer, self.shortcut),
            Convolution(self.down, edges=Edges(top=0, bottom=1, right=1)),
            Convolution(self.even),
            Convolution(self.up, upscale=True),
            Pointwise(lambda rows: rows),
            Convolution(self.out),
        ]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network().double().eval().requires_grad_(False)


def run_stream(stages, x, height, step=None):
    rows = x.permute(0, 2, 3, 1)
    parts = list(stream(stages, lambda top, bottom: rows[:, top:bottom], x.shape[2], height, step))
    return torch.cat(parts, dim=1).permute(0, 3, 1, 2), parts


@pytest.mark.parametrize("size", [(4, 4), (16, 8), (20, 36), (64, 12)])
@pytest.mark.parametrize("height", [1, 2, 3, 7, 16, 100])
@torch.inference_mode()
def test_a_stream_equals_the_network(network, size, height):
    x = torch.randn(2, CHANNELS, *size, dtype=torch.float64)
    x[1] = x[0]  # both images use the same statistics
    result, parts = run_stream(network.stages(x[:1]), x, height)
    torch.testing.assert_close(result, network(x), rtol=1e-12, atol=1e-12)
    assert max(part.shape[1] for part in parts) <= height + 1


@torch.inference_mode()
def test_the_read_step_does_not_change_the_result(network):
    x = torch.randn(1, CHANNELS, 40, 12, dtype=torch.float64)
    stages = network.stages(x)
    torch.testing.assert_close(run_stream(stages, x, 3, step=16)[0], run_stream(stages, x, 3)[0], rtol=0, atol=1e-14)


@torch.inference_mode()
def test_a_stream_restarts_after_an_interruption(network):
    x = torch.randn(1, CHANNELS, 24, 8, dtype=torch.float64)
    stages, rows = network.stages(x), x.permute(0, 2, 3, 1)
    next(stream(stages, lambda top, bottom: rows[:, top:bottom], 24, 4))
    torch.testing.assert_close(run_stream(stages, x, 4)[0], network(x), rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_layers_are_restored(network):
    x = torch.randn(1, CHANNELS, 8, 8, dtype=torch.float64)
    next(stream(network.stages(x), lambda top, bottom: x.permute(0, 2, 3, 1)[:, top:bottom], 8, 4))
    assert [layer.padding for layer in (network.up, network.down, network.even)] == [(1, 1), (0, 0), (1, 1)]


@torch.inference_mode()
def test_the_receptive_radius_is_a_tight_upper_bound(network):
    x = torch.randn(1, CHANNELS, 64, 8, dtype=torch.float64)
    stages = network.stages(x)
    radius = receptive_radius(stages)
    other = x.clone()
    other[:, :, 32] += 1
    changed = (run_stream(stages, x, 16)[0] - run_stream(stages, other, 16)[0]).abs().amax(dim=(0, 1, 3)) > 1e-12
    rows = changed.nonzero().flatten() * 2  # two input rows per output row
    assert 32 - radius <= rows.min() and rows.max() <= 32 + radius
    assert rows.max() - rows.min() > radius
