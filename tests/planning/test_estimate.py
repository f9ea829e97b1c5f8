"""Estimates of a UNet forward: flops compared to the design document, maps compared to a real forward."""

import weakref

import pytest
import torch

from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.cost import MemoryLedger
from linfusion_cli.strips.feature_map import FeatureMap, HostFeatureMap
from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.estimate import ForwardSettings, estimate_unet
from linfusion_cli.unet.forward import strip_forward
from tools.bench.shapes import build_linear_attentions, build_random_inputs, build_sdxl_unet

GIB = 1 << 30


@pytest.fixture(scope="module")
def sdxl():
    with torch.device("meta"):
        unet, linear = build_sdxl_unet(), build_linear_attentions(build_sdxl_unet())
    with mount_modules(unet, linear):
        yield unet


def test_the_flops_of_sdxl_at_16k_equal_the_design(sdxl):
    ledger = estimate_unet(sdxl, ForwardSettings(StripSize(16, 8192), "device", 1, 2048, 2048, 2))
    assert ledger.flops == pytest.approx(1547e12, rel=0.001)
    assert ledger.live == {"device": 0, "host": 0, "computed": 0}


@pytest.mark.parametrize(("place", "max_gib"), [("device", 17), ("skips", 12), ("host", 6)])
def test_sdxl_at_16k_fits_the_documented_gpus(sdxl, place, max_gib):
    weights = 2 * sum(parameter.numel() for parameter in sdxl.parameters())
    ledger = estimate_unet(sdxl, ForwardSettings(StripSize(16, 8192), place, 1, 2048, 2048, 2))
    assert weights + ledger.peak["device"] <= max_gib * GIB


@pytest.mark.parametrize(("side", "allocated_gib"), [(512, 0.90), (2048, 1.93)])
def test_strips_transferred_to_and_from_the_host_are_included(sdxl, side, allocated_gib):
    """The estimate is between the allocation of a forward on the fake card, without weights, and 1.22 times that."""
    ledger = estimate_unet(sdxl, ForwardSettings(StripSize(64, 32768), "host", 1, side, side, 2)).peak["device"] / GIB
    assert allocated_gib <= ledger <= allocated_gib * 1.22


class CountingStorage(Storage):
    """A Storage that measures the peak memory of maps on the device and on the host."""

    live = peak = 0, 0

    def _on_device(self, shape):
        return self._track(super()._on_device(shape))

    def _on_host(self, shape):
        return self._track(super()._on_host(shape))

    def _track(self, feature_map: FeatureMap) -> FeatureMap:
        on_host, count = isinstance(feature_map, HostFeatureMap), feature_map.tensor.nbytes
        self._add(on_host, count)
        weakref.finalize(feature_map.tensor, self._add, on_host, -count)
        return feature_map

    def _add(self, on_host: bool, count: int) -> None:
        self.live = tuple(part + count * (where == on_host) for where, part in enumerate(self.live))
        self.peak = tuple(map(max, self.peak, self.live))


@pytest.mark.parametrize("place", PLACES)
def test_the_peak_memory_of_maps_is_exact(place):
    torch.manual_seed(0)
    unet = build_sdxl_unet(10).eval()
    storage = CountingStorage(place, torch.device("cpu"), torch.float32)
    latents, size = torch.randn(1, 4, 37, 53), StripSize(4, 64)
    with mount_modules(unet, build_linear_attentions(unet)):
        context = StripContext(size, storage, SingleDevice())
        strip_forward(unet, context, latents, torch.tensor(500), build_random_inputs(unet))
        settings = ForwardSettings(size, place, 1, 37, 53, 4)
        ledger = estimate_unet(unet, settings)
    assert storage.live == (0, 0)
    check_peaks(storage, ledger, largest=37 * 53 * unet.config.block_out_channels[0] * 4)


def check_peaks(storage: CountingStorage, ledger: MemoryLedger, largest: int) -> None:
    """Compare peaks exactly, except that a map copied as a skip connection stays on the device until the next copy."""
    on_device, on_host = storage.peak
    assert ledger.maps_peak["host"] == on_host
    extra = largest if storage.place == "skips" else 0
    assert on_device <= ledger.maps_peak["device"] <= on_device + extra
