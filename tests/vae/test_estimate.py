"""What is reckoned is what happens: products as torch counts them, maps as they were made."""

import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.storage import Storage
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import encode_rows
from linfusion_cli.vae.estimate import vae_cost
from linfusion_cli.vae.stages import decoder_stages, encoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, last_normed, starts
from tools.bench.shapes import sdxl_vae

GIB = 1 << 30
ALL_KEYS = 1 << 20


@pytest.fixture(scope="module")
def sdxl():
    with torch.device("meta"):
        return sdxl_vae()


def test_the_products_are_those_that_torch_counts(sdxl):
    stages = decoder_stages(sdxl)
    found = vae_cost(stages, Size(128, 128), 1, 4, VaeStrategy(last_normed(stages), 0, 128 * 128, 16), 2)
    with FlopCounterMode(display=False) as counter:
        sdxl.decode(torch.empty(1, 4, 128, 128, device="meta"))
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    stages = encoder_stages(sdxl)
    found = vae_cost(stages, Size(512, 512), 8, 3, VaeStrategy(last_normed(stages), 0, 64 * 64, 16), 2)
    with FlopCounterMode(display=False) as counter:
        sdxl.encode(torch.empty(1, 3, 512, 512, device="meta"))
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_sdxl_at_16k_takes_less_than_three_gib_by_a_sample_and_exactly_4k_fits_a_large_card(sdxl):
    stages = decoder_stages(sdxl)
    assert vae_cost(stages, Size(2048, 2048), 1, 4, VaeStrategy(0, 256, 16384, 16), 2).peak["device"] <= 3 * GIB
    exact = vae_cost(stages, Size(512, 512), 1, 4, VaeStrategy(last_normed(stages), 0, 16384, 16), 2)
    assert 8 * GIB <= exact.peak["device"] <= 16 * GIB
    host = vae_cost(stages, Size(512, 512), 1, 4, VaeStrategy(last_normed(stages), 0, 16384, 16, "host"), 2)
    assert host.peak["device"] <= GIB and host.peak["host"] >= 8 * GIB


class CountingStorage(Storage):
    """A Storage that knows the most bytes of maps that were ever alive."""

    live = peak = 0

    def new(self, *shape):
        made = super().new(*shape)
        CountingStorage.live += made.tensor.nbytes
        CountingStorage.peak = max(CountingStorage.peak, CountingStorage.live)
        weakref.finalize(made.tensor, self._gone, made.tensor.nbytes)
        return made

    @staticmethod
    def _gone(count):
        CountingStorage.live -= count


@pytest.mark.parametrize("place", range(6))
def test_the_maps_are_those_that_are_made(deep, monkeypatch, place):
    """All ways to decode: whole, partly whole, sampled; and to encode, sampled."""
    begins = starts(decoder_stages(deep))
    stages = decoder_stages(deep) if place < 5 else encoder_stages(deep)
    method = VaeStrategy(begins[place] if place < 5 else 0, 4 if place else 0, ALL_KEYS, 1)
    size = (Size(80, 72), 1, 4) if place < 5 else (Size(640, 576), 8, 3)
    ledger = vae_cost(stages, *size, method, 4)
    assert ledger.live["device"] == 0

    for module in ("conversion", "statistics"):
        monkeypatch.setattr(f"linfusion_cli.vae.{module}.Storage", CountingStorage)
    CountingStorage.live = CountingStorage.peak = 0
    if place < 5:
        list(decode_rows(deep, torch.randn(1, 4, 72, 80), method))
    else:
        pixels = torch.rand(576, 640, 3)
        list(encode_rows(deep, lambda t, b, l, r: pixels[t:b, l:r], Size(640, 576), method))  # noqa: E741
    assert ledger.maps_peak["device"] == CountingStorage.peak
    assert CountingStorage.live == 0
