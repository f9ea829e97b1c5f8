"""ControlNets in strips are their plain forward with the same linear attention, wherever and however strips run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import mounted, self_attentions
from linfusion_cli.models.load.controlnet import linear_attention
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.feature_map import HostFeatureMap
from linfusion_cli.strips.ops import Strips, StripSize, as_nhwc
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.check import check_control
from linfusion_cli.unet.controlnet import Control, StripControlNet, WholeControlNet, embed_control_image
from linfusion_cli.unet.forward import strip_forward
from linfusion_cli.unet.predict import StripUNet, WholeUNet
from tests.support.small_controlnets import small_control, small_union
from tests.support.small_models import small_sd_unet, small_xl_unet
from tests.unet.test_forward import CPU, TIMESTEP, error, random_condition
from tests.unet.test_ip_adapter import heard, listening

FP64 = torch.float64
UNETS = {"xl": small_xl_unet, "sd15": small_sd_unet}


@dataclass(frozen=True)
class Case:
    """A UNet and ControlNets in fp64, with linear attention mounted, and a picture for each ControlNet."""

    unet: UNet2DConditionModel
    controlnets: list[Control]
    images: list[Tensor]

    def expected(self, latents: Tensor, condition, dilation: int = 1, count: int | None = None) -> Tensor:
        """By diffusers' own forwards, of the first `count` ControlNets."""
        pairs = list(zip(self.controlnets, self.images, strict=True))[:count]
        whole = [WholeControlNet(of.net, of.scale, of.kind, image) for of, image in pairs]
        return WholeUNet(self.unet, dilation, whole).predictor(condition.text, condition.added)(latents, TIMESTEP)

    def in_strips(self, latents: Tensor, condition, size: StripSize, place="device", dilation: int = 1) -> Tensor:
        run = Strips(size, Storage(place, CPU, FP64), SingleDevice(), dilation)
        controlnets = [self.embedded(i, run.storage) for i in range(len(self.controlnets))]
        return strip_forward(self.unet, run, latents, TIMESTEP, replace(condition, controlnets=controlnets))

    def embedded(self, i: int, storage: Storage) -> StripControlNet:
        control, rows = self.controlnets[i], as_nhwc(self.images[i])
        image = embed_control_image(control.net, lambda *span: rows[:, slice(*span)], *rows.shape[1:3], storage)
        return StripControlNet(control.net, control.scale, control.kind, image)


@contextmanager
def case(kinds: list[str], family: str = "xl", height: int = 21, width: int = 13) -> Iterator[Case]:
    """With ControlNets of these `kinds`, plain or union, for latents of this size."""
    torch.manual_seed(0)
    unet = UNETS[family]().eval().requires_grad_(False)
    linear = {p: LinearAttention(old.to_q.in_features, old.heads) for p, old in self_attentions(unet).items()}
    controlnets = []
    with ExitStack() as stack:
        for i, kind in enumerate(kinds):
            net = (small_union if kind == "union" else small_control)(UNETS[family](), seed=i)
            stack.enter_context(mounted(net, linear_attention(net, linear)))
            controlnets.append(Control(net.to(FP64), 0.7 + i, 3 if kind == "union" else None))
        stack.enter_context(mounted(unet, linear))
        images = [torch.rand(1, 3, 8 * height, 8 * width, dtype=FP64) for _ in kinds]
        yield Case(unet.to(FP64), controlnets, images)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("kinds", "family"), [(["plain"], "xl"), (["plain"], "sd15"), (["union", "plain"], "xl")])
def test_strips_equal_the_plain_forwards(kinds, family, place, dilation):
    with case(kinds, family) as given:
        latents, condition = torch.randn(1, 4, 21, 13, dtype=FP64), random_condition(given.unet)
        expected = given.expected(latents, condition, dilation)
        for without in range(len(kinds)):
            assert error(expected, given.expected(latents, condition, dilation, without)) > 0.01
        for size in (StripSize(1, 11), StripSize(5, 64)):
            assert error(given.in_strips(latents, condition, size, place, dilation), expected) <= 1e-12


@pytest.mark.parametrize("height_width", [(8, 8), (9, 31), (40, 3), (1, 5)])
def test_sizes_of_every_kind(height_width):
    with case(["plain", "union"], "xl", *height_width) as given:
        latents, condition = torch.randn(1, 4, *height_width, dtype=FP64), random_condition(given.unet)
        expected = given.expected(latents, condition)
        assert error(given.in_strips(latents, condition, StripSize(2, 8)), expected) <= 1e-12


def test_both_halves_of_guidance_at_once_and_the_same_controlnet_twice():
    with case(["union"]) as given:
        again = replace(given.controlnets[0], scale=0.4, kind=1)
        twice = Case(given.unet, [*given.controlnets, again], [*given.images, torch.rand_like(given.images[0])])
        latents, condition = torch.randn(1, 4, 21, 13, dtype=FP64).repeat(2, 1, 1, 1), random_condition(given.unet, 2)
        expected = twice.expected(latents, condition, 2)
        for place in PLACES:
            assert error(twice.in_strips(latents, condition, StripSize(3, 20), place, 2), expected) <= 1e-12


