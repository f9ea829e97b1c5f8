"""Plan a run: choose a strategy for each stage that fits the machine, and estimate its memory and time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

from linfusion_cli.core.errors import OutOfMemoryBudget
from linfusion_cli.core.events import StageKey, StageKind
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.units import format_bytes, format_bytes_rounded_up
from linfusion_cli.images.process.scratch import BYTES_PER_PX
from linfusion_cli.models.families.facts import ModelFacts
from linfusion_cli.planning.estimate import CostEstimator, ResourceEstimate
from linfusion_cli.planning.machine import Machine
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.strategies import DenoiseStrategy, Strategy, strategy_to_json
from linfusion_cli.planning.vae_strategies import VaeStageKind, list_vae_strategies
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.sampling.upscalers.pass_count import PassCount
from linfusion_cli.settings.request import Request
from linfusion_cli.strips.ops import MIN_EFFICIENT_ROWS, StripSize
from linfusion_cli.strips.storage import PLACES, Place
from linfusion_cli.vae.statistics import VaeStrategy

# In order of preference. Larger strips exceed the caches of a CPU; a GPU needs larger ones to be fully used.
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
BATCHED_BELOW_PX = 4096 * 4096  # from this size on, batched guidance takes 5 % more time and twice the memory
MARGIN_BYTES = 64 << 20  # the size of a process without models varies

S = TypeVar("S", DenoiseStrategy, VaeStrategy)


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run: its strategy and its estimate. `kind` is start, denoise or decode."""

    phase: int
    kind: StageKind
    phase_name: str
    size: Size
    steps: int
    strategy: Strategy
    estimate: ResourceEstimate | None  # None for a UNet with unsupported parts and its original attention
    dilated: int = 0  # steps with a dilated pass
    image_buffer_bytes: int = 0  # size of the decoded or source image, if it is buffered in memory

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values for reports."""
        estimate = None if self.estimate is None else self.estimate.to_json()
        values = {"size": str(self.size), "strategy": strategy_to_json(self.strategy), "estimate": estimate}
        return asdict(self) | values

    @property
    def key(self) -> StageKey:
        """The key of the stage in the plan."""
        return StageKey(self.kind, self.phase)


@dataclass(frozen=True)
class Plan:
    """The stages of a run in order, and the machine they are planned for."""

    machine: Machine
    stages: list[PlannedStage]

    def find_stage(self, kind: StageKind, phase: int) -> PlannedStage:
        """Return the stage of this kind in `phase`. It must exist."""
        return next(stage for stage in self.stages if stage.key == (kind, phase))

    def has_stage(self, kind: StageKind, phase: int) -> bool:
        """Return whether `phase` has a stage of this kind."""
        return any(stage.key == (kind, phase) for stage in self.stages)

    @property
    def strategies(self) -> dict[StageKey, Strategy]:
        """The strategy of each stage."""
        return {stage.key: stage.strategy for stage in self.stages}

    @property
    def estimate(self) -> ResourceEstimate:
        """The peak memory and total time of all stages that have an estimate."""
        estimates = [stage.estimate for stage in self.stages if stage.estimate]
        peaks = ("host_bytes", "device_bytes", "pinned_bytes")
        sums = ("seconds", "copied_bytes", "flops")
        maxima = {name: max(getattr(estimate, name) for estimate in estimates) for name in peaks}
        totals = {name: sum(getattr(estimate, name) for estimate in estimates) for name in sums}
        return ResourceEstimate(**maxima, **totals)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values for reports and `linfusion plan --json`."""
        machine, estimate = self.machine, self.estimate
        budget = {"host_budget_bytes": machine.host_bytes, "device_budget_bytes": machine.device_bytes}
        return estimate.to_json() | budget | {"stages": [stage.to_json() for stage in self.stages]}


@dataclass(frozen=True)
class PlanInputs:
    """The phases to plan with their numbers of UNet passes, and the size of the source image, if any.

    Reading the source image needs `image_read_bytes` of memory. ControlNets are active in the phases
    `controlnet_phases` (indices), and reading their images needs `control_read_bytes`. `recorded` has the strategies
    of an earlier run. They are preferred, because the result is then identical bit for bit.
    """

    request: Request
    facts: ModelFacts
    phases: Sequence[Phase]
    passes: Sequence[PassCount]
    image_size: Size | None = None
    image_read_bytes: int = 0
    controlnet_phases: frozenset[int] = frozenset()
    control_read_bytes: int = 0
    recorded: Mapping[StageKey, Strategy] = field(default_factory=dict)

    def list_recorded(self, kind: StageKind, phase: Phase, strategy_type: type[S]) -> list[S]:
        """Return the recorded strategy of a stage as a list, or an empty list."""
        strategy = self.recorded.get(StageKey(kind, phase.index))
        return [strategy] if isinstance(strategy, strategy_type) else []

    @property
    def attentions(self) -> list[str]:
        """The attention of each phase."""
        return [phase.attention for phase in self.phases]

    def is_encoded(self, phase: Phase) -> bool:
        """Return whether the phase starts by encoding an image."""
        return self.image_size is not None if phase.index == 0 else self.request.upscale_space == "pixel"

    def is_decoded(self, phase: Phase) -> bool:
        """Return whether the result of the phase is decoded."""
        is_needed = self.request.upscale_space == "pixel" or self.request.save_phases
        return is_needed or phase is self.phases[-1]


