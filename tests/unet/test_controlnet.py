"""ControlNets in strips equal their plain forward with the same linear attention, for all settings of strips."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions, mount_modules
from linfusion_cli.models.load.controlnet import build_linear_attention
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.feature_map import HostFeatureMap
from linfusion_cli.strips.ops import StripContext, StripSize, as_nhwc
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.check import check_controlnet
from linfusion_cli.unet.controlnet import ActiveControlNet, StripControlNet, WholeControlNet, embed_control_image
from linfusion_cli.unet.forward import strip_forward
from linfusion_cli.unet.predict import StripUNet, WholeUNet
from tests.support.small_controlnets import build_small_controlnet, build_small_union_controlnet
from tests.support.small_models import build_small_sd_unet, build_small_xl_unet
from tests.unet.test_forward import CPU, TIMESTEP, random_condition, relative_error
from tests.unet.test_ip_adapter import build_condition, load_unet_with_adapters

FP64 = torch.float64
UNETS = {"xl": build_small_xl_unet, "sd15": build_small_sd_unet}


@dataclass(frozen=True)
class Case:
    """A UNet and ControlNets in fp64 with linear attention, and an image for each ControlNet."""

    unet: UNet2DConditionModel
    controlnets: list[ActiveControlNet]
    images: list[Tensor]

    def run_plain(self, latents: Tensor, condition, dilation: int = 1, count: int | None = None) -> Tensor:
        """Return the prediction of diffusers' plain forwards with the first `count` ControlNets."""
        pairs = list(zip(self.controlnets, self.images, strict=True))[:count]
        whole = [WholeControlNet(control.net, control.scale, control.kind, image) for control, image in pairs]
        return WholeUNet(self.unet, dilation, whole).build_predictor(condition.text, condition.added)(latents, TIMESTEP)

    def run_in_strips(self, latents: Tensor, condition, size: StripSize, place="device", dilation: int = 1) -> Tensor:
        context = StripContext(size, Storage(place, CPU, FP64), SingleDevice(), dilation)
        controlnets = [self.embed(i, context.storage) for i in range(len(self.controlnets))]
        return strip_forward(self.unet, context, latents, TIMESTEP, replace(condition, controlnets=controlnets))

    def embed(self, i: int, storage: Storage) -> StripControlNet:
        control, rows = self.controlnets[i], as_nhwc(self.images[i])
        image = embed_control_image(control.net, lambda *span: rows[:, slice(*span)], *rows.shape[1:3], storage)
        return StripControlNet(control.net, control.scale, control.kind, image)


@contextmanager
def build_case(kinds: list[str], family: str = "xl", height: int = 21, width: int = 13) -> Iterator[Case]:
    """Build a case with ControlNets of these `kinds`, "plain" or "union", for latents of this size."""
    torch.manual_seed(0)
    unet = UNETS[family]().eval().requires_grad_(False)
    linear = {p: LinearAttention(old.to_q.in_features, old.heads) for p, old in find_self_attentions(unet).items()}
    controlnets = []
    with ExitStack() as stack:
        for i, kind in enumerate(kinds):
            net = (build_small_union_controlnet if kind == "union" else build_small_controlnet)(UNETS[family](), seed=i)
            stack.enter_context(mount_modules(net, build_linear_attention(net, linear)))
            controlnets.append(ActiveControlNet(net.to(FP64), 0.7 + i, 3 if kind == "union" else None))
        stack.enter_context(mount_modules(unet, linear))
        images = [torch.rand(1, 3, 8 * height, 8 * width, dtype=FP64) for _ in kinds]
        yield Case(unet.to(FP64), controlnets, images)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("kinds", "family"), [(["plain"], "xl"), (["plain"], "sd15"), (["union", "plain"], "xl")])
def test_strips_equal_the_plain_forwards(kinds, family, place, dilation):
    with build_case(kinds, family) as case:
        latents, condition = torch.randn(1, 4, 21, 13, dtype=FP64), random_condition(case.unet)
        expected = case.run_plain(latents, condition, dilation)
        for count in range(len(kinds)):
            assert relative_error(expected, case.run_plain(latents, condition, dilation, count)) > 0.01
        for size in (StripSize(1, 11), StripSize(5, 64)):
            assert relative_error(case.run_in_strips(latents, condition, size, place, dilation), expected) <= 1e-12


@pytest.mark.parametrize("height_width", [(8, 8), (9, 31), (40, 3), (1, 5)])
def test_all_sizes(height_width):
    with build_case(["plain", "union"], "xl", *height_width) as case:
        latents, condition = torch.randn(1, 4, *height_width, dtype=FP64), random_condition(case.unet)
        expected = case.run_plain(latents, condition)
        assert relative_error(case.run_in_strips(latents, condition, StripSize(2, 8)), expected) <= 1e-12


def test_both_halves_of_guidance_at_once_and_the_same_controlnet_twice():
    with build_case(["union"]) as case:
        second = replace(case.controlnets[0], scale=0.4, kind=1)
        twice = Case(case.unet, [*case.controlnets, second], [*case.images, torch.rand_like(case.images[0])])
        latents, condition = torch.randn(1, 4, 21, 13, dtype=FP64).repeat(2, 1, 1, 1), random_condition(case.unet, 2)
        expected = twice.run_plain(latents, condition, 2)
        for place in PLACES:
            result = twice.run_in_strips(latents, condition, StripSize(3, 20), place, 2)
            assert relative_error(result, expected) <= 1e-12


