"""The streamed decode is the plain one where statistics and keys are exact, and near it where they are sampled."""

import pytest
import torch
from diffusers import AutoencoderKL

from linfusion_cli.core.errors import DataError, NonFinite
from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.storage import Storage
from linfusion_cli.strips.stream import reach, stream
from linfusion_cli.vae import streaming
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import encode_rows
from linfusion_cli.vae.patches import Source
from linfusion_cli.vae.stages import decoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, freeze_statistics, last_normed, starts
from linfusion_cli.vae.streaming import one_behind
from tests.support.small_models import small_vae
from tests.vae.conftest import deep_vae, ready
from tools.bench.vae import demo_vae
from tools.demo_model.scenes.scene import scene

ALL_KEYS = 1 << 20
SIZES = [(16, 16), (5, 9), (21, 13), (3, 40)]


def plain(vae, latents):
    with torch.inference_mode():
        found = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    return (found[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)


def decoded(vae, latents, method, **more):
    return torch.cat(list(decode_rows(vae, latents, method, **more)))


def exact(vae, height=8):
    return VaeStrategy(last_normed(decoder_stages(vae)), 0, ALL_KEYS, height)


def apart(found, true):
    """Relative error."""
    assert found.shape == true.shape
    return float((found - true).abs().max() / true.abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height", [1, 3, 8, 1000])
def test_with_exact_statistics_and_keys_it_is_the_plain_decode(deep, size, height):
    latents = torch.randn(1, 4, *size)
    assert apart(decoded(deep, latents, exact(deep, height)), plain(deep, latents)) <= 1e-5


def test_in_fp64_it_is_the_plain_decode_but_for_rounding():
    vae, latents = deep_vae(torch.float64), torch.randn(1, 4, 12, 20, dtype=torch.float64)
    storage = Storage("device", vae.device, vae.dtype)
    read = lambda t, b, l, r: latents[:, :, t:b, l:r].permute(0, 2, 3, 1).contiguous()  # noqa: E731, E741
    with torch.inference_mode():
        stages, source = freeze_statistics(decoder_stages(vae), Source(Size(20, 12), 1, 4, read), exact(vae), storage)
        found = torch.cat(list(stream(stages, source.rows, source.size.height, 8)), dim=1)[0].clamp(0, 1)
    assert apart(found, plain(vae, latents)) <= 1e-12


def test_wherever_the_stream_begins_it_gives_the_same(deep):
    latents = torch.randn(1, 4, 14, 11)
    begins = starts(decoder_stages(deep))
    assert len(begins) == 5 and begins[-1] == 0
    for start in begins:
        assert apart(decoded(deep, latents, VaeStrategy(start, 1 << 10, ALL_KEYS, 5)), plain(deep, latents)) <= 1e-5


def test_rows_come_once_in_order_a_few_at_a_time(vae):
    strips = list(decode_rows(vae, torch.randn(1, 4, 40, 12), VaeStrategy(0, 16, 64, 8)))
    assert sum(len(strip) for strip in strips) == 320 and max(len(strip) for strip in strips) <= 9
    assert all(strip.shape[1:] == (96, 3) and strip.dtype == torch.float32 for strip in strips)
    assert min(strip.min() for strip in strips) >= 0 and max(strip.max() for strip in strips) <= 1


def test_no_seam_strips_of_three_rows_and_one_piece_differ_by_rounding_only(deep):
    latents = torch.randn(1, 4, 60, 70)
    low, tall = (decoded(deep, latents, VaeStrategy(0, 4, 256, height)) for height in (3, 1 << 20))
    assert float((low - tall).abs().max()) <= 1e-5


@pytest.mark.parametrize("start", ["exact", "sampled"])
def test_flat_latents_give_a_flat_image(deep, start):
    """But for what the zeros around the picture touch, in any decoder."""
    latents = torch.randn(1, 4, 1, 1).expand(1, 4, 64, 64)
    method = exact(deep) if start == "exact" else VaeStrategy(0, 4, 256, 8)
    edge = 8 * reach(decoder_stages(deep))
    inner = decoded(deep, latents, method)[edge:-edge, edge:-edge]
    assert inner.numel() and float((inner - inner[0, 0]).abs().max()) <= 0.5 / 255


def test_what_a_row_of_latents_reaches_is_what_is_said_18_for_sdxl(deep):
    """Measured: with frozen statistics and keys, one row of latents is changed."""
    latents, stages = torch.randn(1, 4, 50, 6), decoder_stages(deep)
    read = lambda t, b, l, r: latents[:, :, t:b, l:r].permute(0, 2, 3, 1).contiguous()  # noqa: E731, E741
    with torch.inference_mode():
        freeze_statistics(
            stages, Source(Size(6, 50), 1, 4, read), exact(deep), Storage("device", deep.device, deep.dtype)
        )
        before = torch.cat(list(stream(stages, lambda t, b: read(t, b, 0, 6), 50, 8)), dim=1)
        latents[:, :, 25] += 5
        after = torch.cat(list(stream(stages, lambda t, b: read(t, b, 0, 6), 50, 8)), dim=1)
    changed = (before - after).abs().amax(dim=(0, 2, 3)).nonzero().flatten() // 8
    assert reach(stages) == 18
    assert 25 - int(changed.min()) <= 18 and int(changed.max()) - 25 <= 18
    assert 25 - int(changed.min()) >= 16


@pytest.mark.slow
def test_statistics_of_a_sample_are_near_those_of_the_whole_and_nearer_than_tiles():
    """The demo model on a drawn scene, with the bounds that hold at 4096²: see tools/bench/vae.py."""
    vae = demo_vae()
    image = torch.from_numpy(scene(1, (1024, 1024))[0]).float() / 255
    read = lambda top, bottom, left, right: image[top:bottom, left:right]  # noqa: E731
    latents = torch.cat(list(encode_rows(vae, read, Size(1024, 1024), VaeStrategy(0, 16, 1024, 8))), dim=2)
    true, found = decoded(vae, latents, exact(vae)), decoded(vae, latents, VaeStrategy(0, 16, 1024, 8))
    vae.enable_tiling()
    sampled, tiled = ((one - true) * 255 for one in (found, plain(vae, latents)))
    assert 0 < float(sampled.abs().mean()) <= min(0.5, float(tiled.abs().mean()) / 4)
    assert float(sampled.mean(dim=(0, 1)).abs().max()) <= 0.3


def test_a_tiny_vae_goes_the_same_way(tiny):
    for size in SIZES:
        latents = torch.randn(1, 4, *size)
        with torch.inference_mode():
            true = (tiny.decode(latents, return_dict=False)[0][0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
        for height in (1, 3, 64):
            assert apart(decoded(tiny, latents, VaeStrategy(0, 0, 1, height)), true) <= 1e-5


def test_a_vae_without_attention_in_its_middle(vae):
    without = ready(AutoencoderKL(**{**small_vae().config, "mid_block_add_attention": False}))
    latents = torch.randn(1, 4, 9, 9)
    assert apart(decoded(without, latents, exact(without)), plain(without, latents)) <= 1e-5


def test_a_part_of_an_unknown_kind_is_named():
    kinds = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D")
    odd = ready(AutoencoderKL(**{**small_vae().config, "up_block_types": kinds}))
    with pytest.raises(DataError, match="decoder.up_blocks.1.attentions") as refused:
        decoded(odd, torch.randn(1, 4, 8, 8), exact(odd))
    assert "--vae" in refused.value.hint


class Overflowing(torch.nn.Module):
    """A decoder's convolution that gives infinity from its 21st call on, but in fp32, as SDXL's VAE does."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.calls = layer, 0

    def forward(self, x):
        self.calls += 1
        found = self.base_layer(x)
        return found * float("inf") if x.dtype == torch.bfloat16 and self.calls > 20 else found


def test_rows_that_are_no_numbers_are_computed_again_in_fp32():
    torch.manual_seed(0)
    vae, said = ready(small_vae()), []
    latents = torch.randn(1, 4, 40, 8)
    true = decoded(vae, latents, exact(vae))
    vae.decoder.conv_out = Overflowing(vae.decoder.conv_out)
    found = decoded(vae.bfloat16(), latents, exact(vae), notify=said.append)
    assert len(said) == 1 and "bfloat16" in said[0] and "from row" in said[0] and "row 0" not in said[0]
    assert vae.dtype == torch.float32 and found.shape == true.shape
    assert float((found - true).abs().mean()) < 0.02  # bf16 above, and weights that have been bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stays_no_number_ends_with_an_error(dtype):
    vae, said = ready(small_vae(), dtype), []
    vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="even in float32") as refused:
        decoded(vae, torch.randn(1, 4, 8, 8), exact(vae), notify=said.append)
    assert refused.value.exit_code == 65 and len(said) == (dtype == torch.bfloat16)


def test_memory_that_runs_out_is_told_and_no_row_is_lost_or_given_twice(deep, monkeypatch):
    latents, said, calls = torch.randn(1, 4, 48, 12), [], []
    true = decoded(deep, latents, exact(deep))
    real = streaming.stream

    def scarce(stages, read, length, height, step=None):
        for i, rows in enumerate(real(stages, read, length, height, step)):
            calls.append(height)
            if i == 7 and height > 2:
                raise MemoryError
            yield rows

    monkeypatch.setattr(streaming, "stream", scarce)
    found = decoded(deep, latents, exact(deep, 8), notify=said.append)
    assert apart(found, true) <= 1e-5 and len(said) == 2 and set(calls) == {8, 4, 2}
    assert "Memory ran out" in said[0] and "4 rows" in said[0]


def test_memory_that_runs_out_while_maps_are_made_whole_leads_to_a_sample(deep, monkeypatch):
    latents, said = torch.randn(1, 4, 96, 96), []
    monkeypatch.setattr(Storage, "new", scarce_maps(Storage.new, 700 * 700 * 4))
    decoded(deep, latents, exact(deep), notify=said.append)
    assert len(said) == 1 and "16 patches" in said[0]


def scarce_maps(new, most):
    def limited(self, batch, height, width, channels):
        if height * width * channels > most:
            raise MemoryError
        return new(self, batch, height, width, channels)

    return limited


def test_memory_that_runs_out_at_the_smallest_is_an_error(vae, monkeypatch):
    monkeypatch.setattr(Storage, "new", scarce_maps(Storage.new, 1))
    with pytest.raises(MemoryError):
        decoded(vae, torch.randn(1, 4, 8, 8), exact(vae))


def test_rows_are_handed_on_while_the_next_are_under_way():
    made, taken = [], []

    def downloads():
        for number in range(4):
            made.append(number)
            yield number

    for number in one_behind(downloads()):
        taken.append((number, len(made)))
    assert taken == [(0, 2), (1, 3), (2, 4), (3, 4)]


def test_infinity_is_not_shown_as_white():
    """It is looked for before rows are cut to what a file can show."""
    vae = small_vae().eval().requires_grad_(False)
    vae.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(NonFinite):
        list(decode_rows(vae, torch.randn(1, 4, 8, 8), exact(vae)))
