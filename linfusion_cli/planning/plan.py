"""Request + machine -> Plan: how each phase will run, what it will take, or why it cannot be done here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from linfusion_cli.attention.mount import mounted
from linfusion_cli.errors import DoesNotFit
from linfusion_cli.geometry import Size
from linfusion_cli.models.families import ModelFacts
from linfusion_cli.planning.machine import Machine
from linfusion_cli.planning.outline import ModelOutline, count
from linfusion_cli.request import GenerateRequest
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.storage import PLACES, Place
from linfusion_cli.unet.check import unknown_parts
from linfusion_cli.unet.cost import Setting, reckon
from linfusion_cli.units import format_bytes
from linfusion_cli.vae.cost import vae_cost

# From the best down. On a CPU larger strips only fall out of its caches; a GPU wants more at a time.
STRIP_SIZES = {
    "cpu": (StripSize(16, 1024), StripSize(8, 512), StripSize(4, 256), StripSize(2, 128), StripSize(1, 64)),
    "cuda": (
        StripSize(64, 32768),
        StripSize(32, 16384),
        StripSize(16, 8192),
        StripSize(8, 2048),
        StripSize(4, 1024),
        StripSize(1, 256),
    ),
}
GOOD_ROWS = 16  # below, convolutions take longer: maps go to the host first
WHOLE = StripSize(1 << 20, 1 << 40)
LATENT_COPIES = 10  # latents, noise, predictions and what a scheduler's step makes of them, in fp32
COPY_BYTES_PER_SEC = 20e9  # between pinned host memory and a card: PCIe 4
ROUNDING_BYTES = 52 << 20  # so that a budget of one decimal is never less than what it stands for
WHOLE_HEAP_BYTES = 128 << 20  # what freed maps of a plain forward leave of holes
HEAP_BYTES = 24 << 20  # what libraries keep beside what is reckoned


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
class PlannedStage:
    """One stage of a run as it is expected, `kind` as in its StageReport: denoise, decode or encode."""

    phase: int
    kind: str
    name: str
    size: Size
    steps: int
    mode: Mode | None
    need: Need | None  # None where it cannot be reckoned: a UNet of an unknown kind, with its own attention

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"size": str(self.size)}


@dataclass(frozen=True)
class Plan:
    """How a request will run here: its stages in order, and what they take together."""

    machine: Machine
    stages: list[PlannedStage]

    def stage(self, kind: str, phase: int) -> PlannedStage:
        """The stage of this kind in `phase`, which there is."""
        return next(stage for stage in self.stages if (stage.kind, stage.phase) == (kind, phase))

    @property
    def need(self) -> Need:
        """The peaks and the time of all stages whose needs are known."""
        needs = [stage.need for stage in self.stages if stage.need]
        peaks = (max(need.host_bytes for need in needs), max(need.device_bytes for need in needs))
        return Need(*peaks, sum(need.seconds for need in needs))

    def to_json(self) -> dict[str, Any]:
        machine, need = self.machine, self.need
        budget = {"host_budget_bytes": machine.host_bytes, "device_budget_bytes": machine.device_bytes}
        return asdict(need) | budget | {"stages": [stage.to_json() for stage in self.stages]}


@dataclass(frozen=True)
class Wanted:
    """What is to be planned: the phases' sizes, steps and attention, from the base up."""

    request: GenerateRequest
    facts: ModelFacts
    sizes: Sequence[Size]
    steps: Sequence[int]
    attentions: Sequence[str]

    @property
    def halves(self) -> int:
        """How many forwards a step takes: with guidance, two."""
        return 2 if self.request.guidance_scale > 1 else 1


def make_plan(wanted: Wanted, outline: ModelOutline, machine: Machine) -> Plan:
    """The best way to run each phase that fits; raises DoesNotFit with the smallest budget that would do."""
    planner = Planner(wanted, outline, machine)
    options = list(planner.stages())
    chosen = [next((stage for stage in of_one if planner.fits(stage.need)), None) for of_one in options]
    if None in chosen:
        raise planner.refusal(options)
    return Plan(machine, chosen)


