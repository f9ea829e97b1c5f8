"""Fall back from half precision to a wider dtype after NaN or Inf.

The failed step is repeated from the state before it. All weights are loaded from their files again, since casting to
half precision may have made them overflow. Prompts are encoded and stages are planned again. The rest of the run uses
the wider dtype, and so does a run that resumes it: both produce the same image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from linfusion_cli.core.errors import NonFinite, OutOfMemoryBudget, WiderDtypeDoesNotFit
from linfusion_cli.hardware.device import dtype_name
from linfusion_cli.hardware.peak import release_memory
from linfusion_cli.models.load.networks import Vae
from linfusion_cli.models.text.encode import ENCODERS
from linfusion_cli.planning.plan import Plan
from linfusion_cli.run.checkpoint.dtype_history import DTYPES_BY_WIDTH
from linfusion_cli.run.checkpoint.state import RunState
from linfusion_cli.run.stages.cache_keys import NETWORKS, move_network, offload_all
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.run.stages.load import Models, encode_conditioning, load_models
from linfusion_cli.run.stages.plan import plan_run
from linfusion_cli.sampling.phases import Phase

Result = TypeVar("Result")

SWITCHED_DTYPE = "{} Repeating this in {}; the rest of the run uses it too."
CHECK_WEIGHTS = "Check the weights and LoRAs with `linfusion models check`. To use other ones, add --fresh."
OTHER_SCHEDULER = "The latents before that step already have NaN or Inf. Use another --scheduler and --fresh."
WIDER_DTYPE_DOES_NOT_FIT = "{} Repeating it in {} needs too much memory: {}"


class HalfPrecisionOverflow(NonFinite):
    """NaN or Inf in half precision. The result may be finite in a wider dtype."""


@contextmanager
def explain_non_finite(run: RunContext, phase: Phase | None = None) -> Iterator[None]:
    """Add phase and dtype to the message of a NonFinite; raise HalfPrecisionOverflow if the dtype is not fp32."""
    try:
        yield
    except NonFinite as error:
        where = "" if phase is None else f" in phase {phase.name}"
        message = f"{error.message.rstrip('.')}{where} ({dtype_name(run.dtype)})."
        if run.dtype != torch.float32:
            raise HalfPrecisionOverflow(message) from error
        raise NonFinite(message, CHECK_WEIGHTS) from error


@dataclass
class PrecisionFallback:
    """Runs computations with the models of a run, and switches both to a wider dtype after NaN or Inf.

    `run` always has the current dtype and plan.
    """

    run: RunContext
    vae: Vae
    _models: Models | None = None
    _is_repeat: bool = False

    def execute(self, compute: Callable[[RunContext, Models, RunState], Result], state: RunState) -> Result:
        """Return `compute(run, models, state)`. After NaN or Inf, repeat from the last state in a wider dtype.

        Raise NonFinite if fp32 gives NaN or Inf too, WiderDtypeDoesNotFit if the wider dtype needs too much memory.
        """
        while True:
            try:
                return compute(self.run, self._load_models(), state)
            except HalfPrecisionOverflow as error:
                failed = error.message
            # Outside the except clause: the traceback of the error keeps the models in memory.
            state = self._switch_dtype(failed, self.run.checkpoints.last_state or state)

    def _load_models(self) -> Models:
        if self._models is None:
            with (
                self.run.recorder.suppress_repeated_notices() if self._is_repeat else nullcontext(),
                explain_non_finite(self.run),
            ):
                conditioning = encode_conditioning(self.run)  # frees the text encoders before the UNet is loaded
                self._models = load_models(self.run, self.vae, conditioning)
        return self._models

    def _switch_dtype(self, failed: str, state: RunState) -> RunState:
        """Switch models and plan to the next wider dtype. Return `state` on the host."""
        if not state.is_finite:
            raise NonFinite(failed, OTHER_SCHEDULER)
        self._models, self._is_repeat, run = None, True, self.run
        state = state.to(torch.device("cpu"))
        run.checkpoints.replace_state(state)  # frees the device memory of the old state
        self.run = replace(run, plan=self._plan_wider_dtype(failed))
        run.checkpoints.change_dtype(self.run.plan, state)
        run.update_metadata()
        run.recorder.notify(SWITCHED_DTYPE.format(failed, dtype_name(self.run.dtype)))
        return state

    def _plan_wider_dtype(self, failed: str) -> Plan:
        """Plan the rest of the run in the next wider dtype, with all models moved off the device."""
        run, wider = self.run, DTYPES_BY_WIDTH[DTYPES_BY_WIDTH.index(dtype_name(self.run.dtype)) + 1]
        run.model_cache.evict(NETWORKS, *ENCODERS)
        kept_bytes = offload_all(run.model_cache, self.vae)
        release_memory(run.device)
        try:
            return plan_run(run.resolved, run.checkpoints.stages, kept_bytes, run.model_cache, wider)
        except OutOfMemoryBudget as error:
            raise WiderDtypeDoesNotFit(
                WIDER_DTYPE_DOES_NOT_FIT.format(failed, wider, error.message), error.hint
            ) from error
        finally:
            move_network(self.vae, run.device)
