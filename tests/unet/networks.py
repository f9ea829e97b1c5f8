"""Random UNets of every family with linear attention, what they hear, and their plain forward to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

import linfusion_cli.models
from linfusion_cli.attention.linear import LinearAttention
from linfusion_cli.attention.mount import mounted, self_attentions
from linfusion_cli.attention.weights import load_weights
from linfusion_cli.models.load import load_unet
from linfusion_cli.strips.exchange import Alone, Exchange
from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.strips.storage import Place, Storage
from linfusion_cli.unet.forward import Condition
from tests.models_in_small import small_sd_unet, small_xl_unet

DEMO = Path(linfusion_cli.models.__file__).parent / "demo"
TIMESTEP = torch.tensor(321)
LORA_LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2"]
LORA_CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in"]


def sd2_unet(**more: object) -> UNet2DConditionModel:
    """As SD 2.1: heads of its own on each level, linear projections, upcast attention."""
    return changed(
        small_sd_unet,
        attention_head_dim=(1, 2, 4, 8),
        use_linear_projection=True,
        upcast_attention=True,
        cross_attention_dim=20,
        **more,
    )


def changed(build: Callable[[], UNet2DConditionModel], **fields: object) -> UNet2DConditionModel:
    """`build`'s UNet with other fields in its config."""
    return UNet2DConditionModel.from_config({**build().config, **fields})


def demo_unet() -> UNet2DConditionModel:
    """The embedded model's, with its own LinFusion weights."""
    unet = load_unet(DEMO, torch.float32)
    mount(unet, load_weights(DEMO / "linfusion", unet, torch.float32))
    return unet


FAMILIES = {"xl": small_xl_unet, "sd1": small_sd_unet, "sd2": sd2_unet, "demo": demo_unet}


def mount(unet: UNet2DConditionModel, modules: dict[str, LinearAttention]) -> None:
    """Put `modules` in for good."""
    mounted(unet, modules).__enter__()


def linear_unet(
    build: Callable[[], UNet2DConditionModel] = small_xl_unet, dtype: torch.dtype = torch.float64
) -> UNet2DConditionModel:
    """`build`'s UNet with random linear attention, where it has none yet, and norms that do not just normalise."""
    torch.manual_seed(0)
    unet = build()
    if build is not demo_unet:
        mount(unet, {path: LinearAttention(old.to_q.in_features, old.heads) for path, old in originals(unet).items()})
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
    return unet.eval().to(dtype).requires_grad_(False)


def originals(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """The self-attentions that are not linear yet."""
    return {path: old for path, old in self_attentions(unet).items() if not isinstance(old, LinearAttention)}


def with_lora(unet: UNet2DConditionModel, targets: list[str], **more: object) -> UNet2DConditionModel:
    """`unet` with random LoRA factors on `targets`, neither of them zero."""
    dtype = unet.dtype
    unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=targets, **more))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.3)
    return unet.eval().to(dtype).requires_grad_(False)


def latents_for(unet: UNet2DConditionModel, height: int = 37, width: int = 53, batch: int = 1) -> Tensor:
    """Random latents, by default odd on every level."""
    torch.manual_seed(1)
    return torch.randn(batch, 4, height, width, dtype=unet.dtype)


def condition_for(unet: UNet2DConditionModel, batch: int = 1, **more: object) -> Condition:
    """Random text and, for SDXL, pooled text and sizes."""
    torch.manual_seed(2)
    text = torch.randn(batch, 11, unet.config.cross_attention_dim, dtype=unet.dtype)
    if unet.config.addition_embed_type is None:
        return Condition(text, **more)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    sizes = torch.randint(1, 999, (batch, 6)).to(unet.dtype)
    return Condition(text, {"text_embeds": torch.randn(batch, pooled, dtype=unet.dtype), "time_ids": sizes}, **more)


def residuals_for(unet: UNet2DConditionModel, latents: Tensor) -> dict[str, object]:
    """Random residuals, one for each skip connection and one for the middle, as a ControlNet gives them."""
    torch.manual_seed(3)
    batch, _, height, width = latents.shape
    shapes = [(unet.config.block_out_channels[0], height, width)]
    for block in unet.down_blocks:
        channels = block.resnets[0].out_channels
        shapes += [(channels, height, width)] * len(block.resnets)
        if block.downsamplers:
            height, width = -(-height // 2), -(-width // 2)
            shapes.append((channels, height, width))
    *residuals, mid = (torch.randn(batch, *shape, dtype=latents.dtype) for shape in [*shapes, shapes[-1]])
    return {"residuals": residuals, "mid_residual": mid}


@contextmanager
def dilated(unet: UNet2DConditionModel, dilation: int) -> Iterator[None]:
    """Within the context every 3x3 convolution is dilated and padded so many times; those of LoRA too."""
    convolutions = [module for module in unet.modules() if isinstance(module, nn.Conv2d)]
    convolutions = [module for module in convolutions if module.kernel_size == (3, 3)]
    for module in convolutions:
        module.dilation = module.padding = (dilation, dilation)
    yield
    for module in convolutions:
        module.dilation = module.padding = (1, 1)


@torch.inference_mode()
def plain(unet: UNet2DConditionModel, latents: Tensor, condition: Condition, dilation: int = 1) -> Tensor:
    """The prediction of diffusers' own forward."""
    if dilation > 1:
        with dilated(unet, dilation):
            return plain(unet, latents, condition)
    return unet(
        latents,
        TIMESTEP,
        condition.text,
        timestep_cond=condition.timestep_cond,
        added_cond_kwargs=condition.added,
        down_block_additional_residuals=condition.residuals or None,
        mid_block_additional_residual=condition.mid_residual,
        return_dict=False,
    )[0]


def strips_for(
    unet: UNet2DConditionModel,
    size: StripSize,
    place: Place = "device",
    dilation: int = 1,
    exchange: Exchange | None = None,
) -> Strips:
    """Strips on the CPU in the UNet's dtype."""
    return Strips(size, Storage(place, torch.device("cpu"), unet.dtype), exchange or Alone(), dilation)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm())
