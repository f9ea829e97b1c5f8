"""Streamed decoding equals diffusers' with exact statistics and keys, and is close to it with sampled ones."""

import pytest
import torch
from diffusers import AutoencoderKL

from linfusion_cli.core.errors import DataError, NonFinite
from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.storage import Storage
from linfusion_cli.strips.stream import receptive_radius, stream
from linfusion_cli.vae import streaming
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import encode_rows
from linfusion_cli.vae.patches import Source
from linfusion_cli.vae.stages import build_decoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, find_last_norm, find_stream_starts, freeze_statistics
from linfusion_cli.vae.streaming import delay_by_one
from tests.support.small_models import build_small_vae
from tests.vae.conftest import deep_vae, prepare
from tools.bench.vae import load_demo_vae
from tools.demo_model.scenes.scene import draw_scene

ALL_KEYS = 1 << 20
SIZES = [(16, 16), (5, 9), (21, 13), (3, 40)]


def decode_plainly(vae, latents):
    """Decode with diffusers."""
    with torch.inference_mode():
        actual = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    return (actual[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)


def decode(vae, latents, strategy, **options):
    """Decode with decode_rows."""
    return torch.cat(list(decode_rows(vae, latents, strategy, **options)))


def exact_strategy(vae, height=8):
    """Return the strategy with exact statistics."""
    return VaeStrategy(find_last_norm(build_decoder_stages(vae)), 0, ALL_KEYS, height)


def relative_error(actual, expected):
    """Return the maximum error relative to the maximum value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height", [1, 3, 8, 1000])
def test_with_exact_statistics_and_keys_the_result_equals_diffusers(deep, size, height):
    latents = torch.randn(1, 4, *size)
    assert relative_error(decode(deep, latents, exact_strategy(deep, height)), decode_plainly(deep, latents)) <= 1e-5


def test_in_fp64_the_result_equals_diffusers_up_to_rounding():
    vae, latents = deep_vae(torch.float64), torch.randn(1, 4, 12, 20, dtype=torch.float64)
    storage = Storage("device", vae.device, vae.dtype)
    read = lambda t, b, l, r: latents[:, :, t:b, l:r].permute(0, 2, 3, 1).contiguous()  # noqa: E731, E741
    with torch.inference_mode():
        stages, source = freeze_statistics(
            build_decoder_stages(vae), Source(Size(20, 12), 1, 4, read), exact_strategy(vae), storage
        )
        actual = torch.cat(list(stream(stages, source.read_rows, source.size.height, 8)), dim=1)[0].clamp(0, 1)
    assert relative_error(actual, decode_plainly(vae, latents)) <= 1e-12


def test_the_result_does_not_depend_on_the_start_stage(deep):
    latents = torch.randn(1, 4, 14, 11)
    starts = find_stream_starts(build_decoder_stages(deep))
    assert len(starts) == 5 and starts[-1] == 0
    for start in starts:
        actual = decode(deep, latents, VaeStrategy(start, 1 << 10, ALL_KEYS, 5))
        assert relative_error(actual, decode_plainly(deep, latents)) <= 1e-5


def test_rows_are_yielded_in_small_strips(vae):
    strips = list(decode_rows(vae, torch.randn(1, 4, 40, 12), VaeStrategy(0, 16, 64, 8)))
    assert sum(len(strip) for strip in strips) == 320 and max(len(strip) for strip in strips) <= 9
    assert all(strip.shape[1:] == (96, 3) and strip.dtype == torch.float32 for strip in strips)
    assert min(strip.min() for strip in strips) >= 0 and max(strip.max() for strip in strips) <= 1


def test_strips_of_three_rows_and_the_complete_image_differ_by_rounding_only(deep):
    latents = torch.randn(1, 4, 60, 70)
    low, tall = (decode(deep, latents, VaeStrategy(0, 4, 256, height)) for height in (3, 1 << 20))
    assert float((low - tall).abs().max()) <= 1e-5


@pytest.mark.parametrize("start", ["exact", "sampled"])
def test_flat_latents_give_a_flat_image(deep, start):
    """Except near the edges, which are affected by zero padding in any decoder."""
    latents = torch.randn(1, 4, 1, 1).expand(1, 4, 64, 64)
    strategy = exact_strategy(deep) if start == "exact" else VaeStrategy(0, 4, 256, 8)
    edge = 8 * receptive_radius(build_decoder_stages(deep))
    interior = decode(deep, latents, strategy)[edge:-edge, edge:-edge]
    assert interior.numel() and float((interior - interior[0, 0]).abs().max()) <= 0.5 / 255


def test_the_receptive_radius_of_sdxls_depth_is_18_latents(deep):
    """Measured with frozen statistics and keys, by changing one row of latents."""
    latents, stages = torch.randn(1, 4, 50, 6), build_decoder_stages(deep)
    read = lambda t, b, l, r: latents[:, :, t:b, l:r].permute(0, 2, 3, 1).contiguous()  # noqa: E731, E741
    with torch.inference_mode():
        freeze_statistics(
            stages, Source(Size(6, 50), 1, 4, read), exact_strategy(deep), Storage("device", deep.device, deep.dtype)
        )
        before = torch.cat(list(stream(stages, lambda t, b: read(t, b, 0, 6), 50, 8)), dim=1)
        latents[:, :, 25] += 5
        after = torch.cat(list(stream(stages, lambda t, b: read(t, b, 0, 6), 50, 8)), dim=1)
    changed = (before - after).abs().amax(dim=(0, 2, 3)).nonzero().flatten() // 8
    assert receptive_radius(stages) == 18
    assert 25 - int(changed.min()) <= 18 and int(changed.max()) - 25 <= 18
    assert 25 - int(changed.min()) >= 16


@pytest.mark.slow
def test_sampled_statistics_are_close_to_exact_ones_and_better_than_tiling():
    """The demo model on a drawn scene, with the bounds of 4096² images: see tools/bench/vae.py."""
    vae = load_demo_vae()
    image = torch.from_numpy(draw_scene(1, (1024, 1024))[0]).float() / 255
    read = lambda top, bottom, left, right: image[top:bottom, left:right]  # noqa: E731
    latents = torch.cat(list(encode_rows(vae, read, Size(1024, 1024), VaeStrategy(0, 16, 1024, 8))), dim=2)
    expected, actual = decode(vae, latents, exact_strategy(vae)), decode(vae, latents, VaeStrategy(0, 16, 1024, 8))
    vae.enable_tiling()
    sampled, tiled = ((one - expected) * 255 for one in (actual, decode_plainly(vae, latents)))
    assert 0 < float(sampled.abs().mean()) <= min(0.5, float(tiled.abs().mean()) / 4)
    assert float(sampled.mean(dim=(0, 1)).abs().max()) <= 0.3


def test_a_tiny_vae_equals_diffusers(tiny):
    for size in SIZES:
        latents = torch.randn(1, 4, *size)
        with torch.inference_mode():
            expected = (tiny.decode(latents, return_dict=False)[0][0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
        for height in (1, 3, 64):
            assert relative_error(decode(tiny, latents, VaeStrategy(0, 0, 1, height)), expected) <= 1e-5


def test_a_vae_without_attention_equals_diffusers(vae):
    without = prepare(AutoencoderKL(**{**build_small_vae().config, "mid_block_add_attention": False}))
    latents = torch.randn(1, 4, 9, 9)
    assert relative_error(decode(without, latents, exact_strategy(without)), decode_plainly(without, latents)) <= 1e-5


def test_an_unsupported_part_is_named():
    kinds = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D")
    odd = prepare(AutoencoderKL(**{**build_small_vae().config, "up_block_types": kinds}))
    with pytest.raises(DataError, match="decoder.up_blocks.1.attentions") as refused:
        decode(odd, torch.randn(1, 4, 8, 8), exact_strategy(odd))
    assert "--vae" in refused.value.hint


class Overflowing(torch.nn.Module):
    """A convolution that returns Inf from its 21st call on in bf16, as SDXL's VAE does in half precision."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.calls = layer, 0

    def forward(self, x):
        self.calls += 1
        actual = self.base_layer(x)
        return actual * float("inf") if x.dtype == torch.bfloat16 and self.calls > 20 else actual


def test_rows_with_nan_are_repeated_in_fp32():
    torch.manual_seed(0)
    vae, notices = prepare(build_small_vae()), []
    latents = torch.randn(1, 4, 40, 8)
    expected = decode(vae, latents, exact_strategy(vae))
    vae.decoder.conv_out = Overflowing(vae.decoder.conv_out)
    actual = decode(vae.bfloat16(), latents, exact_strategy(vae), notify=notices.append)
    assert len(notices) == 1 and "bfloat16" in notices[0] and "from row" in notices[0] and "row 0" not in notices[0]
    assert vae.dtype == torch.float32 and actual.shape == expected.shape
    assert float((actual - expected).abs().mean()) < 0.02  # bf16 in the first rows, and weights rounded to bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_fp32_is_an_error(dtype):
    vae, notices = prepare(build_small_vae(), dtype), []
    vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="even in float32") as refused:
        decode(vae, torch.randn(1, 4, 8, 8), exact_strategy(vae), notify=notices.append)
    assert refused.value.exit_code == 65 and len(notices) == (dtype == torch.bfloat16)


