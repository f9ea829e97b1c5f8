"""Request + machine -> Plan: how each phase will run, what it will take, or why it cannot be done here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from linfusion_cli.core.errors import OutOfMemoryBudget
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.units import bytes_at_least, format_bytes
from linfusion_cli.images.process.scratch import BYTES_PER_PX
from linfusion_cli.models.families.facts import ModelFacts
from linfusion_cli.planning.estimate import CostEstimator, DenoiseStrategy, ResourceEstimate
from linfusion_cli.planning.machine import Machine
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.vae_strategies import Kind, methods_for
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.sampling.upscalers.pass_count import Passes
from linfusion_cli.settings.request import ImageRequest
from linfusion_cli.strips.ops import GOOD_ROWS, StripSize
from linfusion_cli.strips.storage import PLACES, Place
from linfusion_cli.vae.statistics import VaeStrategy

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
BATCHED_BELOW_PX = 4096 * 4096  # from there on, halves in one batch take 5 % longer, and twice the memory
MARGIN_BYTES = 64 << 20  # a process without models is not of the same size each time


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run as it is expected, `kind` as in its StageReport: denoise, decode or encode."""

    phase: int
    kind: str
    name: str
    size: Size
    steps: int
    mode: DenoiseStrategy | VaeStrategy | None
    need: ResourceEstimate | None  # None where it cannot be reckoned: a UNet of an unknown kind, with its own attention
    dilated: int = 0  # how many of the steps run the dilated pass too
    waiting_bytes: int = 0  # of the picture that this stage decodes or encodes, where it waits in memory

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

    def has(self, kind: str, phase: int) -> bool:
        """Whether there is one."""
        return any((stage.kind, stage.phase) == (kind, phase) for stage in self.stages)

    @property
    def need(self) -> ResourceEstimate:
        """The peaks and the time of all stages whose needs are known."""
        needs = [stage.need for stage in self.stages if stage.need]
        peaks = ("host_bytes", "device_bytes", "pinned_bytes")
        sums = ("seconds", "copied_bytes", "flops")
        most = {name: max(getattr(need, name) for need in needs) for name in peaks}
        return ResourceEstimate(**most, **{name: sum(getattr(need, name) for need in needs) for name in sums})

    def to_json(self) -> dict[str, Any]:
        machine, need = self.machine, self.need
        budget = {"host_budget_bytes": machine.host_bytes, "device_budget_bytes": machine.device_bytes}
        return asdict(need) | budget | {"stages": [stage.to_json() for stage in self.stages]}


@dataclass(frozen=True)
class PlanInputs:
    """What is to be planned: phases, how often each runs the UNet, and the size of the picture that grows, if any.

    `held_bytes` is what reading that picture holds at once. ControlNets act in the phases `controlled`, by index, and
    reading their pictures holds `control_held_bytes`. Stages run, if they fit, in the way in which they were `executed`
    before, by kind and phase: then the picture is the same bit for bit.
    """

    request: ImageRequest
    facts: ModelFacts
    phases: Sequence[Phase]
    passes: Sequence[Passes]
    image: Size | None = None
    held_bytes: int = 0
    controlled: frozenset[int] = frozenset()
    control_held_bytes: int = 0
    executed: Mapping[tuple[str, int], DenoiseStrategy | VaeStrategy] = field(default_factory=dict)

    def first(
        self, kind: str, phase: Phase, ways: Sequence[DenoiseStrategy | VaeStrategy]
    ) -> list[DenoiseStrategy | VaeStrategy]:
        """`ways` to run a stage, before them the one in which it was run before."""
        before = self.executed.get((kind, phase.index))
        return [*ways] if before is None else [before, *ways]

    @property
    def attentions(self) -> list[str]:
        return [phase.attention for phase in self.phases]

    def is_encoded(self, phase: Phase) -> bool:
        """Whether the phase begins with a picture in pixels."""
        return self.image is not None if phase.index == 0 else self.request.upscale_space == "pixel"

    def is_decoded(self, phase: Phase) -> bool:
        """Whether its result becomes pixels."""
        needed = self.request.upscale_space == "pixel" or self.request.save_phases
        return needed or phase is self.phases[-1]


def recorded_strategies(
    stages: Sequence[Mapping[str, Any]], machine: Machine
) -> dict[tuple[str, int], DenoiseStrategy | VaeStrategy]:
    """How stages were run, by kind and phase, from their JSON in a journal: those that ran on such a device."""
    alike = (stage for stage in stages if stage["device"] == machine.device.type)
    return {(stage["kind"], stage["phase"]): way_of(stage["kind"], stage["mode"]) for stage in alike}