def test_an_embedding_follows_the_maps_to_the_host_where_memory_runs_out():
    with case(["union"]) as given:
        latents, condition = torch.randn(1, 4, 21, 13, dtype=FP64), random_condition(given.unet)
        on_device, outside = (Storage(place, CPU, FP64) for place in ("device", "host"))
        control, expected = given.embedded(0, on_device), given.expected(latents, condition)
        controlled = replace(condition, controlnets=[control])
        assert not isinstance(control.image.wherever(on_device), HostFeatureMap)
        for _ in range(2):
            run = Strips(StripSize(2, 9), outside, SingleDevice())
            assert error(strip_forward(given.unet, run, latents, TIMESTEP, controlled), expected) <= 1e-12
            assert isinstance(control.image.wherever(on_device), HostFeatureMap)


def test_in_strips_predicts_what_whole_predicts():
    with case(["plain"]) as given:
        latents, condition = torch.randn(1, 4, 21, 13, dtype=FP64), random_condition(given.unet)
        run = Strips(StripSize(4, 64), Storage("device", CPU, FP64), SingleDevice())
        runner = StripUNet(given.unet, run, lambda run, _: None, [given.embedded(0, run.storage)])
        found = runner.predictor(condition.text, condition.added)(latents, TIMESTEP)
        assert error(found, given.expected(latents, condition)) <= 1e-12


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_image_s_embedding_is_that_of_the_whole(order):
    """Few rows of it are read at a time, each once, and none of its width is lost where that is no power of two."""
    net = small_control(small_sd_unet(), controlnet_conditioning_channel_order=order).to(FP64)
    image, spans = torch.rand(1, 3, 8 * 37, 8 * 11, dtype=FP64), []

    def read(top: int, bottom: int) -> Tensor:
        spans.append((top, bottom))
        return as_nhwc(image)[:, top:bottom]

    storage = Storage("device", CPU, FP64)
    found = embed_control_image(net, read, 8 * 37, 8 * 11, storage).wherever(storage)
    expected = as_nhwc(net.controlnet_cond_embedding(image if order == "rgb" else image.flip(1)))
    assert error(found.tensor, expected) <= 1e-12 and found.kept
    torch.testing.assert_close(found.moments.mean, expected.mean(dim=(1, 2)))
    assert max(bottom - top for top, bottom in spans) <= 32
    assert [row for span in spans for row in range(*span)] == list(range(8 * 37))


def test_linear_attention_is_the_controlnet_s_own_with_linfusion_s_projections():
    unet = small_xl_unet()
    net = small_control(unet, 1)
    linear = {p: LinearAttention(old.to_q.in_features, old.heads) for p, old in self_attentions(unet).items()}
    made, own = linear_attention(net, linear), self_attentions(net)
    assert list(made) == list(own) and not any(path.startswith("up_blocks") for path in made)
    for path, module in made.items():
        assert module.to_q is own[path].to_q and module.to_out[0] is own[path].to_out[0]
        assert module.to_q_ is linear[path].to_q_ and module.heads == own[path].heads
        assert module.to_v.weight is not linear[path].to_v.weight


def test_a_controlnet_that_cannot_run_in_strips_is_named():
    net = small_control(small_xl_unet())
    with pytest.raises(DataError, match=r"ControlNet cannot run in strips: down_blocks.1.*attn1.*--control-phases"):
        check_control(net)
    with case(["plain"]) as given:
        net = given.controlnets[0].net
        check_control(net)
        net.mid_block.resnets[0].output_scale_factor = 2.0
        with pytest.raises(DataError, match="mid_block.resnets.0"):
            StripUNet(
                given.unet, Strips(StripSize(), Storage("device", CPU, FP64), SingleDevice()), print, given.controlnets
            )


def test_beside_an_ip_adapter_which_the_unet_alone_hears(tmp_path):
    kinds = ("plain", "plus")
    with listening(tmp_path, "xl", kinds) as unet:
        condition, latents = heard(unet, kinds), torch.randn(1, 4, 21, 13, dtype=FP64)
        linear = self_attentions(unet)
        net = small_control(small_xl_unet()).to(FP64)
        with mounted(net, linear_attention(net, linear)):
            control = Control(net, 0.8, None)
            given = Case(unet, [control], [torch.rand(1, 3, 8 * 21, 8 * 13, dtype=FP64)])
            expected = given.expected(latents, condition, 2)
            assert error(expected, given.expected(latents, condition, 2, count=0)) > 0.01
            assert error(expected, given.expected(latents, heard(unet, kinds), 2)) > 0.001
            for place in PLACES:
                assert error(given.in_strips(latents, condition, StripSize(3, 20), place, 2), expected) <= 1e-12