def test_an_embedding_moves_to_the_host_with_the_maps_when_memory_runs_out():
    with build_case(["union"]) as case:
        latents, condition = torch.randn(1, 4, 21, 13, dtype=FP64), random_condition(case.unet)
        on_device, on_host = (Storage(place, CPU, FP64) for place in ("device", "host"))
        control, expected = case.embed(0, on_device), case.run_plain(latents, condition)
        controlled = replace(condition, controlnets=[control])
        assert not isinstance(control.image.get_map(on_device), HostFeatureMap)
        for _ in range(2):
            context = StripContext(StripSize(2, 9), on_host, SingleDevice())
            assert relative_error(strip_forward(case.unet, context, latents, TIMESTEP, controlled), expected) <= 1e-12
            assert isinstance(control.image.get_map(on_device), HostFeatureMap)


def test_strip_unet_equals_whole_unet():
    with build_case(["plain"]) as case:
        latents, condition = torch.randn(1, 4, 21, 13, dtype=FP64), random_condition(case.unet)
        context = StripContext(StripSize(4, 64), Storage("device", CPU, FP64), SingleDevice())
        runner = StripUNet(case.unet, context, lambda *_: None, [case.embed(0, context.storage)])
        result = runner.build_predictor(condition.text, condition.added)(latents, TIMESTEP)
        assert relative_error(result, case.run_plain(latents, condition)) <= 1e-12


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_streamed_embedding_equals_that_of_the_whole_image(order):
    """Rows are read once, a few at a time, and no columns are lost if the width is not a power of two."""
    net = build_small_controlnet(build_small_sd_unet(), controlnet_conditioning_channel_order=order).to(FP64)
    image, spans = torch.rand(1, 3, 8 * 37, 8 * 11, dtype=FP64), []

    def read(top: int, bottom: int) -> Tensor:
        spans.append((top, bottom))
        return as_nhwc(image)[:, top:bottom]

    storage = Storage("device", CPU, FP64)
    result = embed_control_image(net, read, 8 * 37, 8 * 11, storage).get_map(storage)
    expected = as_nhwc(net.controlnet_cond_embedding(image if order == "rgb" else image.flip(1)))
    assert relative_error(result.tensor, expected) <= 1e-12 and result.is_read_only
    torch.testing.assert_close(result.moments.mean, expected.mean(dim=(1, 2)))
    assert max(bottom - top for top, bottom in spans) <= 32
    assert [row for span in spans for row in range(*span)] == list(range(8 * 37))


def test_linear_attention_has_the_controlnet_s_weights_and_linfusion_s_projections():
    unet = build_small_xl_unet()
    net = build_small_controlnet(unet, 1)
    linear = {p: LinearAttention(old.to_q.in_features, old.heads) for p, old in find_self_attentions(unet).items()}
    linear_modules, original = build_linear_attention(net, linear), find_self_attentions(net)
    assert list(linear_modules) == list(original)
    assert not any(path.startswith("up_blocks") for path in linear_modules)
    for path, module in linear_modules.items():
        assert module.to_q is original[path].to_q and module.to_out[0] is original[path].to_out[0]
        assert module.to_q_ is linear[path].to_q_ and module.heads == original[path].heads
        assert module.to_v.weight is not linear[path].to_v.weight


def test_a_controlnet_that_cannot_run_in_strips_is_named():
    net = build_small_controlnet(build_small_xl_unet())
    with pytest.raises(DataError, match=r"ControlNet cannot run in strips: down_blocks.1.*attn1.*--control-phases"):
        check_controlnet(net)
    with build_case(["plain"]) as case:
        net = case.controlnets[0].net
        check_controlnet(net)
        net.mid_block.resnets[0].output_scale_factor = 2.0
        with pytest.raises(DataError, match="mid_block.resnets.0"):
            StripUNet(
                case.unet,
                StripContext(StripSize(), Storage("device", CPU, FP64), SingleDevice()),
                print,
                case.controlnets,
            )


def test_together_with_an_ip_adapter_of_the_unet(tmp_path):
    kinds = ("plain", "plus")
    with load_unet_with_adapters(tmp_path, "xl", kinds) as unet:
        condition, latents = build_condition(unet, kinds), torch.randn(1, 4, 21, 13, dtype=FP64)
        linear = find_self_attentions(unet)
        net = build_small_controlnet(build_small_xl_unet()).to(FP64)
        with mount_modules(net, build_linear_attention(net, linear)):
            control = ActiveControlNet(net, 0.8, None)
            case = Case(unet, [control], [torch.rand(1, 3, 8 * 21, 8 * 13, dtype=FP64)])
            expected = case.run_plain(latents, condition, 2)
            assert relative_error(expected, case.run_plain(latents, condition, 2, count=0)) > 0.01
            assert relative_error(expected, case.run_plain(latents, build_condition(unet, kinds), 2)) > 0.001
            for place in PLACES:
                result = case.run_in_strips(latents, condition, StripSize(3, 20), place, 2)
                assert relative_error(result, expected) <= 1e-12
