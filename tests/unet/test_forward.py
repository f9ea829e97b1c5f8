"""A forward in strips equals the plain forward with the same attention, for all strip sizes, storages and dilations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions, mount_modules
from linfusion_cli.mixers.linear.weights import load_weights
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.load.networks import load_unet
from linfusion_cli.models.locate.model import DEMO_FOLDER
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.check import check_supported
from linfusion_cli.unet.forward import UNetInputs, strip_forward
from tests.support.fakes import ConstantControlNet
from tests.support.small_models import build_small_sd_unet, build_small_xl_unet

CPU, TIMESTEP = torch.device("cpu"), torch.tensor(500)
WHOLE = StripSize(1 << 20, 1 << 30)
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


def small_sd21_unet() -> UNet2DConditionModel:
    """SD 2.1's linear projections and upcast attention, with a different number of heads in each level."""
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
    """Ten transformer layers, norm groups that extend over several parts of an up block, and timestep conditioning."""
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


FAMILIES = {
    "xl": build_small_xl_unet,
    "sd15": build_small_sd_unet,
    "sd21": small_sd21_unet,
    "deep": deep_unet,
    "demo": demo_unet,
}


@contextmanager
def with_linear_attention(
    make: Callable[[], UNet2DConditionModel], dtype: torch.dtype
) -> Iterator[UNet2DConditionModel]:
    """Mount linear attention: trained for the demo model, random for the others."""
    torch.manual_seed(0)
    unet = make().eval().requires_grad_(False)
    if make is demo_unet:
        modules = load_weights(DEMO_FOLDER / "linfusion", unet, torch.float32)
    else:
        modules = {p: LinearAttention(old.to_q.in_features, old.heads) for p, old in find_self_attentions(unet).items()}
    with mount_modules(unet, modules):
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
def dilate_all(unet: nn.Module, dilation: int) -> Iterator[None]:
    """Dilate and pad every 3x3 convolution, rows and columns alike."""
    large = [module for module in unet.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    for module in large:
        module.dilation = module.padding = (dilation, dilation)
    yield
    for module in large:
        module.dilation = module.padding = (1, 1)


@torch.inference_mode()
def run_plain(unet: UNet2DConditionModel, latents: Tensor, condition: UNetInputs, dilation: int = 1) -> Tensor:
    """Run the plain forward with at most one ControlNet, a ConstantControlNet."""
    *residuals, middle = [tensor for control in condition.controlnets for tensor in control.tensors] or [None]
    with dilate_all(unet, dilation):
        return unet(
            latents,
            TIMESTEP,
            condition.text,
            timestep_cond=condition.timestep_cond,
            added_cond_kwargs=condition.added,
            down_block_additional_residuals=tuple(residuals) or None,
            mid_block_additional_residual=middle,
        ).sample


def run_in_strips(unet, latents, condition, size=None, place="device", dilation=1) -> Tensor:
    context = StripContext(size or StripSize(3, 55), Storage(place, CPU, unet.dtype), SingleDevice(), dilation)
    return strip_forward(unet, context, latents, TIMESTEP, condition)


def relative_error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape and result.dtype == expected.dtype
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_strips_of_any_height_equal_the_plain_forward(family, dtype):
    """The sides of 37 x 53 latents are odd in every level."""
    with with_linear_attention(FAMILIES[family], dtype) as unet:
        check_supported(unet)
        latents, condition = torch.randn(1, 4, 37, 53, dtype=dtype), random_condition(unet)
        original, expected = latents.clone(), run_plain(unet, latents, condition)
        for size in (StripSize(1, 61), StripSize(2, 106), StripSize(3, 64), StripSize(7, 371), WHOLE):
            assert relative_error(run_in_strips(unet, latents, condition, size), expected) <= BOUNDS[dtype], size
        assert torch.equal(latents, original)


@pytest.mark.parametrize("height_width", [(37, 53), (8, 8), (9, 31), (40, 3), (1, 5), (2, 2)])
def test_all_sizes(height_width):
    with with_linear_attention(build_small_sd_unet, torch.float64) as unet:
        latents, condition = torch.randn(1, 4, *height_width, dtype=torch.float64), random_condition(unet)
        expected = run_plain(unet, latents, condition)
        assert relative_error(run_in_strips(unet, latents, condition, StripSize(2, 8)), expected) <= 1e-12


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["xl", "sd15"])
def test_every_storage_and_dilation(family, place, dilation):
    """Strips of one row are lower than the halo of every dilated convolution."""
    with with_linear_attention(FAMILIES[family], torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 37, 53, dtype=torch.float64), random_condition(unet)
        expected = run_plain(unet, latents, condition, dilation)
        for rows in (1, 5):
            result = run_in_strips(unet, latents, condition, StripSize(rows, 70), place, dilation)
            assert relative_error(result, expected) <= 1e-12


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["xl", "sd15"])
def test_residuals_of_a_controlnet_are_added_to_every_skip_connection(family, place, dilation):
    with with_linear_attention(FAMILIES[family], torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 21, 13, dtype=torch.float64), random_condition(unet)
        shapes = skip_shapes(unet, latents, condition)
        residuals = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        control = ConstantControlNet(*residuals, torch.randn_like(residuals[-1]))
        controlled = UNetInputs(condition.text, condition.added, controlnets=[control])
        expected = run_plain(unet, latents, controlled, dilation)
        assert relative_error(expected, run_plain(unet, latents, condition, dilation)) > 0.01
        result = run_in_strips(unet, latents, controlled, StripSize(2, 9), place, dilation)
        assert relative_error(result, expected) <= 1e-12