def way_of(kind: str, values: Mapping[str, Any]) -> DenoiseStrategy | VaeStrategy:
    """The Mode or Method whose fields have these JSON `values`."""
    if kind != "denoise":
        return VaeStrategy(**values)
    strips = values["strips"]
    return DenoiseStrategy(**{**values, "strips": None if strips is None else StripSize(**strips)})


def make_plan(wanted: PlanInputs, outline: MetaModel, machine: Machine) -> Plan:
    """The best way to run each phase that fits; raises DoesNotFit with the smallest budget that would do."""
    options = list(ways(wanted, CostEstimator(wanted.facts, outline, machine)))
    chosen = [next((stage for stage in of_one if fits(stage.need, machine)), None) for of_one in options]
    if None in chosen:
        raise out_of_budget(wanted, options, machine)
    return Plan(machine, keep_images_in_memory(chosen, wanted.image, machine))


def keep_images_in_memory(stages: list[PlannedStage], image: Size | None, machine: Machine) -> list[PlannedStage]:
    """`stages` where a picture that is to be encoded waits in memory until then, if there is room.

    It is the result of the stage before, which must leave room too, or the `picture` that a run begins with.
    """
    result = list(stages)
    if image is not None:
        first = waited_for(stages[0], image.area * BYTES_PER_PX)
        if first.need.host_bytes <= machine.host_bytes:
            result[0] = first
    for i, (one, other) in enumerate(pairwise(stages)):
        if other.kind == "encode":
            both = [waited_for(stage, one.size.area * BYTES_PER_PX) for stage in (one, other)]
            if all(stage.need.host_bytes <= machine.host_bytes for stage in both):
                result[i : i + 2] = both
    return result


def waited_for(stage: PlannedStage, waiting: int) -> PlannedStage:
    """`stage` with so many bytes of a picture waiting in memory."""
    return replace(add_host_bytes(stage, waiting), waiting_bytes=waiting)


def add_host_bytes(stage: PlannedStage, more: int) -> PlannedStage:
    """`stage` with so many bytes more in the host's memory."""
    return replace(stage, need=replace(stage.need, host_bytes=stage.need.host_bytes + more))


def ways(wanted: PlanInputs, reckoner: CostEstimator) -> Iterator[list[PlannedStage]]:
    """For each stage of the run, in order, the ways to run it, the best first."""
    last = wanted.phases[-1]
    for phase, passes in zip(wanted.phases, wanted.passes, strict=True):
        if wanted.is_encoded(phase):
            before = wanted.phases[max(0, phase.index - 1)]
            yield conversions(wanted, reckoner, phase, "encode", before.attention)
        if passes.steps:
            modes = modes_for(phase.attention, reckoner.machine, passes.guided > 0, phase.size.area)
            yield [denoising(wanted, reckoner, phase, passes, mode) for mode in wanted.first("denoise", phase, modes)]
        if wanted.is_decoded(phase):
            yield conversions(wanted, reckoner, phase, "decode", None if phase is last else phase.attention)


def conversions(
    wanted: PlanInputs, reckoner: CostEstimator, phase: Phase, kind: Kind, attention: str | None
) -> list[PlannedStage]:
    """The ways to decode a phase's picture, or encode what it begins with, while the UNet has this attention.

    None where the UNet is not on the device any more.
    """
    methods = wanted.first(kind, phase, methods_for(kind, wanted.request.vae_statistics, reckoner, phase.size))
    needs = [reckoner.vae(phase.size, kind == "encode", attention, method) for method in methods]
    stages = [PlannedStage(phase.index, kind, kind, phase.size, 0, *pair) for pair in zip(methods, needs, strict=True)]
    reads = kind == "encode" and phase.index == 0
    return [add_host_bytes(stage, wanted.held_bytes) for stage in stages] if reads else stages


