"""The context that all stages of a run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from linfusion_cli.core.events import StageKind
from linfusion_cli.core.report import RunReport
from linfusion_cli.hardware.versions import collect_versions, describe_machine
from linfusion_cli.images import RowSink
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.files.digest import WeightsFile
from linfusion_cli.run.checkpoint.manager import CheckpointManager
from linfusion_cli.run.inputs.provenance import weights_to_report
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.progress.recorder import RunRecorder, StageTimer
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.request_json import execution_to_json, request_to_json

if TYPE_CHECKING:
    import torch

    from linfusion_cli.planning.plan import Plan


@dataclass(frozen=True)
class RunContext:
    """A resolved request, its plan, and the services of the run: recorder, checkpoints and model cache.

    `phase_sinks` maps a phase's index to the file of its image, for phases that are saved. `update_metadata` writes
    the current dtype history into the metadata of all files that are not complete yet.
    """

    resolved: ResolvedRequest
    plan: Plan
    recorder: RunRecorder
    checkpoints: CheckpointManager
    model_cache: ModelCache = field(default_factory=lambda: ModelCache(enabled=False))
    phase_sinks: Mapping[int, RowSink] = field(default_factory=dict)
    update_metadata: Callable[[], None] = lambda: None

    @property
    def device(self) -> torch.device:
        """The device that the run computes on."""
        return self.plan.machine.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet and the text encoders; the VAE has its own."""
        return self.plan.machine.dtype

    def with_prediction_type(self, prediction_type: str) -> RunContext:
        """Return this run with another prediction type of the model."""
        resolved = replace(self.resolved, facts=self.resolved.facts.with_prediction_type(prediction_type))
        return replace(self, resolved=resolved)

    def build_report(self, request: Request, origins: Mapping[str, str], weights: Sequence[WeightsFile]) -> RunReport:
        """Return a report of `request` with the machine and the plan; the recorder adds the stages."""
        return RunReport(
            request=request_to_json(request),
            execution=execution_to_json(request),
            settings=dict(origins),
            machine=describe_machine(self.device),
            versions=collect_versions(),
            plan=self.plan.to_json(),
            weights=weights_to_report(weights),
            stages=self.recorder.stages,
        )

    def stage(self, kind: StageKind, phase: int, done: int = 0) -> AbstractContextManager[StageTimer]:
        """Record a planned stage, of which an earlier run has done `done` units: steps of denoising, rows otherwise."""
        planned = self.plan.find_stage(kind, phase)
        total, unit = (planned.steps, "steps") if planned.steps else (planned.size.height, "rows")
        of_phase = {"phase": phase, "phase_name": planned.phase_name}
        return self.recorder.stage(kind, planned.size, total, unit, planned=planned.estimate, done=done, **of_phase)