def skip_shapes(unet, latents, condition) -> list[torch.Size]:
    """Return the shapes of the skip connections, in order of computation."""
    shapes = []
    hooks = [unet.conv_in.register_forward_hook(lambda module, args, out: shapes.append(out.shape))]
    for block in unet.down_blocks:
        hook = block.register_forward_hook(lambda module, args, out: shapes.extend(skip.shape for skip in out[1]))
        hooks.append(hook)
    run_plain(unet, latents, condition)
    for hook in hooks:
        hook.remove()
    return shapes


@pytest.mark.parametrize("family", ["xl", "sd15"])
def test_a_batch_of_two(family):
    with with_linear_attention(FAMILIES[family], torch.float64) as unet:
        latents, condition = torch.randn(2, 4, 19, 11, dtype=torch.float64), random_condition(unet, batch=2)
        expected = run_plain(unet, latents, condition)
        for place in PLACES:
            assert relative_error(run_in_strips(unet, latents, condition, place=place), expected) <= 1e-12


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
        without = run_plain(unet, latents, condition, dilation)
        unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        unet.to(torch.float64).eval()
        expected = run_plain(unet, latents, condition, dilation)
        assert relative_error(expected, without) > 0.001
        result = run_in_strips(unet, latents, condition, StripSize(2, 9), dilation=dilation)
        assert relative_error(result, expected) <= 1e-12


def test_convolutions_are_restored_even_after_an_error(monkeypatch):
    with with_linear_attention(build_small_xl_unet, torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 9, 9, dtype=torch.float64), random_condition(unet)
        original = [(layer.dilation, layer.padding) for layer in unet.modules() if isinstance(layer, nn.Conv2d)]
        run_in_strips(unet, latents, condition, dilation=2)
        assert original == [(layer.dilation, layer.padding) for layer in unet.modules() if isinstance(layer, nn.Conv2d)]

        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(unet.mid_block.resnets[0].conv1, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            run_in_strips(unet, latents, condition, dilation=2)
        assert original == [(layer.dilation, layer.padding) for layer in unet.modules() if isinstance(layer, nn.Conv2d)]


def test_the_same_strips_give_the_same_bits():
    with with_linear_attention(build_small_xl_unet, torch.float32) as unet:
        latents, condition = torch.randn(1, 4, 37, 53), random_condition(unet)
        assert torch.equal(run_in_strips(unet, latents, condition), run_in_strips(unet, latents, condition))
        on_host = run_in_strips(unet, latents, condition, place="host")
        assert torch.equal(run_in_strips(unet, latents, condition), on_host)
