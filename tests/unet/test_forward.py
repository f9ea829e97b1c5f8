"""A forward in strips is the plain forward with the same attention, whatever the strips, sizes, storage or dilation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import mounted, self_attentions
from linfusion_cli.mixers.linear.weights import load_weights
from linfusion_cli.models.files.parts import Model
from linfusion_cli.models.load.parts import load_unet
from linfusion_cli.models.locate.model import DEMO_FOLDER
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.check import check_supported
from linfusion_cli.unet.forward import UNetInputs, strip_forward
from tests.support.fakes import GivenControl
from tests.support.small_models import small_sd_unet, small_xl_unet

CPU, TIMESTEP = torch.device("cpu"), torch.tensor(500)
WHOLE = StripSize(1 << 20, 1 << 30)
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


def small_sd21_unet() -> UNet2DConditionModel:
    """SD 2.1's linear projections and its upcast attention, with a number of heads for each level."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        attention_head_dim=(1, 2, 2, 2),
        cross_attention_dim=24,
        use_linear_projection=True,
        upcast_attention=True,
        norm_num_groups=4,
    )


def deep_unet() -> UNet2DConditionModel:
    """Ten transformer layers, groups that straddle the parts of an up block, and a condition on the timestep."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 10),
        attention_head_dim=(1, 3),
        cross_attention_dim=8,
        time_cond_proj_dim=6,
        norm_num_groups=8,
    )


def demo_unet() -> UNet2DConditionModel:
    return load_unet(Model(DEMO_FOLDER), torch.float32)


FAMILIES = {"xl": small_xl_unet, "sd15": small_sd_unet, "sd21": small_sd21_unet, "deep": deep_unet, "demo": demo_unet}


@contextmanager
def with_linear_attention(
    make: Callable[[], UNet2DConditionModel], dtype: torch.dtype
) -> Iterator[UNet2DConditionModel]:
    """The UNet with linear attention mounted: trained for the demo model, random for the others."""
    torch.manual_seed(0)
    unet = make().eval().requires_grad_(False)
    if make is demo_unet:
        modules = load_weights(DEMO_FOLDER / "linfusion", unet, torch.float32)
    else:
        modules = {p: LinearAttention(old.to_q.in_features, old.heads) for p, old in self_attentions(unet).items()}
    with mounted(unet, modules):
        yield unet.to(dtype)


def random_condition(unet: UNet2DConditionModel, batch: int = 1, **more) -> UNetInputs:
    config, where = unet.config, {"dtype": unet.dtype}
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(batch, pooled, **where), "time_ids": torch.full((batch, 6), 64.0, **where)}
    timestep_cond = torch.randn(batch, config.time_cond_proj_dim, **where) if config.time_cond_proj_dim else None
    return UNetInputs(torch.randn(batch, 7, config.cross_attention_dim, **where), added, timestep_cond, **more)


@contextmanager
def dilated(unet: nn.Module, dilation: int) -> Iterator[None]:
    """Every 3x3 convolution dilated, as the plain forward has it: rows and columns padded alike."""
    large = [module for module in unet.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    for module in large:
        module.dilation = module.padding = (dilation, dilation)
    yield
    for module in large:
        module.dilation = module.padding = (1, 1)


@torch.inference_mode()
def plain(unet: UNet2DConditionModel, latents: Tensor, condition: UNetInputs, dilation: int = 1) -> Tensor:
    """Under at most one control, a GivenControl."""
    *residuals, middle = [tensor for control in condition.controlnets for tensor in control.tensors] or [None]
    with dilated(unet, dilation):
        return unet(
            latents,
            TIMESTEP,
            condition.text,
            timestep_cond=condition.timestep_cond,
            added_cond_kwargs=condition.added,
            down_block_additional_residuals=tuple(residuals) or None,
            mid_block_additional_residual=middle,
        ).sample


def in_strips(unet, latents, condition, size=None, place="device", dilation=1) -> Tensor:
    strips = Strips(size or StripSize(3, 55), Storage(place, CPU, unet.dtype), SingleDevice(), dilation)
    return strip_forward(unet, strips, latents, TIMESTEP, condition)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_strips_of_any_height_equal_the_plain_forward(family, dtype):
    """37 x 53 latents are odd at every level."""
    with with_linear_attention(FAMILIES[family], dtype) as unet:
        check_supported(unet)
        latents, condition = torch.randn(1, 4, 37, 53, dtype=dtype), random_condition(unet)
        before, expected = latents.clone(), plain(unet, latents, condition)
        for size in (StripSize(1, 61), StripSize(2, 106), StripSize(3, 64), StripSize(7, 371), WHOLE):
            assert error(in_strips(unet, latents, condition, size), expected) <= BOUNDS[dtype], size
        assert torch.equal(latents, before)


@pytest.mark.parametrize("height_width", [(37, 53), (8, 8), (9, 31), (40, 3), (1, 5), (2, 2)])
def test_sizes_of_every_kind(height_width):
    with with_linear_attention(small_sd_unet, torch.float64) as unet:
        latents, condition = torch.randn(1, 4, *height_width, dtype=torch.float64), random_condition(unet)
        expected = plain(unet, latents, condition)
        assert error(in_strips(unet, latents, condition, StripSize(2, 8)), expected) <= 1e-12


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["xl", "sd15"])
def test_every_storage_and_dilation(family, place, dilation):
    """Strips of one row are lower than the halo of every dilated convolution."""
    with with_linear_attention(FAMILIES[family], torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 37, 53, dtype=torch.float64), random_condition(unet)
        expected = plain(unet, latents, condition, dilation)
        for rows in (1, 5):
            found = in_strips(unet, latents, condition, StripSize(rows, 70), place, dilation)
            assert error(found, expected) <= 1e-12


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["xl", "sd15"])
def test_what_a_control_finds_is_added_to_every_skip_connection(family, place, dilation):
    with with_linear_attention(FAMILIES[family], torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 21, 13, dtype=torch.float64), random_condition(unet)
        shapes = skip_shapes(unet, latents, condition)
        residuals = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        control = GivenControl(*residuals, torch.randn_like(residuals[-1]))
        controlled = UNetInputs(condition.text, condition.added, controlnets=[control])
        expected = plain(unet, latents, controlled, dilation)
        assert error(expected, plain(unet, latents, condition, dilation)) > 0.01
        found = in_strips(unet, latents, controlled, StripSize(2, 9), place, dilation)
        assert error(found, expected) <= 1e-12


def skip_shapes(unet, latents, condition) -> list[torch.Size]:
    """The shapes of the skip connections, in the order in which a plain forward makes them."""
    shapes = []
    hooks = [unet.conv_in.register_forward_hook(lambda module, args, out: shapes.append(out.shape))]
    for block in unet.down_blocks:
        hook = block.register_forward_hook(lambda module, args, out: shapes.extend(skip.shape for skip in out[1]))
        hooks.append(hook)
    plain(unet, latents, condition)
    for hook in hooks:
        hook.remove()
    return shapes


@pytest.mark.parametrize("family", ["xl", "sd15"])
def test_two_at_once_are_each_of_them(family):
    with with_linear_attention(FAMILIES[family], torch.float64) as unet:
        latents, condition = torch.randn(2, 4, 19, 11, dtype=torch.float64), random_condition(unet, batch=2)
        expected = plain(unet, latents, condition)
        for place in PLACES:
            assert error(in_strips(unet, latents, condition, place=place), expected) <= 1e-12


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("family", ["xl", "sd15"])
@pytest.mark.parametrize(
    "targets",
    [
        ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
        ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "conv", "time_emb_proj"],
    ],
    ids=["linear", "convolution"],
)
def test_lora_layers_are_called_and_dilated(family, targets, dilation):
    with with_linear_attention(FAMILIES[family], torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 21, 13, dtype=torch.float64), random_condition(unet)
        without = plain(unet, latents, condition, dilation)
        unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        unet.to(torch.float64).eval()
        expected = plain(unet, latents, condition, dilation)
        assert error(expected, without) > 0.001
        assert error(in_strips(unet, latents, condition, StripSize(2, 9), dilation=dilation), expected) <= 1e-12


def test_convolutions_are_as_they_were_also_after_an_error(monkeypatch):
    with with_linear_attention(small_xl_unet, torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 9, 9, dtype=torch.float64), random_condition(unet)
        before = [(layer.dilation, layer.padding) for layer in unet.modules() if isinstance(layer, nn.Conv2d)]
        in_strips(unet, latents, condition, dilation=2)
        assert before == [(layer.dilation, layer.padding) for layer in unet.modules() if isinstance(layer, nn.Conv2d)]

        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(unet.mid_block.resnets[0].conv1, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            in_strips(unet, latents, condition, dilation=2)
        assert before == [(layer.dilation, layer.padding) for layer in unet.modules() if isinstance(layer, nn.Conv2d)]


def test_the_same_strips_give_the_same_bits():
    with with_linear_attention(small_xl_unet, torch.float32) as unet:
        latents, condition = torch.randn(1, 4, 37, 53), random_condition(unet)
        assert torch.equal(in_strips(unet, latents, condition), in_strips(unet, latents, condition))
        on_host = in_strips(unet, latents, condition, place="host")
        assert torch.equal(in_strips(unet, latents, condition), on_host)