def denoising(
    wanted: PlanInputs, reckoner: CostEstimator, phase: Phase, passes: Passes, mode: DenoiseStrategy
) -> PlannedStage:
    """All steps of a phase in this mode, under the ControlNets that act in it."""
    controlled = phase.index in wanted.controlled
    need = reckoner.forward(mode, phase.size, phase.dilation if passes.dilated else 1, controlled)
    if need is not None:
        need = need.times(passes.forwards() / (2 if mode.together else 1))
    if need is not None and controlled:
        embedded = reckoner.embedding_seconds(phase.size) * (1 if mode.strips else passes.forwards())
        host = need.host_bytes + wanted.control_held_bytes
        need = replace(need, host_bytes=host, seconds=need.seconds + embedded)
    return PlannedStage(phase.index, "denoise", phase.name, phase.size, passes.steps, mode, need, passes.dilated)


def modes_for(attention: str, machine: Machine, both_halves: bool, area_px: int) -> list[DenoiseStrategy]:
    """The ways to run a phase: on the device with tall strips if that fits, then maps move out, then strips shrink.

    Both halves of guidance at once only help a GPU that one alone does not fill: that of a small image.
    """
    kind = machine.device.type
    batches = (True, False) if kind == "cuda" and both_halves and area_px < BATCHED_BELOW_PX else (False,)
    if attention == "original":
        return [DenoiseStrategy(attention, together=together) for together in batches]
    places: tuple[Place, ...] = PLACES if kind == "cuda" else ("device",)
    good = [size for size in STRIP_SIZES[kind] if size.rows >= GOOD_ROWS]
    small = [size for size in STRIP_SIZES[kind] if size.rows < GOOD_ROWS]
    modes = [DenoiseStrategy(attention, size, place) for sizes in (good, small) for place in places for size in sizes]
    both = [DenoiseStrategy(attention, size, together=True) for size in good]
    return both + modes if True in batches else modes


def fits(need: ResourceEstimate | None, machine: Machine) -> bool:
    """Whether a stage can run within the budgets, as far as is known."""
    if need is None:
        return True
    on_card = machine.device_bytes is None or need.device_bytes <= machine.device_bytes
    return on_card and need.host_bytes <= machine.host_bytes


def out_of_budget(wanted: PlanInputs, options: list[list[PlannedStage]], machine: Machine) -> OutOfMemoryBudget:
    """What to say when a stage cannot run, with the smallest budgets that would do for all of them."""
    needs = [[stage.need for stage in of_one if stage.need] for of_one in options]
    flags = find_budgets([of_one for of_one in needs if of_one], machine)
    hints = ", --attention linear" if "original" in wanted.attentions[1:] else ""
    hints += ", --vae-statistics auto" if wanted.request.vae_statistics == "exact" else ""
    budgets = {"--vram": ("GPU memory", machine.device_bytes), "--ram": ("memory", machine.host_bytes)}
    said = [f"{needed} of {budgets[flag][0]}" for flag, needed in flags.items()]
    has = [format_bytes(budgets[flag][1]) for flag in flags]
    written = " ".join(f"{flag} {needed}" for flag, needed in flags.items())
    return OutOfMemoryBudget(
        f"{wanted.request.size} needs {' and '.join(said)}, and {' and '.join(has)} may be used.",
        f"Use {written} where there is as much{hints}, or a smaller --size.",
    )


def find_budgets(needs: list[list[ResourceEstimate]], machine: Machine) -> dict[str, str]:
    """The flags, with their values, that give a budget for all stages: one of them if that is enough, else both."""
    vram, ram = machine.device_bytes, machine.host_bytes
    if vram is None:
        return {"--ram": find_ram(needs, None)}
    if all(any(need.host_bytes <= ram for need in of_one) for of_one in needs):
        return {"--vram": find_vram(needs, ram)}
    if all(any(need.device_bytes <= vram for need in of_one) for of_one in needs):
        return {"--ram": find_ram(needs, vram)}
    least = max(min(need.device_bytes for need in of_one) for of_one in needs)
    return {"--vram": bytes_at_least(least), "--ram": find_ram(needs, least)}


def find_vram(needs: list[list[ResourceEstimate]], ram: int) -> str:
    """The least of the card with which all stages fit into so much of the host."""
    least = max(min(need.device_bytes for need in of_one if need.host_bytes <= ram) for of_one in needs)
    return bytes_at_least(least)


def find_ram(needs: list[list[ResourceEstimate]], vram: int | None) -> str:
    """The least of the host with which all stages fit into so much of the card."""
    fitting = ([need for need in of_one if vram is None or need.device_bytes <= vram] for of_one in needs)
    return bytes_at_least(max(min(need.host_bytes for need in of_one) for of_one in fitting) + MARGIN_BYTES)
