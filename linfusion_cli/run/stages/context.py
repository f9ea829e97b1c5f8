"""What stays the same from a run's first stage to its last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from linfusion_cli.images import RowSink
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.run.checkpoint.manager import CheckpointManager
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.progress.recorder import RunRecorder, StageTimer

if TYPE_CHECKING:
    import torch

    from linfusion_cli.planning.plan import Plan


@dataclass(frozen=True)
class RunContext:
    """A request that nothing speaks against, the plan to carry it out, and who records how that goes.

    On the `shelf` lies what a job before has loaded. `phase_sinks` are the files of the phases whose pictures are
    kept, by the phase's index. `retell` lets all files that are not complete say which dtypes steps had, as of now.
    """

    resolved: ResolvedRequest
    plan: Plan
    recorder: RunRecorder
    checkpoints: CheckpointManager
    model_cache: ModelCache = field(default_factory=lambda: ModelCache(keeps=False))
    phase_sinks: Mapping[int, RowSink] = field(default_factory=dict)
    retell: Callable[[], None] = lambda: None

    @property
    def device(self) -> torch.device:
        return self.plan.machine.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's and the text encoders'; the VAE has its own."""
        return self.plan.machine.dtype

    def predicting(self, prediction_type: str) -> RunContext:
        """This run with a model that predicts this."""
        resolved = replace(self.resolved, facts=self.resolved.facts.predicting(prediction_type))
        return replace(self, resolved=resolved)

    def stage(self, kind: str, phase: int, done: int = 0) -> AbstractContextManager[StageTimer]:
        """Record a planned stage, of which an earlier run has `done` some: a denoising counts steps, all else rows."""
        planned = self.plan.stage(kind, phase)
        total, unit = (planned.steps, "steps") if planned.steps else (planned.size.height, "rows")
        return self.recorder.stage(planned.name, kind, planned.size, total, unit, planned=planned.need, done=done)
