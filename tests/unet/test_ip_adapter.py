"""A forward in strips with IP-Adapters is the plain forward with them."""

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
from tests.support.small_models import small_sd_unet, small_xl_unet
from tests.unet.test_forward import WHOLE, error, in_strips, plain, random_condition, with_linear_attention

FAMILIES = {"xl": small_xl_unet, "sd15": small_sd_unet}
SCALES = (0.6, -1.5, 0.0)


@contextmanager
def listening(folder, family, kinds, dtype=torch.float64):
    """A UNet with adapters of these kinds loaded, and with linear attention mounted."""
    image = inspect_source(write_image(folder / "picture.png"))

    def make():
        unet = FAMILIES[family]().eval().requires_grad_(False)
        files = [write_adapter(folder / f"{i}.safetensors", unet, kind, i) for i, kind in enumerate(kinds)]
        load_adapters(unet, [Adapter(read_adapter(file), folder, image, SCALES[i]) for i, file in enumerate(files)])
        return unet

    with with_linear_attention(make, dtype) as unet:
        yield unet


def heard(unet, kinds, batch=1):
    """A random condition with what the adapters hear of random pictures."""
    shapes = {"plain": (batch, 1, PROJECTION), **dict.fromkeys(("plus", "full"), (batch, 1, TOKENS["full"], HIDDEN))}
    condition = random_condition(unet, batch)
    embeds = [torch.randn(shapes[kind], dtype=unet.dtype) for kind in kinds]
    return UNetInputs(condition.text, {**(condition.added or {}), "image_embeds": embeds})


@pytest.mark.parametrize("kinds", [("plain",), ("plus",), ("full",), ("plus", "plain", "full")], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_strips_of_any_height_equal_the_plain_forward(tmp_path, family, kinds):
    with listening(tmp_path, family, kinds) as unet:
        check_supported(unet)
        latents, condition = torch.randn(1, 4, 21, 13, dtype=torch.float64), heard(unet, kinds)
        expected, silent = plain(unet, latents, condition), plain(unet, latents, heard(unet, kinds))
        assert error(silent, expected) > 0.001
        for size in (StripSize(1, 17), StripSize(3, 64), WHOLE):
            assert error(in_strips(unet, latents, condition, size), expected) <= 1e-12, size


@pytest.mark.parametrize("height_width", [(9, 15), (1, 5)])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dilation", [1, 2])
def test_sizes_storage_dilation_and_two_at_once(tmp_path, height_width, place, dilation):
    kinds = ("plain", "plus")
    with listening(tmp_path, "xl", kinds) as unet:
        latents, condition = torch.randn(2, 4, *height_width, dtype=torch.float64), heard(unet, kinds, batch=2)
        expected = plain(unet, latents, condition, dilation)
        found = in_strips(unet, latents, condition, StripSize(2, 9), place, dilation)
        assert error(found, expected) <= 1e-12


def test_projected_text_beside_an_adapter_is_refused(tmp_path):
    with listening(tmp_path, "xl", ("plain",)) as unet:
        unet.text_encoder_hid_proj = torch.nn.Linear(4, 32)
        with pytest.raises(DataError, match="projected text"):
            check_supported(unet)


def test_a_scale_of_zero_is_not_heard(tmp_path):
    kinds = ("plain", "plus", "full")
    with listening(tmp_path, "sd15", kinds) as unet:
        latents, condition = torch.randn(1, 4, 9, 7, dtype=torch.float64), heard(unet, kinds)
        other = [*condition.added["image_embeds"][:2], torch.randn(1, 1, TOKENS["full"], HIDDEN, dtype=torch.float64)]
        changed = UNetInputs(condition.text, {**condition.added, "image_embeds": other})
        assert torch.equal(in_strips(unet, latents, condition), in_strips(unet, latents, changed))
