"""The streamed encode is the plain one where statistics and keys are exact."""

import pytest
import torch

from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.stream import reach
from linfusion_cli.vae.encode import encode_rows
from linfusion_cli.vae.patches import READ_ROWS
from linfusion_cli.vae.stages import encoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, last_normed, starts
from tests.vae.conftest import deep_vae
from tools.bench.vae import demo_vae
from tools.demo_model.scenes.scene import scene

ALL_KEYS = 1 << 20
SIZES = [(64, 64), (40, 72), (168, 104), (24, 320)]


def plain(vae, pixels):
    with torch.inference_mode():
        return vae.encode(pixels.permute(2, 0, 1)[None] * 2 - 1).latent_dist


def encoded(vae, pixels, method, noise=None, read=None):
    read = read or (lambda top, bottom, left, right: pixels[top:bottom, left:right])
    return torch.cat(list(encode_rows(vae, read, Size(pixels.shape[1], pixels.shape[0]), method, noise)), dim=2)


def exact(vae, height=8):
    return VaeStrategy(last_normed(encoder_stages(vae)), 0, ALL_KEYS, height)


def apart(found, true):
    assert found.shape == true.shape
    return float((found - true).abs().max() / true.abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height", [1, 3, 8, 1000])
def test_with_exact_statistics_and_keys_it_is_the_plain_encode(deep, size, height):
    pixels = torch.rand(*size, 3)
    true = plain(deep, pixels).mean * deep.config.scaling_factor
    assert apart(encoded(deep, pixels, exact(deep, height)), true) <= 1e-5


def test_an_encoder_is_whole_or_sampled(deep):
    assert starts(encoder_stages(deep)) == [last_normed(encoder_stages(deep)), 0]


def test_a_draw_is_mean_and_deviation_with_the_noise_given(deep):
    pixels, noise = torch.rand(64, 96, 3), torch.randn(1, 4, 8, 12)
    found = plain(deep, pixels)
    true = (found.mean + found.std * noise) * deep.config.scaling_factor
    drawn = encoded(deep, pixels, exact(deep), noise=lambda top, bottom: noise[:, :, top:bottom])
    assert apart(drawn, true) <= 1e-5


@pytest.mark.parametrize("logvar", [-100.0, 100.0, 200.0])
def test_a_draw_has_the_deviation_that_diffusers_gives_it_however_far_off_the_variance_is(logvar):
    """Unlimited, e^100 would be infinite in fp32, e^50 be far too large, and e^-50 far too small."""
    vae, noise = deep_vae(), torch.randn(1, 4, 8, 12)
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.copy_(torch.tensor([0.0, logvar]).repeat_interleave(4))
    pixels = torch.rand(64, 96, 3)
    true = plain(vae, pixels).std * noise * vae.config.scaling_factor
    drawn = encoded(vae, pixels, exact(vae), noise=lambda top, bottom: noise[:, :, top:bottom])
    assert drawn.isfinite().all() and apart(drawn, true) <= 1e-5


def test_no_seam_strips_of_three_rows_and_one_piece_differ_by_rounding_only(deep):
    pixels = torch.rand(496, 560, 3)
    low, tall = (encoded(deep, pixels, VaeStrategy(0, 4, 256, height)) for height in (3, 1 << 20))
    assert apart(low, tall) <= 1e-5


@pytest.mark.slow
def test_statistics_of_a_sample_are_near_those_of_the_whole():
    """The demo model on a drawn scene."""
    vae, pixels = demo_vae(), torch.from_numpy(scene(1, (1024, 1024))[0]).float() / 255
    found, true = encoded(vae, pixels, VaeStrategy(0, 16, 1024, 8)), encoded(vae, pixels, exact(vae))
    assert 0 < float((found - true).abs().mean()) <= 0.02 * float(true.std())


def test_it_reads_each_row_once_and_patches_only_beside(deep):
    pixels, read = torch.rand(512, 512, 3), []

    def reads(top, bottom, left, right):
        read.append((top, bottom, left, right))
        return pixels[top:bottom, left:right]

    encoded(deep, pixels, VaeStrategy(0, 4, 64, 8), read=reads)
    rows = [(top, bottom) for top, bottom, left, right in read if right - left == 512 and bottom - top == READ_ROWS]
    assert rows == [(top, top + READ_ROWS) for top in range(0, 512, READ_ROWS)]
    patches = [region for region in read if region[3] - region[2] not in (512, 1)]
    side = 8 * (8 + 2 * -(-reach(encoder_stages(deep)) // 8))
    assert patches and all(right - left <= side for *_, left, right in patches)


def test_a_tiny_vae_goes_the_same_way(tiny):
    for size in SIZES:
        pixels = torch.rand(*size, 3)
        with torch.inference_mode():
            true = tiny.encode(pixels.permute(2, 0, 1)[None] * 2 - 1, return_dict=False)[0]
        for height in (1, 3, 64):
            assert apart(encoded(tiny, pixels, VaeStrategy(0, 0, 1, height)), true) <= 1e-5
