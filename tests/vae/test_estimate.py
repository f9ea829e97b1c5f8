"""Estimates equal measurements: flops as counted by torch, and the peak memory of maps of real conversions."""

import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.storage import Storage
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import encode_rows
from linfusion_cli.vae.estimate import estimate_vae
from linfusion_cli.vae.stages import build_decoder_stages, build_encoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, find_last_norm, find_stream_starts
from tools.bench.shapes import build_sdxl_vae

GIB = 1 << 30
ALL_KEYS = 1 << 20


@pytest.fixture(scope="module")
def sdxl():
    with torch.device("meta"):
        return build_sdxl_vae()


def test_flops_equal_those_counted_by_torch(sdxl):
    stages = build_decoder_stages(sdxl)
    ledger = estimate_vae(stages, Size(128, 128), 1, 4, VaeStrategy(find_last_norm(stages), 0, 128 * 128, 16), 2)
    with FlopCounterMode(display=False) as counter:
        sdxl.decode(torch.empty(1, 4, 128, 128, device="meta"))
    assert ledger.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    stages = build_encoder_stages(sdxl)
    ledger = estimate_vae(stages, Size(512, 512), 8, 3, VaeStrategy(find_last_norm(stages), 0, 64 * 64, 16), 2)
    with FlopCounterMode(display=False) as counter:
        sdxl.encode(torch.empty(1, 3, 512, 512, device="meta"))
    assert ledger.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_sdxl_at_16k_sampled_needs_3_gib_and_at_4k_exact_fits_a_large_gpu(sdxl):
    stages = build_decoder_stages(sdxl)
    assert estimate_vae(stages, Size(2048, 2048), 1, 4, VaeStrategy(0, 256, 16384, 16), 2).peak["device"] <= 3 * GIB
    exact = estimate_vae(stages, Size(512, 512), 1, 4, VaeStrategy(find_last_norm(stages), 0, 16384, 16), 2)
    assert 8 * GIB <= exact.peak["device"] <= 16 * GIB
    host = estimate_vae(stages, Size(512, 512), 1, 4, VaeStrategy(find_last_norm(stages), 0, 16384, 16, "host"), 2)
    assert host.peak["device"] <= GIB and host.peak["host"] >= 8 * GIB


class CountingStorage(Storage):
    """A Storage that measures the peak memory of maps."""

    live = peak = 0

    def new(self, *shape):
        feature_map = super().new(*shape)
        CountingStorage.live += feature_map.tensor.nbytes
        CountingStorage.peak = max(CountingStorage.peak, CountingStorage.live)
        weakref.finalize(feature_map.tensor, self._subtract, feature_map.tensor.nbytes)
        return feature_map

    @staticmethod
    def _subtract(count):
        CountingStorage.live -= count


@pytest.mark.parametrize("case", range(6))
def test_the_peak_memory_of_maps_is_exact(deep, monkeypatch, case):
    """Decode with exact, partly exact and sampled statistics, and encode with sampled statistics."""
    starts = find_stream_starts(build_decoder_stages(deep))
    stages = build_decoder_stages(deep) if case < 5 else build_encoder_stages(deep)
    strategy = VaeStrategy(starts[case] if case < 5 else 0, 4 if case else 0, ALL_KEYS, 1)
    size = (Size(80, 72), 1, 4) if case < 5 else (Size(640, 576), 8, 3)
    ledger = estimate_vae(stages, *size, strategy, 4)
    assert ledger.live["device"] == 0

    for module in ("streaming", "statistics"):
        monkeypatch.setattr(f"linfusion_cli.vae.{module}.Storage", CountingStorage)
    CountingStorage.live = CountingStorage.peak = 0
    if case < 5:
        list(decode_rows(deep, torch.randn(1, 4, 72, 80), strategy))
    else:
        pixels = torch.rand(576, 640, 3)
        list(encode_rows(deep, lambda t, b, l, r: pixels[t:b, l:r], Size(640, 576), strategy))  # noqa: E741
    assert ledger.maps_peak["device"] == CountingStorage.peak
    assert CountingStorage.live == 0
