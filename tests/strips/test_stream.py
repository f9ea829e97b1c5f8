"""A network as a stream is the network: over strip heights, odd sizes, strides and doublings."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linfusion_cli.strips.stats import Moments
from linfusion_cli.strips.stream import Add, Convolution, Edges, FrozenNorm, Pointwise, ResidualBuffer, reach, stream

CHANNELS = 4


class Network(nn.Module):
    """What a VAE has: a normalised block with a shortcut, a step down, a doubling, and a kernel of one pixel."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, CHANNELS) for _ in range(2))
        self.block = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.past = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.down, self.even = nn.Conv2d(CHANNELS, 6, 3, stride=2), nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.up, self.out = nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        hidden = self.block[0](F.silu(self.norms[0](x)))
        x = self.past(x) + self.block[1](torch.tanh(self.norms[1](hidden)))
        x = self.even(self.down(F.pad(x, (0, 1, 0, 1))))
        return self.out(self.up(F.interpolate(x, scale_factor=2.0)))

    def stages(self, x):
        """The same as stages, with the statistics of `x`."""
        before = [FrozenNorm(norm, act) for norm, act in zip(self.norms, (nn.SiLU(), nn.Tanh()), strict=True)]
        hidden = self.block[0](F.silu(self.norms[0](x)))
        for norm, seen in zip(before, (x, hidden), strict=True):
            norm.freeze(Moments.of(seen.permute(0, 2, 3, 1)))
        kept = ResidualBuffer()
        return [
            Convolution(self.block[0], before[0], keeps=kept),
            Convolution(self.block[1], before[1]),
            Add(kept, self.past),
            Convolution(self.down, edges=Edges(top=0, bottom=1, right=1)),
            Convolution(self.even),
            Convolution(self.up, doubled=True),
            Pointwise(lambda rows: rows),
            Convolution(self.out),
        ]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network().double().eval().requires_grad_(False)


def as_stream(stages, x, height, step=None):
    rows = x.permute(0, 2, 3, 1)
    found = list(stream(stages, lambda top, bottom: rows[:, top:bottom], x.shape[2], height, step))
    return torch.cat(found, dim=1).permute(0, 3, 1, 2), found


@pytest.mark.parametrize("size", [(4, 4), (16, 8), (20, 36), (64, 12)])
@pytest.mark.parametrize("height", [1, 2, 3, 7, 16, 100])
@torch.inference_mode()
def test_a_stream_is_the_network(network, size, height):
    x = torch.randn(2, CHANNELS, *size, dtype=torch.float64)
    x[1] = x[0]  # one picture's statistics serve the batch
    found, parts = as_stream(network.stages(x[:1]), x, height)
    torch.testing.assert_close(found, network(x), rtol=1e-12, atol=1e-12)
    assert max(part.shape[1] for part in parts) <= height + 1


@torch.inference_mode()
def test_reading_taller_strips_than_are_computed_changes_nothing(network):
    x = torch.randn(1, CHANNELS, 40, 12, dtype=torch.float64)
    stages = network.stages(x)
    torch.testing.assert_close(as_stream(stages, x, 3, step=16)[0], as_stream(stages, x, 3)[0], rtol=0, atol=1e-14)


@torch.inference_mode()
def test_a_stream_that_was_left_in_the_middle_begins_anew(network):
    x = torch.randn(1, CHANNELS, 24, 8, dtype=torch.float64)
    stages, rows = network.stages(x), x.permute(0, 2, 3, 1)
    next(stream(stages, lambda top, bottom: rows[:, top:bottom], 24, 4))
    torch.testing.assert_close(as_stream(stages, x, 4)[0], network(x), rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_layers_are_left_as_they_were(network):
    x = torch.randn(1, CHANNELS, 8, 8, dtype=torch.float64)
    next(stream(network.stages(x), lambda top, bottom: x.permute(0, 2, 3, 1)[:, top:bottom], 8, 4))
    assert [layer.padding for layer in (network.up, network.down, network.even)] == [(1, 1), (0, 0), (1, 1)]


@torch.inference_mode()
def test_what_a_row_reaches_is_no_more_than_is_said_and_nearly_that(network):
    x = torch.randn(1, CHANNELS, 64, 8, dtype=torch.float64)
    stages, said = network.stages(x), None
    said = reach(stages)
    other = x.clone()
    other[:, :, 32] += 1
    changed = (as_stream(stages, x, 16)[0] - as_stream(stages, other, 16)[0]).abs().amax(dim=(0, 1, 3)) > 1e-12
    rows = changed.nonzero().flatten() * 2  # two rows of `x` for each that comes out
    assert 32 - said <= rows.min() and rows.max() <= 32 + said
    assert rows.max() - rows.min() > said