class Planner:
    """Reckons what each way to run each stage needs."""

    def __init__(self, wanted: Wanted, outline: ModelOutline, machine: Machine):
        self._wanted, self._outline, self._machine = wanted, outline, machine

    def stages(self) -> Iterator[list[PlannedStage]]:
        """For each stage of the run, in order, the ways to run it, the best first."""
        sizes = self._wanted.sizes
        for phase in range(len(sizes)):
            if phase:
                yield [self._vae_stage(phase, "encode")]
            if self._wanted.steps[phase]:
                yield [self._denoising(phase, mode) for mode in self._modes(self._wanted.attentions[phase])]
            yield [self._vae_stage(phase, "decode")]

    def fits(self, need: Need | None) -> bool:
        """Whether a stage can run within the budgets, as far as is known."""
        if need is None:
            return True
        card = self._machine.device_bytes
        return need.host_bytes <= self._machine.host_bytes and (card is None or need.device_bytes <= card)

    def refusal(self, options: list[list[PlannedStage]]) -> DoesNotFit:
        """What to say when a stage cannot run: the smallest budget that would do for all of them."""
        on_card = self._machine.device_bytes is not None
        budget = self._machine.device_bytes if on_card else self._machine.host_bytes
        within = [self._affordable(of_one) if on_card else of_one for of_one in options]
        bytes_of = (lambda need: need.device_bytes) if on_card else (lambda need: need.host_bytes)
        if not all(within):
            on_card, budget, within, bytes_of = False, self._machine.host_bytes, options, lambda need: need.host_bytes
        known = [[stage.need for stage in of_one if stage.need] for of_one in within]
        smallest = max(min(map(bytes_of, needs)) for needs in known if needs)
        flag, memory = ("--vram", "GPU memory") if on_card else ("--ram", "memory")
        needed = format_bytes(smallest + ROUNDING_BYTES).replace(" ", "")
        return DoesNotFit(
            f"{self._wanted.request.size} needs {needed} of {memory}, and {format_bytes(budget)} may be used.",
            f"Use {flag} {needed} where there is as much, or a smaller --size.",
        )

    def _affordable(self, ways: list[PlannedStage]) -> list[PlannedStage]:
        """Those ways to run a stage that the host has the memory for."""
        return [stage for stage in ways if not stage.need or stage.need.host_bytes <= self._machine.host_bytes]

    def _modes(self, attention: str) -> list[Mode]:
        """The ways to run a phase: on the device with tall strips if that fits, then maps move out, then strips shrink.

        Both halves of guidance at once only help a GPU that one alone does not fill.
        """
        if attention == "original":
            return [Mode(attention)]
        kind = self._machine.device.type
        places: tuple[Place, ...] = PLACES if kind == "cuda" else ("device",)
        good = [size for size in STRIP_SIZES[kind] if size.rows >= GOOD_ROWS]
        small = [size for size in STRIP_SIZES[kind] if size.rows < GOOD_ROWS]
        modes = [Mode(attention, size, place) for sizes in (good, small) for place in places for size in sizes]
        both = [Mode(attention, size, together=True) for size in good]
        return both + modes if kind == "cuda" and self._wanted.halves == 2 else modes

    def _denoising(self, phase: int, mode: Mode) -> PlannedStage:
        wanted, size = self._wanted, self._wanted.sizes[phase]
        name = f"{size.width / wanted.sizes[0].width:.2g}x" if phase else "base"
        need = self._forward_need(mode, size, wanted.steps[phase])
        return PlannedStage(phase, "denoise", name, size, wanted.steps[phase], mode, need)

    def _forward_need(self, mode: Mode, size: Size, steps: int) -> Need | None:
        if mode.attention == "original" and any(unknown_parts(self._outline.unet)):
            return None
        machine, outline, wanted = self._machine, self._outline, self._wanted
        size_lat = size.divided(wanted.facts.vae_factor)
        batch, itemsize = 2 if mode.together else 1, machine.dtype.itemsize
        setting = Setting(mode.strips or WHOLE, mode.place, batch, size_lat.height, size_lat.width, itemsize)
        with mounted(outline.unet, outline.linear if mode.attention == "linear" else {}):
            ledger = reckon(outline.unet, setting)
        seconds = max(machine.speed.seconds(ledger.flops, ledger.passes), ledger.copied_bytes / COPY_BYTES_PER_SEC)
        seconds *= steps * wanted.halves / batch
        latents = LATENT_COPIES * 4 * wanted.facts.latent_channels * size_lat.area
        device = ledger.peak["device"] + latents + self._weights(mode.attention)
        if mode.strips is None:
            device += min(WHOLE_HEAP_BYTES, ledger.peak["device"])
        return self._need(ledger.peak["host"] + latents, device, seconds)

    def _vae_stage(self, phase: int, kind: str) -> PlannedStage:
        machine, size, facts = self._machine, self._wanted.sizes[phase], self._wanted.facts
        cost = vae_cost(self._outline.vae, size, facts.vae_native_px // facts.vae_factor, kind == "encode")
        window = cost.window_numbers * machine.vae_dtype.itemsize
        latents = 2 * 4 * facts.latent_channels * size.divided(facts.vae_factor).area
        seconds = machine.vae_speed.seconds(cost.flops, cost.passes)
        attention = self._wanted.attentions[max(0, phase - (kind == "encode"))]
        need = self._need(cost.strip_bytes + latents, window + self._weights(attention), seconds)
        return PlannedStage(phase, kind, kind, size, 0, None, need)

    def _weights(self, attention: str) -> int:
        """The bytes of the models that are on the device while a phase has this attention."""
        machine, outline = self._machine, self._outline
        numbers = outline.numbers(attention) if machine.device.type == "cuda" else outline.all_numbers
        return numbers * machine.dtype.itemsize + count(outline.vae) * machine.vae_dtype.itemsize

    def _need(self, host: int, device: int, seconds: float) -> Need:
        """On a CPU the device's memory is the host's."""
        machine = self._machine
        if machine.device.type == "cpu":
            return Need(machine.resident_bytes + HEAP_BYTES + host + device, 0, seconds)
        unmounted = self._outline.all_numbers - self._outline.numbers("linear")
        return Need(machine.resident_bytes + HEAP_BYTES + host + unmounted * machine.dtype.itemsize, device, seconds)