def make_plan(inputs: PlanInputs, meta_model: MetaModel, machine: Machine) -> Plan:
    """Choose the first candidate within the budget for each stage.

    Raise OutOfMemoryBudget with the minimum budget if a stage has no such candidate.
    """
    candidates = list(list_candidates(inputs, CostEstimator(inputs.facts, meta_model, machine)))
    chosen = []
    for stages in candidates:
        stage = next((stage for stage in stages if is_within_budget(stage.estimate, machine)), None)
        if stage is None:
            raise build_budget_error(inputs, candidates, machine)
        chosen.append(stage)
    return Plan(machine, keep_images_in_memory(chosen, inputs.image_size, machine))


def keep_images_in_memory(stages: list[PlannedStage], image: Size | None, machine: Machine) -> list[PlannedStage]:
    """Return `stages` with images buffered in memory until they are encoded, where the budget allows it.

    The image is the source `image`, or the output of the previous stage, for which the budget must suffice too.
    """
    result = list(stages)
    if image is not None:
        buffered = [add_image_buffer(stages[0], image.area * BYTES_PER_PX)]
        if all_fit_host(buffered, machine):
            result[:1] = buffered
    for i, (previous, stage) in enumerate(pairwise(stages)):
        if stage.kind == "start":
            buffered = [add_image_buffer(one, previous.size.area * BYTES_PER_PX) for one in (previous, stage)]
            if all_fit_host(buffered, machine):
                result[i : i + 2] = buffered
    return result


def all_fit_host(stages: Sequence[PlannedStage], machine: Machine) -> bool:
    """Return whether all stages have an estimate within the budget of host memory."""
    return all(stage.estimate is not None and stage.estimate.host_bytes <= machine.host_bytes for stage in stages)


def add_image_buffer(stage: PlannedStage, buffer_bytes: int) -> PlannedStage:
    """Return `stage` with an image of `buffer_bytes` in memory."""
    return replace(add_host_bytes(stage, buffer_bytes), image_buffer_bytes=buffer_bytes)


def add_host_bytes(stage: PlannedStage, extra_bytes: int) -> PlannedStage:
    """Return `stage` with `extra_bytes` more host memory."""
    assert stage.estimate is not None  # only denoising can be without an estimate
    return replace(stage, estimate=replace(stage.estimate, host_bytes=stage.estimate.host_bytes + extra_bytes))


def list_candidates(inputs: PlanInputs, estimator: CostEstimator) -> Iterator[list[PlannedStage]]:
    """Yield the candidates for each stage of the run, the best first."""
    last = inputs.phases[-1]
    for phase, passes in zip(inputs.phases, inputs.passes, strict=True):
        if inputs.is_encoded(phase):
            previous = inputs.phases[max(0, phase.index - 1)]
            yield build_conversion_candidates(inputs, estimator, phase, "start", previous.attention)
        if passes.steps:
            strategies = inputs.list_recorded("denoise", phase, DenoiseStrategy)
            strategies += list_denoise_strategies(
                phase.attention, estimator.machine, passes.guided > 0, phase.size.area
            )
            yield [build_denoise_candidate(inputs, estimator, phase, passes, strategy) for strategy in strategies]
        if inputs.is_decoded(phase):
            attention = None if phase is last else phase.attention
            yield build_conversion_candidates(inputs, estimator, phase, "decode", attention)


def build_conversion_candidates(
    inputs: PlanInputs, estimator: CostEstimator, phase: Phase, kind: VaeStageKind, attention: str | None
) -> list[PlannedStage]:
    """Return the candidates for decoding or encoding the image of a phase.

    Meanwhile the UNet is loaded with this attention; None if it is not on the device.
    """
    strategies = inputs.list_recorded(kind, phase, VaeStrategy)
    strategies += list_vae_strategies(kind, inputs.request.vae_statistics, estimator, phase.size)
    stages = []
    for strategy in strategies:
        estimate = estimator.estimate_conversion(phase.size, kind == "start", attention, strategy)
        stages.append(PlannedStage(phase.index, kind, phase.name, phase.size, 0, strategy, estimate))
    is_source_read = kind == "start" and phase.index == 0
    return [add_host_bytes(stage, inputs.image_read_bytes) for stage in stages] if is_source_read else stages


