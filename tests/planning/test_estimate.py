"""What is reckoned is what happens: products against the design's own sum, maps against those of a real forward."""

import weakref

import pytest
import torch

from linfusion_cli.mixers.linear.mount import mounted
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.cost import MemoryLedger
from linfusion_cli.strips.feature_map import FeatureMap, HostFeatureMap
from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.estimate import Setting, estimate_unet
from linfusion_cli.unet.forward import strip_forward
from tools.bench.shapes import linear_attentions, random_condition, sdxl_unet

GIB = 1 << 30


@pytest.fixture(scope="module")
def sdxl():
    with torch.device("meta"):
        unet, linear = sdxl_unet(), linear_attentions(sdxl_unet())
    with mounted(unet, linear):
        yield unet


def test_sdxl_at_16k_takes_the_products_of_the_design(sdxl):
    found = estimate_unet(sdxl, Setting(StripSize(16, 8192), "device", 1, 2048, 2048, 2))
    assert found.flops == pytest.approx(1547e12, rel=0.001)
    assert found.live == {"device": 0, "host": 0, "nowhere": 0}


@pytest.mark.parametrize(("place", "most_gib"), [("device", 17), ("skips", 12), ("host", 6)])
def test_sdxl_at_16k_fits_the_cards_that_are_promised(sdxl, place, most_gib):
    weights = 2 * sum(parameter.numel() for parameter in sdxl.parameters())
    found = estimate_unet(sdxl, Setting(StripSize(16, 8192), place, 1, 2048, 2048, 2))
    assert weights + found.peak["device"] <= most_gib * GIB


@pytest.mark.parametrize(("side", "allocated_gib"), [(512, 0.90), (2048, 1.93)])
def test_strips_on_their_way_from_and_to_the_host_are_reckoned(sdxl, side, allocated_gib):
    """As many bytes as a forward allocates beside its weights on the fake card, and a fifth more at most."""
    found = estimate_unet(sdxl, Setting(StripSize(64, 32768), "host", 1, side, side, 2)).peak["device"] / GIB
    assert allocated_gib <= found <= allocated_gib * 1.22


class CountingStorage(Storage):
    """A Storage that knows the most bytes of maps that were ever alive, on the device and on the host."""

    live = peak = 0, 0

    def _on_device(self, shape):
        return self._counted(super()._on_device(shape))

    def _on_host(self, shape):
        return self._counted(super()._on_host(shape))

    def _counted(self, made: FeatureMap) -> FeatureMap:
        on_host, count = isinstance(made, HostFeatureMap), made.tensor.nbytes
        self._add(on_host, count)
        weakref.finalize(made.tensor, self._add, on_host, -count)
        return made

    def _add(self, on_host: bool, count: int) -> None:
        self.live = tuple(part + count * (where == on_host) for where, part in enumerate(self.live))
        self.peak = tuple(map(max, self.peak, self.live))


@pytest.mark.parametrize("place", PLACES)
def test_maps_are_reckoned_to_the_byte(place):
    torch.manual_seed(0)
    unet = sdxl_unet(10).eval()
    storage = CountingStorage(place, torch.device("cpu"), torch.float32)
    latents, size = torch.randn(1, 4, 37, 53), StripSize(4, 64)
    with mounted(unet, linear_attentions(unet)):
        strip_forward(unet, Strips(size, storage, SingleDevice()), latents, torch.tensor(500), random_condition(unet))
        nothing_else = Setting(size, place, 1, 37, 53, 4)
        found = estimate_unet(unet, nothing_else)
    assert storage.live == (0, 0)
    check_peaks(storage, found, largest=37 * 53 * unet.config.block_out_channels[0] * 4)


def check_peaks(storage: CountingStorage, found: MemoryLedger, largest: int) -> None:
    """Of maps, to the byte; on a card one that is copied as a skip connection stays until the next one is."""
    on_device, on_host = storage.peak
    assert found.maps_peak["host"] == on_host
    more = largest if storage.place == "skips" else 0
    assert on_device <= found.maps_peak["device"] <= on_device + more
