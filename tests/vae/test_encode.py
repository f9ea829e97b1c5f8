"""Streamed encoding equals diffusers' with exact statistics and keys, and is close to it with sampled ones."""

import pytest
import torch

from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.stream import receptive_radius
from linfusion_cli.vae.encode import encode_rows
from linfusion_cli.vae.patches import READ_ROWS
from linfusion_cli.vae.stages import build_encoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, find_last_norm, find_stream_starts
from tests.vae.conftest import deep_vae
from tools.bench.vae import load_demo_vae
from tools.demo_model.scenes.scene import draw_scene

ALL_KEYS = 1 << 20
SIZES = [(64, 64), (40, 72), (168, 104), (24, 320)]


def encode_plainly(vae, pixels):
    """Encode with diffusers."""
    with torch.inference_mode():
        return vae.encode(pixels.permute(2, 0, 1)[None] * 2 - 1).latent_dist


def encode(vae, pixels, strategy, noise=None, read=None):
    """Encode with encode_rows."""
    read = read or (lambda top, bottom, left, right: pixels[top:bottom, left:right])
    return torch.cat(list(encode_rows(vae, read, Size(pixels.shape[1], pixels.shape[0]), strategy, noise)), dim=2)


def exact_strategy(vae, height=8):
    """Return the strategy with exact statistics."""
    return VaeStrategy(find_last_norm(build_encoder_stages(vae)), 0, ALL_KEYS, height)


def relative_error(actual, expected):
    """Return the maximum error relative to the maximum value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height", [1, 3, 8, 1000])
def test_with_exact_statistics_and_keys_the_result_equals_diffusers(deep, size, height):
    pixels = torch.rand(*size, 3)
    expected = encode_plainly(deep, pixels).mean * deep.config.scaling_factor
    assert relative_error(encode(deep, pixels, exact_strategy(deep, height)), expected) <= 1e-5


def test_the_statistics_of_an_encoder_are_exact_or_sampled(deep):
    assert find_stream_starts(build_encoder_stages(deep)) == [find_last_norm(build_encoder_stages(deep)), 0]


def test_a_posterior_sample_is_mean_plus_deviation_times_noise(deep):
    pixels, noise = torch.rand(64, 96, 3), torch.randn(1, 4, 8, 12)
    posterior = encode_plainly(deep, pixels)
    expected = (posterior.mean + posterior.std * noise) * deep.config.scaling_factor
    drawn = encode(deep, pixels, exact_strategy(deep), noise=lambda top, bottom: noise[:, :, top:bottom])
    assert relative_error(drawn, expected) <= 1e-5


@pytest.mark.parametrize("logvar", [-100.0, 100.0, 200.0])
def test_a_draw_has_the_deviation_that_diffusers_gives_it_however_far_off_the_variance_is(logvar):
    """Without limits, e^100 would overflow in fp32, e^50 would be much too large, and e^-50 much too small."""
    vae, noise = deep_vae(), torch.randn(1, 4, 8, 12)
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.copy_(torch.tensor([0.0, logvar]).repeat_interleave(4))
    pixels = torch.rand(64, 96, 3)
    expected = encode_plainly(vae, pixels).std * noise * vae.config.scaling_factor
    drawn = encode(vae, pixels, exact_strategy(vae), noise=lambda top, bottom: noise[:, :, top:bottom])
    assert drawn.isfinite().all() and relative_error(drawn, expected) <= 1e-5


def test_strips_of_three_rows_and_the_complete_image_differ_by_rounding_only(deep):
    pixels = torch.rand(496, 560, 3)
    low, tall = (encode(deep, pixels, VaeStrategy(0, 4, 256, height)) for height in (3, 1 << 20))
    assert relative_error(low, tall) <= 1e-5


@pytest.mark.slow
def test_sampled_statistics_are_close_to_exact_ones():
    """The demo model on a drawn scene."""
    vae, pixels = load_demo_vae(), torch.from_numpy(draw_scene(1, (1024, 1024))[0]).float() / 255
    sampled, expected = encode(vae, pixels, VaeStrategy(0, 16, 1024, 8)), encode(vae, pixels, exact_strategy(vae))
    assert 0 < float((sampled - expected).abs().mean()) <= 0.02 * float(expected.std())


def test_each_row_is_read_once_in_addition_to_the_patches(deep):
    pixels, regions = torch.rand(512, 512, 3), []

    def read(top, bottom, left, right):
        regions.append((top, bottom, left, right))
        return pixels[top:bottom, left:right]

    encode(deep, pixels, VaeStrategy(0, 4, 64, 8), read=read)
    rows = [(top, bottom) for top, bottom, left, right in regions if right - left == 512 and bottom - top == READ_ROWS]
    assert rows == [(top, top + READ_ROWS) for top in range(0, 512, READ_ROWS)]
    patches = [region for region in regions if region[3] - region[2] not in (512, 1)]
    side = 8 * (8 + 2 * -(-receptive_radius(build_encoder_stages(deep)) // 8))
    assert patches and all(right - left <= side for *_, left, right in patches)


def test_a_tiny_vae_equals_diffusers(tiny):
    for size in SIZES:
        pixels = torch.rand(*size, 3)
        with torch.inference_mode():
            expected = tiny.encode(pixels.permute(2, 0, 1)[None] * 2 - 1, return_dict=False)[0]
        for height in (1, 3, 64):
            assert relative_error(encode(tiny, pixels, VaeStrategy(0, 0, 1, height)), expected) <= 1e-5
