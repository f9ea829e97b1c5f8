"""What a stretch of work takes on a machine: memory at its peak, and time."""

from __future__ import annotations

from dataclasses import dataclass

from linfusion_cli.geometry import Size
from linfusion_cli.models.families import ModelFacts
from linfusion_cli.planning.machine import Machine
from linfusion_cli.planning.outline import ModelOutline
from linfusion_cli.strips.cost import Ledger
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.storage import Place
from linfusion_cli.strips.stream import Stage
from linfusion_cli.unet.check import unknown_parts
from linfusion_cli.unet.cost import Setting, embedding_cost, reckon, whole_bytes
from linfusion_cli.vae.cost import vae_cost
from linfusion_cli.vae.stages import decoder_stages, encoder_stages
from linfusion_cli.vae.statistics import Method

WHOLE = StripSize(1 << 20, 1 << 40)
LATENT_COPIES = 10  # latents, noise, predictions and what a scheduler's step makes of them, in fp32
DEMOFUSION_COPIES = 15  # the encoded picture, its noise, both of them together, the blurred latents and two predictions
COPY_BYTES_PER_SEC = 20e9  # between pinned host memory and a card: PCIe 4
HEAP_BYTES = 24 << 20  # what libraries keep beside what is reckoned
PIXEL_CHANNELS = 3
READ_ROWS, WRITTEN_ROWS = 512, 256  # of the picture in fp32, as they are resized or pass to the file
WHOLE_HEAP_BYTES = 128 << 20  # the holes that freed maps of a plain forward leave, where there are so many


@dataclass(frozen=True)
class Mode:
    """How one phase's UNet runs: whole where it has no strips; `together` runs both halves of guidance at once."""

    attention: str
    strips: StripSize | None = None
    place: Place = "device"
    together: bool = False


@dataclass(frozen=True)
class Need:
    """What a stretch of work takes at its peak, of the whole process and of the card; and how long."""

    host_bytes: int
    device_bytes: int
    seconds: float


@dataclass(frozen=True)
class Reckoner:
    """Reckons needs from a model's outline."""

    facts: ModelFacts
    outline: ModelOutline
    machine: Machine

    def forward(self, mode: Mode, size: Size, dilation: int = 1, controlled: bool = False) -> Need | None:
        """One prediction, or both halves of guidance, at `size` px; None for networks of an unknown kind."""
        nets = [control.net for control in self.outline.controls] if controlled else []
        if mode.attention == "original" and any(any(unknown_parts(network)) for network in (self.outline.unet, *nets)):
            return None
        size_lat = size.divided(self.facts.vae_factor)
        shape = (2 if mode.together else 1, size_lat.height, size_lat.width)
        setting = Setting(mode.strips or WHOLE, mode.place, *shape, self.machine.dtype.itemsize, dilation=dilation)
        with self.outline.with_attention(mode.attention):
            ledger = reckon(self.outline.unet, setting, nets)
            beside = 0 if mode.strips else whole_bytes(nets, setting)
        computing = self.machine.speed.seconds(ledger.flops, ledger.passes)
        copies = LATENT_COPIES if dilation == 1 else DEMOFUSION_COPIES
        latents = copies * 4 * self.facts.latent_channels * size_lat.area
        holes = 0 if mode.strips else min(WHOLE_HEAP_BYTES, ledger.peak["device"])
        device = ledger.peak["device"] + latents + holes + beside + self._weights(mode.attention, controlled)
        host = ledger.peak["host"] + (latents if self.machine.device.type == "cuda" else 0)  # drawn and added there
        return self._need(host, device, max(computing, ledger.copied_bytes / COPY_BYTES_PER_SEC))

    def embedding_seconds(self, size: Size) -> float:
        """How long the control pictures take to become what the ControlNets see."""
        size_lat, itemsize = size.divided(self.facts.vae_factor), self.machine.dtype.itemsize
        pair = size_lat.height, size_lat.width
        costs = [embedding_cost(control.net, *pair, itemsize) for control in self.outline.controls]
        return self.machine.speed.seconds(sum(cost.flops for cost in costs), sum(cost.passes for cost in costs))

    def vae(self, size: Size, encode: bool, attention: str, method: Method) -> Need:
        """Decoding or encoding a picture of `size` px, while the UNet waits with this attention."""
        machine, facts = self.machine, self.facts
        ledger = self.vae_ledger(size, encode, method)
        latents = 2 * 4 * facts.latent_channels * size.divided(facts.vae_factor).area
        rows = 4 * PIXEL_CHANNELS * size.width * (READ_ROWS if encode else WRITTEN_ROWS)
        computing = machine.vae_speed.seconds(ledger.flops, ledger.passes)
        seconds = max(computing, ledger.copied_bytes / COPY_BYTES_PER_SEC)
        return self._need(
            ledger.peak["host"] + rows + latents, ledger.peak["device"] + self._weights(attention), seconds
        )

    def vae_ledger(self, size: Size, encode: bool, method: Method) -> Ledger:
        """What the VAE itself takes, beyond its weights."""
        factor, itemsize = self.facts.vae_factor, self.machine.vae_dtype.itemsize
        source = (size, factor, PIXEL_CHANNELS) if encode else (size.divided(factor), 1, self.facts.latent_channels)
        return vae_cost(self.vae_stages(encode), *source, method, itemsize)

    def vae_stages(self, encode: bool) -> list[Stage]:
        """The stages of the VAE's encoder or decoder."""
        return encoder_stages(self.outline.vae) if encode else decoder_stages(self.outline.vae)

    def _weights(self, attention: str, controlled: bool = False) -> int:
        """The bytes of the models that are on the device while a phase has this attention, and ControlNets or not."""
        on_card = self.machine.device.type == "cuda"
        numbers = self.outline.numbers(attention) if on_card else self.outline.all_numbers
        numbers += self.outline.control_numbers if controlled or not on_card else 0
        return numbers * self.machine.dtype.itemsize + self.outline.vae_numbers * self.machine.vae_dtype.itemsize

    def _need(self, host: int, device: int, seconds: float) -> Need:
        """On a CPU the device's memory is the host's; with a card, what is not used waits on the host."""
        machine = self.machine
        host += machine.resident_bytes + HEAP_BYTES
        if machine.device.type == "cpu":
            return Need(host + device, 0, seconds)
        unmounted = self.outline.all_numbers - self.outline.numbers("linear") + self.outline.control_numbers
        return Need(host + unmounted * machine.dtype.itemsize, device, seconds)
