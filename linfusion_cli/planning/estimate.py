"""What a stretch of work takes on a machine: memory at its peak, and time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from linfusion_cli.core.geometry import Size
from linfusion_cli.models.families.facts import ModelFacts
from linfusion_cli.planning.machine import Machine
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.strips.cost import MemoryLedger
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.storage import Place
from linfusion_cli.strips.stream import StreamStage
from linfusion_cli.unet.check import unknown_parts
from linfusion_cli.unet.estimate import Setting, embedding_cost, estimate_unet, whole_bytes
from linfusion_cli.vae.estimate import vae_cost
from linfusion_cli.vae.stages import decoder_stages, encoder_stages
from linfusion_cli.vae.statistics import VaeStrategy

WHOLE = StripSize(1 << 20, 1 << 40)
LATENT_COPIES = 10  # latents, noise, predictions and what a scheduler's step makes of them, in fp32
DEMOFUSION_COPIES = 15  # the encoded picture, its noise, both of them together, the blurred latents and two predictions
COPY_BYTES_PER_SEC = 20e9  # between pinned host memory and a card: PCIe 4
# What torch reserves for what is allocated: a share of it, and segments that are not full, with cuBLAS's workspace.
# Native segments of several sizes leave holes; measured on the fake card of the tests, from 1024 to 16384 px.
EXPANDABLE, NATIVE = (1.02, 80 << 20), (1.15, 512 << 20)
PATCH_HOLES, MAP_HOLES = 1.1, 1.02  # what strips of patches, or of whole maps, of a VAE leave beside that
HEAP_BYTES = 24 << 20  # what libraries keep beside what is reckoned
PIXEL_CHANNELS = 3
READ_ROWS, WRITTEN_ROWS = 512, 256  # of the picture in fp32, as they are resized or pass to the file
WHOLE_HEAP_BYTES = 128 << 20  # the holes that freed maps of a plain forward leave, where there are so many


@dataclass(frozen=True)
class DenoiseStrategy:
    """How one phase's UNet runs: whole where it has no strips; `together` runs both halves of guidance at once."""

    attention: str
    strips: StripSize | None = None
    place: Place = "device"
    together: bool = False


@dataclass(frozen=True)
class ResourceEstimate:
    """What a stretch of work takes at its peak, of the whole process and of the card; and how long.

    `pinned_bytes` are those of the host that are pinned, `copied_bytes` pass between host and device, and `flops` are
    those of matrix products and convolutions.
    """

    host_bytes: int
    device_bytes: int
    seconds: float
    pinned_bytes: int = 0
    copied_bytes: int = 0
    flops: int = 0

    def times(self, count: float) -> ResourceEstimate:
        """The same peaks, for `count` times the work."""
        work = {"copied_bytes": round(self.copied_bytes * count), "flops": round(self.flops * count)}
        return replace(self, seconds=self.seconds * count, **work)