def build_denoise_candidate(
    inputs: PlanInputs, estimator: CostEstimator, phase: Phase, passes: PassCount, strategy: DenoiseStrategy
) -> PlannedStage:
    """Return the stage of all steps of a phase, with the ControlNets that are active in it."""
    controlled = phase.index in inputs.controlnet_phases
    dilation = phase.dilation if passes.dilated else 1
    estimate = estimator.estimate_forward(strategy, phase.size, dilation, controlled)
    if estimate is not None:
        estimate = estimate.scale_work(passes.count_forwards() / (2 if strategy.batched else 1))
    if estimate is not None and controlled:
        embeddings = 1 if strategy.strips else passes.count_forwards()
        embedding_sec = estimator.estimate_embedding_seconds(phase.size) * embeddings
        host_bytes = estimate.host_bytes + inputs.control_read_bytes
        estimate = replace(estimate, host_bytes=host_bytes, seconds=estimate.seconds + embedding_sec)
    return PlannedStage(
        phase.index, "denoise", phase.name, phase.size, passes.steps, strategy, estimate, passes.dilated
    )


def list_denoise_strategies(attention: str, machine: Machine, is_guided: bool, area_px: int) -> list[DenoiseStrategy]:
    """List the strategies for a phase: tall strips with maps on the device, then on the host, then smaller strips.

    Batched guidance is only faster on a GPU that a single image does not fully use, so only for small images.
    """
    kind = machine.device.type
    batches = (True, False) if kind == "cuda" and is_guided and area_px < BATCHED_BELOW_PX else (False,)
    if attention == "original":
        return [DenoiseStrategy(attention, batched=batched) for batched in batches]
    places: tuple[Place, ...] = PLACES if kind == "cuda" else ("device",)
    tall = [size for size in STRIP_SIZES[kind] if size.rows >= MIN_EFFICIENT_ROWS]
    low = [size for size in STRIP_SIZES[kind] if size.rows < MIN_EFFICIENT_ROWS]
    sequential = [
        DenoiseStrategy(attention, size, place) for sizes in (tall, low) for place in places for size in sizes
    ]
    batched = [DenoiseStrategy(attention, size, batched=True) for size in tall]
    return batched + sequential if True in batches else sequential


def is_within_budget(estimate: ResourceEstimate | None, machine: Machine) -> bool:
    """Return whether an estimate is within the memory budgets. An unknown estimate is accepted."""
    if estimate is None:
        return True
    fits_device = machine.device_bytes is None or estimate.device_bytes <= machine.device_bytes
    return fits_device and estimate.host_bytes <= machine.host_bytes


def build_budget_error(inputs: PlanInputs, candidates: list[list[PlannedStage]], machine: Machine) -> OutOfMemoryBudget:
    """Return the error for a stage without a candidate that fits, with the minimum budgets for all stages."""
    estimates = [[stage.estimate for stage in stages if stage.estimate] for stages in candidates]
    minima = find_budgets([stage_estimates for stage_estimates in estimates if stage_estimates], machine)
    hints = ", use --attention linear" if "original" in inputs.attentions[1:] else ""
    hints += ", use --vae-statistics auto" if inputs.request.vae_statistics == "exact" else ""
    budgets = {"--vram": ("GPU memory", machine.device_bytes), "--ram": ("memory", machine.host_bytes)}
    required = " and ".join(f"{minimum} of {budgets[flag][0]}" for flag, minimum in minima.items())
    limits = " and ".join(format_bytes(budgets[flag][1]) for flag in minima)
    flags = " ".join(f"{flag} {minimum}" for flag, minimum in minima.items())
    return OutOfMemoryBudget(
        f"{inputs.request.size} requires {required}; the budget is {limits}.",
        f"Use {flags} if the machine has that much{hints}, or use a smaller --size.",
    )


def find_budgets(estimates: list[list[ResourceEstimate]], machine: Machine) -> dict[str, str]:
    """Return the flags and values of a budget for all stages: one flag if changing one is enough, else both."""
    vram, ram = machine.device_bytes, machine.host_bytes
    if vram is None:
        return {"--ram": find_min_ram(estimates, None)}
    if all(any(estimate.host_bytes <= ram for estimate in stage) for stage in estimates):
        return {"--vram": find_min_vram(estimates, ram)}
    if all(any(estimate.device_bytes <= vram for estimate in stage) for stage in estimates):
        return {"--ram": find_min_ram(estimates, vram)}
    minimum = max(min(estimate.device_bytes for estimate in stage) for stage in estimates)
    return {"--vram": format_bytes_rounded_up(minimum), "--ram": find_min_ram(estimates, minimum)}


def find_min_vram(estimates: list[list[ResourceEstimate]], ram: int) -> str:
    """Return the minimum of GPU memory for all stages, given `ram` bytes of host memory."""
    fitting = ([estimate for estimate in stage if estimate.host_bytes <= ram] for stage in estimates)
    minimum = max(min(estimate.device_bytes for estimate in stage) for stage in fitting)
    return format_bytes_rounded_up(minimum)


def find_min_ram(estimates: list[list[ResourceEstimate]], vram: int | None) -> str:
    """Return the minimum of host memory for all stages, given `vram` bytes of GPU memory."""
    fitting = ([each for each in stage if vram is None or each.device_bytes <= vram] for stage in estimates)
    minimum = max(min(estimate.host_bytes for estimate in stage) for stage in fitting)
    return format_bytes_rounded_up(minimum + MARGIN_BYTES)
