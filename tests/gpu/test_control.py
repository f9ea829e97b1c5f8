"""ControlNets on a CUDA device: in strips they equal diffusers' forward passes, for every place of feature maps."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.models.load.controlnet import build_linear_attention
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import StripContext, StripSize, as_nhwc
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.controlnet import StripControlNet, WholeControlNet, embed_control_image
from linfusion_cli.unet.forward import strip_forward
from linfusion_cli.unet.predict import WholeUNet
from tests.support.small_controlnets import build_small_controlnet
from tools.bench.shapes import build_linear_attentions, build_random_inputs, build_sdxl_unet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA, SIZE = torch.device("cuda"), StripSize(8, 1024)


@pytest.fixture
def networks():
    """Return a UNet and a ControlNet with linear attention."""
    torch.manual_seed(0)
    unet = build_sdxl_unet(5).eval().requires_grad_(False)
    net, linear = build_small_controlnet(unet), build_linear_attentions(unet)
    with ExitStack() as stack:
        stack.enter_context(mount_modules(net, build_linear_attention(net, linear)))
        stack.enter_context(mount_modules(unet, linear))
        yield unet.to(CUDA), net.to(CUDA)


def run_in_strips(unet, net, image, storage: Storage, latents, condition, dilation: int = 1) -> torch.Tensor:
    rows = as_nhwc(image)
    hint = embed_control_image(net, lambda *span: rows[:, slice(*span)], *rows.shape[1:3], storage)
    controlled = replace(condition, controlnets=[StripControlNet(net, 0.8, None, hint)])
    return strip_forward(
        unet, StripContext(SIZE, storage, SingleDevice(), dilation), latents, torch.tensor(500), controlled
    )


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_strips_equal_the_plain_forwards(networks, place, dilation):
    """In fp64, in which a late or early copy is visible; repeated, because races are not deterministic."""
    unet, net = (network.double() for network in networks)
    latents, condition = torch.randn(1, 4, 53, 77, dtype=torch.float64, device=CUDA), build_random_inputs(unet)
    image = torch.rand(1, 3, 8 * 53, 8 * 77, dtype=torch.float64, device=CUDA)
    whole = WholeUNet(unet, dilation, [WholeControlNet(net, 0.8, None, image)])
    expected = whole.build_predictor(condition.text, condition.added)(latents, torch.tensor(500))
    for _ in range(3):
        output = run_in_strips(unet, net, image, Storage(place, CUDA, torch.float64), latents, condition, dilation)
        assert ((output - expected).norm() / expected.norm()).item() <= 1e-11
