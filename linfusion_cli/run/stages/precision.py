"""The number format in which a run computes: the one that was asked for and, after NaN or Inf, a wider one.

A step that failed is repeated from the state before it. All weights are read again from their files, as the narrow
ones may have overflowed; prompts are encoded again; stages are planned anew. The rest of the run stays in that format,
as does a later run that goes on from there, so that both make the same picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from linfusion_cli.core.errors import NonFinite, OutOfMemoryBudget
from linfusion_cli.hardware.device import dtype_name, free_memory
from linfusion_cli.models.load.parts import Vae
from linfusion_cli.models.text.encode import ENCODERS
from linfusion_cli.planning.plan import Plan
from linfusion_cli.run.checkpoint.dtype_history import WIDTHS
from linfusion_cli.run.checkpoint.state import RunState
from linfusion_cli.run.stages.cache_keys import NETWORKS, offload_all
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.run.stages.load import Models, load, read_prompts
from linfusion_cli.run.stages.plan import plan_run
from linfusion_cli.sampling.phases import Phase

Result = TypeVar("Result")

WIDER = "{} This is repeated, and the run goes on, in {}."
CHECK_WEIGHTS = "Check the weights and LoRAs with `linfusion models check`; for other ones add --fresh."
OTHER_SCHEDULER = "The latents before that step were not finite either: use another --scheduler, with --fresh."
NO_ROOM = "{} There is no room to repeat this in {}: {}"


class Overflowed(NonFinite):
    """NaN or Inf in half precision: in a wider format the same may be finite."""


class NoRoom(NonFinite):
    """NaN or Inf in half precision, and too little memory for a wider format; the last good state is saved.

    The same command goes on from there where more memory may be used.
    """

    exit_code = OutOfMemoryBudget.exit_code


@contextmanager
def explain_non_finite(run: RunContext, phase: Phase | None = None) -> Iterator[None]:
    """Within, a NonFinite becomes one with the phase and the dtype in its message: Overflowed unless that is fp32."""
    try:
        yield
    except NonFinite as error:
        where = "" if phase is None else f" in phase {phase.name}"
        message = f"{error.message.rstrip('.')}{where} ({dtype_name(run.dtype)})."
        if run.dtype != torch.float32:
            raise Overflowed(message) from error
        raise NonFinite(message, CHECK_WEIGHTS) from error


@dataclass
class PrecisionFallback:
    """A run and its models, both in the format in which it computes now."""

    run: RunContext
    vae: Vae
    _models: Models | None = None
    _repeats: bool = False

    def done(self, compute: Callable[[RunContext, Models, RunState], Result], reached: RunState) -> Result:
        """What `compute` makes of `reached`; after NaN or Inf, of the last state that was reached, in a wider format.

        Raises NonFinite where the widest gives NaN or Inf too, NoRoom where a wider one does not fit.
        """
        while True:
            try:
                return compute(self.run, self._loaded(), reached)
            except Overflowed as error:
                failed = error.message
            # Only here, as the error holds on to the models.
            reached = self._widened(failed, self.run.checkpoints.reached or reached)

    def _loaded(self) -> Models:
        if self._models is None:
            with self.run.recorder.repeating() if self._repeats else nullcontext(), explain_non_finite(self.run):
                conditioning = read_prompts(self.run)  # text encoders come and go before the UNet
                self._models = load(self.run, self.vae, conditioning)
        return self._models

    def _widened(self, failed: str, reached: RunState) -> RunState:
        """Go on from `reached` in the next wider format, models and plan included -> the same state, on the host."""
        if not reached.is_finite:
            raise NonFinite(failed, OTHER_SCHEDULER)
        self._models, self._repeats, run = None, True, self.run
        reached = reached.on(torch.device("cpu"))
        run.checkpoints.move(reached)  # or the card would still hold what it had
        self.run = replace(run, plan=self._wider_plan(failed))
        run.checkpoints.change_dtype(self.run.plan, reached)
        run.update_info()
        run.recorder.notice(WIDER.format(failed, dtype_name(self.run.dtype)))
        return reached

    def _wider_plan(self, failed: str) -> Plan:
        """How the run goes on in the next wider format, planned with no more on the device than at the beginning."""
        run, wider = self.run, WIDTHS[WIDTHS.index(dtype_name(self.run.dtype)) + 1]
        run.model_cache.drop(NETWORKS, *ENCODERS)
        kept_bytes = offload_all(run.model_cache, self.vae)
        free_memory(run.device)
        try:
            return plan_run(run.resolved, run.checkpoints.stages, kept_bytes, run.model_cache, wider)
        except OutOfMemoryBudget as error:
            raise NoRoom(NO_ROOM.format(failed, wider, error.message), error.hint) from error
        finally:
            self.vae.to(run.device)
