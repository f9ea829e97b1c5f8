"""Initial weights of the VAE: reduce 8 times to a thumbnail and enlarge it smoothly; training adds the details.

With random weights, a decoder with many normalisations needs a thousand steps to learn to transport colours. Here eight
channels of each level transport them from the start: the three colours, their negatives (which keep the mean at 0), and
a positive and a negative constant (which preserve the brightness through normalisation).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

CARRIED_CHANNELS = 8
COLOUR_SCALE = 2.0  # ratio of the latents to the mean colour in -1..1


@torch.no_grad()
def init_as_thumbnail(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Set the initial weights; the last convolution of encoder and decoder is fitted to `pixels` [B, 3, H, W]."""
    _zero_branches(vae)
    _init_colour_channels(vae.encoder.conv_in, 1.0)
    _init_colour_channels(vae.decoder.conv_in, 1 / COLOUR_SCALE)
    for block in vae.encoder.down_blocks:
        for sampler in block.downsamplers or ():
            _init_carried_channels(sampler.conv, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]) / 4)
    smooth = torch.tensor([1.0, 2, 1]) / 4
    for block in vae.decoder.up_blocks:
        for sampler in block.upsamplers or ():
            _init_carried_channels(sampler.conv, smooth[:, None] * smooth)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    _fit_ends(vae, pixels)
    # a small initial posterior variance: training samples from the posterior
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = -8


def _zero_branches(vae: AutoencoderKL) -> None:
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith("conv_shortcut"):
            _init_carried_channels(module, torch.ones(1, 1))


def _init_carried_channels(conv: nn.Conv2d, kernel: Tensor) -> None:
    conv.weight[:CARRIED_CHANNELS] = 0
    conv.bias[:CARRIED_CHANNELS] = 0
    for channel in range(CARRIED_CHANNELS):
        conv.weight[channel, channel] = kernel


def _init_colour_channels(conv: nn.Conv2d, scale: float) -> None:
    conv.weight[:CARRIED_CHANNELS] = 0
    conv.bias[:CARRIED_CHANNELS] = torch.tensor([0.0] * 6 + [1, -1])
    for channel in range(3):
        conv.weight[channel, channel, 1, 1] = scale
        conv.weight[channel + 3, channel, 1, 1] = -scale


def _fit_ends(vae: AutoencoderKL, pixels: Tensor) -> None:
    means = COLOUR_SCALE * F.avg_pool2d(pixels, 8)
    _fit(vae.encoder.conv_out, lambda: vae.encoder(pixels), means)
    latents = vae.encode(pixels).latent_dist.mean
    _fit(vae.decoder.conv_out, lambda: vae.decode(latents), pixels)


def _fit(conv: nn.Conv2d, run: Callable[[], object], wanted: Tensor) -> None:
    """Fit the centre tap of the first output channels of `conv` to `wanted` by ridge regression."""
    captured: list[Tensor] = []
    handle = conv.register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    run()
    handle.remove()
    inputs = captured[0].permute(0, 2, 3, 1).flatten(0, 2).double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    goal = wanted.permute(0, 2, 3, 1).flatten(0, 2).double()
    ridge = 1e-4 * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    found = torch.linalg.solve(inputs.mT @ inputs + ridge, inputs.mT @ goal).float()
    outputs = goal.shape[1]
    conv.weight[:outputs] = 0
    conv.weight[:outputs, :, 1, 1] = found[:-1].mT
    conv.bias[:outputs] = found[-1]
