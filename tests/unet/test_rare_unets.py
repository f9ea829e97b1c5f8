"""Rare variants of UNets either run in strips with the result of their plain forward, or are rejected."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from linfusion_cli.core.errors import DataError
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.storage import PLACES
from linfusion_cli.unet.check import check_supported
from tests.support.fakes import ConstantControlNet
from tests.support.small_models import build_small_sd_unet, build_small_xl_unet
from tests.unet.test_forward import random_condition, relative_error, run_in_strips, run_plain, with_linear_attention

SMALL = StripSize(2, 9)
RARE = {
    "5x5_kernels": {"conv_in_kernel": 5, "conv_out_kernel": 5},
    "1x1_kernels": {"conv_in_kernel": 1, "conv_out_kernel": 1},
    "layers_per_block": {"layers_per_block": (1, 2, 3), "transformer_layers_per_block": (1, 3, 2)},
    "indivisible_channels": {"block_out_channels": (8, 12, 20)},
    "other_activations": {"act_fn": "gelu", "time_embedding_act_fn": "silu", "timestep_post_act": "gelu"},
    "fourier_time": {"time_embedding_type": "fourier"},
    "inpainting": {"in_channels": 9},
    "plain_middle": {"mid_block_type": "UNetMidBlock2D"},
    "no_middle": {"mid_block_type": None},
}


@contextmanager
def rare_unet(**fields: object) -> Iterator[UNet2DConditionModel]:
    """Build an SDXL UNet with other fields in its config, in fp64, with random weights in its norms."""
    config = dict(build_small_xl_unet().config)
    config.pop("_use_default_values", None)  # fields named there would keep their defaults
    with with_linear_attention(lambda: UNet2DConditionModel.from_config({**config, **fields}), torch.float64) as unet:
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
        yield unet


def create_latents(unet, height: int = 21, width: int = 13) -> torch.Tensor:
    return torch.randn(1, unet.config.in_channels, height, width, dtype=unet.dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", RARE)
def test_rare_unets_equal_their_plain_forward(kind, place):
    dilation = 1 if "kernel" in kind else 2  # the reference dilates 3x3 kernels only
    with rare_unet(**RARE[kind]) as unet:
        check_supported(unet)
        latents, condition = create_latents(unet), random_condition(unet)
        result = run_in_strips(unet, latents, condition, SMALL, place, dilation)
        assert relative_error(result, run_plain(unet, latents, condition, dilation)) <= 1e-12


@pytest.mark.parametrize("place", PLACES)
def test_a_unet_without_a_middle(place):
    """The last map is also a skip connection, and the first up block reads it twice."""
    with rare_unet(mid_block_type=None) as unet:
        check_supported(unet)
        latents, condition = create_latents(unet), random_condition(unet)
        result = run_in_strips(unet, latents, condition, SMALL, place)
        assert relative_error(result, run_plain(unet, latents, condition)) <= 1e-12


@pytest.mark.filterwarnings("ignore:.lora_bias")
@pytest.mark.parametrize("targets", [["to_q", "to_out.0", "ff.net.2"], ["conv1", "conv2", "conv_shortcut", "conv"]])
@pytest.mark.parametrize("more", [{"use_dora": True}, {"use_rslora": True, "lora_bias": True}], ids=["dora", "bias"])
def test_other_kinds_of_lora(targets, more):
    with rare_unet() as unet:
        latents, condition = create_latents(unet), random_condition(unet)
        without = run_plain(unet, latents, condition, 2)
        unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets, **more))
        unet.to(torch.float64).eval()
        expected = run_plain(unet, latents, condition, 2)
        assert relative_error(expected, without) > 0.001
        for place in PLACES:
            assert relative_error(run_in_strips(unet, latents, condition, SMALL, place, dilation=2), expected) <= 1e-12


@pytest.mark.parametrize("make", [build_small_xl_unet, build_small_sd_unet], ids=["xl", "sd15"])
def test_everything_at_once(make):
    """Two images, a ControlNet, LoRA on convolutions, dilation, and strips of one row."""
    with with_linear_attention(make, torch.float64) as unet:
        unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["conv1", "conv_in", "to_k", "conv"]))
        unet.to(torch.float64).eval()
        latents, condition = torch.randn(2, 4, 37, 53, dtype=torch.float64), random_condition(unet, batch=2)
        skips = []
        hooks = [block.register_forward_hook(lambda *call: skips.extend(call[-1][1])) for block in unet.down_blocks]
        hooks.append(unet.conv_in.register_forward_hook(lambda *call: skips.append(call[-1])))
        run_plain(unet, latents, condition)
        for hook in hooks:
            hook.remove()
        residuals = [torch.randn_like(skip) for skip in skips]
        condition = replace(condition, controlnets=[ConstantControlNet(*residuals, torch.randn_like(residuals[-1]))])
        expected = run_plain(unet, latents, condition, 2)
        for place in PLACES:
            result = run_in_strips(unet, latents, condition, StripSize(1, 11), place, 2)
            assert relative_error(result, expected) <= 1e-12


def test_freeu_is_rejected():
    with rare_unet() as unet:
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        with pytest.raises(DataError, match="up_blocks"):
            check_supported(unet)