@dataclass(frozen=True)
class CostEstimator:
    """Reckons needs from a model's outline."""

    facts: ModelFacts
    outline: MetaModel
    machine: Machine

    def forward(
        self, mode: DenoiseStrategy, size: Size, dilation: int = 1, controlled: bool = False
    ) -> ResourceEstimate | None:
        """One prediction, or both halves of guidance, at `size` px; None for networks of an unknown kind."""
        nets = [control.net for control in self.outline.controlnets] if controlled else []
        if mode.attention == "original" and any(any(unknown_parts(network)) for network in (self.outline.unet, *nets)):
            return None
        size_lat = size.divide(self.facts.vae_factor)
        shape = (2 if mode.together else 1, size_lat.height, size_lat.width)
        setting = Setting(mode.strips or WHOLE, mode.place, *shape, self.machine.dtype.itemsize, dilation=dilation)
        with self.outline.with_attention(mode.attention):
            ledger = estimate_unet(self.outline.unet, setting, nets)
            beside = 0 if mode.strips else whole_bytes(nets, setting)
        computing = self.machine.speed.seconds(ledger.flops, ledger.passes)
        copies = LATENT_COPIES if dilation == 1 else DEMOFUSION_COPIES
        latents = copies * 4 * self.facts.latent_channels * size_lat.area
        holes = 0 if mode.strips else min(WHOLE_HEAP_BYTES, ledger.peak["device"])
        device = ledger.peak["device"] + latents + holes + beside
        host = latents if self.machine.device.type == "cuda" else 0  # drawn and added there
        return self._need(ledger, host, device, self._weights(mode.attention, controlled), computing)

    def embedding_seconds(self, size: Size) -> float:
        """How long the control pictures take to become what the ControlNets see."""
        size_lat, itemsize = size.divide(self.facts.vae_factor), self.machine.dtype.itemsize
        pair = size_lat.height, size_lat.width
        costs = [embedding_cost(control.net, *pair, itemsize) for control in self.outline.controlnets]
        return self.machine.speed.seconds(sum(cost.flops for cost in costs), sum(cost.passes for cost in costs))

    def vae(self, size: Size, encode: bool, attention: str | None, method: VaeStrategy) -> ResourceEstimate:
        """Decoding or encoding a picture of `size` px, while the UNet waits with this attention, or not on the card."""
        machine, facts = self.machine, self.facts
        ledger = self.vae_ledger(size, encode, method)
        latents = 2 * 4 * facts.latent_channels * size.divide(facts.vae_factor).area
        rows = 4 * PIXEL_CHANNELS * size.width * (READ_ROWS if encode else WRITTEN_ROWS)
        computing = machine.vae_speed.seconds(ledger.flops, ledger.passes)
        device = ledger.peak["device"] + (latents if machine.device.type == "cuda" else 0)
        holes = 1.0 if machine.device.type == "cpu" else PATCH_HOLES if method.patches else MAP_HOLES
        return self._need(ledger, rows + latents, int(holes * device), self._weights(attention), computing)

    def vae_ledger(self, size: Size, encode: bool, method: VaeStrategy) -> MemoryLedger:
        """What the VAE itself takes, beyond its weights."""
        factor, itemsize = self.facts.vae_factor, self.machine.vae_dtype.itemsize
        source = (size, factor, PIXEL_CHANNELS) if encode else (size.divide(factor), 1, self.facts.latent_channels)
        on_cpu = self.machine.device.type == "cpu"
        return vae_cost(self.vae_stages(encode), *source, method, itemsize, on_cpu)

    def vae_stages(self, encode: bool) -> list[StreamStage]:
        """The stages of the VAE's encoder or decoder."""
        return encoder_stages(self.outline.vae) if encode else decoder_stages(self.outline.vae)

    def _weights(self, attention: str | None, controlled: bool = False) -> int:
        """The bytes of the models that are on the device while a phase has this attention, and ControlNets or not."""
        on_card = self.machine.device.type == "cuda"
        mounted = 0 if attention is None else self.outline.numbers(attention)
        numbers = mounted if on_card else self.outline.all_numbers
        numbers += self.outline.control_numbers if controlled or not on_card else 0
        return numbers * self.machine.dtype.itemsize + self.outline.vae_numbers * self.machine.vae_dtype.itemsize

    def _need(self, ledger: MemoryLedger, host: int, device: int, weights: int, computing: float) -> ResourceEstimate:
        """On a CPU the device's memory is the host's; with a card, what is not used waits on the host."""
        machine = self.machine
        host += machine.resident_bytes + HEAP_BYTES
        if machine.device.type == "cpu":
            return ResourceEstimate(host + device + weights, 0, computing, flops=ledger.flops)
        unmounted = self.outline.all_numbers - self.outline.numbers("linear") + self.outline.control_numbers
        pinned, copied = ledger.peak["host"], ledger.copied_bytes
        host += unmounted * machine.dtype.itemsize + pinned
        seconds = max(computing, copied / COPY_BYTES_PER_SEC)
        return ResourceEstimate(host, weights + self._reserved(device), seconds, pinned, copied, ledger.flops)

    def _reserved(self, allocated: int) -> int:
        """What torch's allocator reserves for so many bytes that come and go, with the libraries' workspace."""
        share, more = EXPANDABLE if self.machine.segments == "expandable" else NATIVE
        return int(share * allocated) + more