def test_after_lack_of_memory_strips_are_smaller_and_each_row_is_yielded_once(deep, monkeypatch):
    latents, notices, calls = torch.randn(1, 4, 48, 12), [], []
    expected = decode(deep, latents, exact_strategy(deep))
    real = streaming.stream

    def scarce(stages, read, length, height, step=None):
        for i, rows in enumerate(real(stages, read, length, height, step)):
            calls.append(height)
            if i == 7 and height > 2:
                raise MemoryError
            yield rows

    monkeypatch.setattr(streaming, "stream", scarce)
    actual = decode(deep, latents, exact_strategy(deep, 8), notify=notices.append)
    assert relative_error(actual, expected) <= 1e-5 and len(notices) == 2 and set(calls) == {8, 4, 2}
    assert "memory" in notices[0] and "4 rows" in notices[0]


def test_lack_of_memory_for_complete_maps_leads_to_sampling(deep, monkeypatch):
    latents, notices = torch.randn(1, 4, 96, 96), []
    monkeypatch.setattr(Storage, "new", limit_maps(Storage.new, 700 * 700 * 4))
    decode(deep, latents, exact_strategy(deep), notify=notices.append)
    assert len(notices) == 1 and "16 patches" in notices[0]


def limit_maps(new, max_values):
    """Return `Storage.new` with a limit to the values of a map."""

    def limited(self, batch, height, width, channels):
        if height * width * channels > max_values:
            raise MemoryError
        return new(self, batch, height, width, channels)

    return limited


def test_lack_of_memory_with_the_smallest_strategy_is_an_error(vae, monkeypatch):
    monkeypatch.setattr(Storage, "new", limit_maps(Storage.new, 1))
    with pytest.raises(MemoryError):
        decode(vae, torch.randn(1, 4, 8, 8), exact_strategy(vae))


def test_a_download_is_yielded_after_the_next_one_has_started():
    started, taken = [], []

    def downloads():
        for number in range(4):
            started.append(number)
            yield number

    for number in delay_by_one(downloads()):
        taken.append((number, len(started)))
    assert taken == [(0, 2), (1, 3), (2, 4), (3, 4)]


def test_infinity_is_not_shown_as_white():
    """Rows are checked before they are clamped."""
    vae = build_small_vae().eval().requires_grad_(False)
    vae.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(NonFinite):
        list(decode_rows(vae, torch.randn(1, 4, 8, 8), exact_strategy(vae)))
