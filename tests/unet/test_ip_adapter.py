"""A forward in strips with IP-Adapters equals the plain forward with them."""

from contextlib import contextmanager

import pytest
import torch

from linfusion_cli.core.errors import DataError
from linfusion_cli.images.read.source import inspect_source
from linfusion_cli.models.adapters.ip_adapter import load_adapters
from linfusion_cli.models.locate.ip_adapter import Adapter, read_adapter
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.storage import PLACES
from linfusion_cli.unet.check import check_supported
from linfusion_cli.unet.forward import UNetInputs
from tests.support.small_ip_adapters import HIDDEN, PROJECTION, TOKENS, write_adapter, write_image
from tests.support.small_models import build_small_sd_unet, build_small_xl_unet
from tests.unet.test_forward import (
    WHOLE,
    random_condition,
    relative_error,
    run_in_strips,
    run_plain,
    with_linear_attention,
)

FAMILIES = {"xl": build_small_xl_unet, "sd15": build_small_sd_unet}
SCALES = (0.6, -1.5, 0.0)


@contextmanager
def load_unet_with_adapters(folder, family, kinds, dtype=torch.float64):
    """Build a UNet with adapters of these kinds, and with linear attention."""
    image = inspect_source(write_image(folder / "picture.png"))

    def make():
        unet = FAMILIES[family]().eval().requires_grad_(False)
        files = [write_adapter(folder / f"{i}.safetensors", unet, kind, i) for i, kind in enumerate(kinds)]
        load_adapters(unet, [Adapter(read_adapter(file), folder, image, SCALES[i]) for i, file in enumerate(files)])
        return unet

    with with_linear_attention(make, dtype) as unet:
        yield unet


def build_condition(unet, kinds, batch=1):
    """Return a random condition with the adapters' embeddings of random images."""
    shapes = {"plain": (batch, 1, PROJECTION), **dict.fromkeys(("plus", "full"), (batch, 1, TOKENS["full"], HIDDEN))}
    condition = random_condition(unet, batch)
    embeds = [torch.randn(shapes[kind], dtype=unet.dtype) for kind in kinds]
    return UNetInputs(condition.text, {**(condition.added or {}), "image_embeds": embeds})


@pytest.mark.parametrize("kinds", [("plain",), ("plus",), ("full",), ("plus", "plain", "full")], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_strips_of_any_height_equal_the_plain_forward(tmp_path, family, kinds):
    with load_unet_with_adapters(tmp_path, family, kinds) as unet:
        check_supported(unet)
        latents, condition = torch.randn(1, 4, 21, 13, dtype=torch.float64), build_condition(unet, kinds)
        expected, other = run_plain(unet, latents, condition), run_plain(unet, latents, build_condition(unet, kinds))
        assert relative_error(other, expected) > 0.001
        for size in (StripSize(1, 17), StripSize(3, 64), WHOLE):
            assert relative_error(run_in_strips(unet, latents, condition, size), expected) <= 1e-12, size


@pytest.mark.parametrize("height_width", [(9, 15), (1, 5)])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dilation", [1, 2])
def test_sizes_storage_dilation_and_two_at_once(tmp_path, height_width, place, dilation):
    kinds = ("plain", "plus")
    with load_unet_with_adapters(tmp_path, "xl", kinds) as unet:
        latents = torch.randn(2, 4, *height_width, dtype=torch.float64)
        condition = build_condition(unet, kinds, batch=2)
        expected = run_plain(unet, latents, condition, dilation)
        result = run_in_strips(unet, latents, condition, StripSize(2, 9), place, dilation)
        assert relative_error(result, expected) <= 1e-12


def test_projected_text_together_with_an_adapter_is_rejected(tmp_path):
    with load_unet_with_adapters(tmp_path, "xl", ("plain",)) as unet:
        unet.text_encoder_hid_proj = torch.nn.Linear(4, 32)
        with pytest.raises(DataError, match="projected text"):
            check_supported(unet)


def test_an_adapter_with_scale_zero_has_no_effect(tmp_path):
    kinds = ("plain", "plus", "full")
    with load_unet_with_adapters(tmp_path, "sd15", kinds) as unet:
        latents, condition = torch.randn(1, 4, 9, 7, dtype=torch.float64), build_condition(unet, kinds)
        other = [*condition.added["image_embeds"][:2], torch.randn(1, 1, TOKENS["full"], HIDDEN, dtype=torch.float64)]
        changed = UNetInputs(condition.text, {**condition.added, "image_embeds": other})
        assert torch.equal(run_in_strips(unet, latents, condition), run_in_strips(unet, latents, changed))
