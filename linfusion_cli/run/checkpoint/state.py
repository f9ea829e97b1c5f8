"""The progress of a run: the part of a checkpoint that a later run resumes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from linfusion_cli.run.checkpoint.known_keys import RUN_STATE_FIELDS
from linfusion_cli.sampling.upscalers.demofusion import ChannelStatistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class PhaseState:
    """The state at the start of a phase.

    phase: the index of the phase.
    start_latents: the encoded image [1, C, h, w] that the phase starts from; None for a phase that starts from noise.
    base_statistics: mean and deviation of the channels of the first phase's latents, for DemoFusion.
    """

    phase: int = 0
    start_latents: Tensor | None = None
    base_statistics: ChannelStatistics | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON values and tensors to save: always the same object, which the store writes only once."""
        return self._state_dict

    @cached_property
    def _state_dict(self) -> dict[str, Any]:
        base = self.base_statistics
        statistics = None if base is None else {"mean": base.mean, "deviation": base.deviation}
        return {"phase": self.phase, "start_latents": self.start_latents, "base_statistics": statistics}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> PhaseState:
        """Return the PhaseState that `state_dict` saved."""
        saved = state["base_statistics"]
        statistics = None if saved is None else ChannelStatistics(saved["mean"], saved["deviation"])
        return PhaseState(state["phase"], state["start_latents"], statistics)


@dataclass(frozen=True)
class RunState:
    """The state of a run after a number of steps of a phase.

    phase_state: what the current phase started from.
    steps: the number of steps done in this phase.
    latents: the latents [1, C, h, w] after these steps; None before the first step.
    is_done: True after the last step of the phase.
    scheduler_state: the state of the scheduler, see `Schedule`.
    noise_state: the state of the noise generator, see `SequentialNoise`; None for a phase that does not use it.
    """

    phase_state: PhaseState = PhaseState()
    steps: int = 0
    latents: Tensor | None = None
    is_done: bool = False
    scheduler_state: Mapping[str, Any] = field(default_factory=dict)
    noise_state: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        """True if neither the current nor the start latents contain NaN or Inf."""
        tensors = (self.latents, self.phase_state.start_latents)
        return all(bool(latents.isfinite().all()) for latents in tensors if latents is not None)

    def to(self, device: torch.device) -> RunState:
        """Return the state with its latents and scheduler state on `device`."""
        latents = None if self.latents is None else self.latents.to(device)
        return replace(self, latents=latents, scheduler_state=move_to_device(self.scheduler_state, device))

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the sections to save in a checkpoint."""
        run_state = {name: getattr(self, name) for name in RUN_STATE_FIELDS}
        return {"phase_state": self.phase_state.state_dict(), "run_state": run_state}

    @staticmethod
    def from_state_dict(state: Mapping[str, Mapping[str, Any]]) -> RunState:
        """Return the RunState that `state_dict` saved."""
        return RunState(PhaseState.from_state_dict(state["phase_state"]), **state["run_state"])


def move_to_device(value: Any, device: torch.device) -> Any:
    """Return a scheduler's state with its tensors on `device`; scalars such as timesteps stay on the CPU."""
    if isinstance(value, Mapping):
        return {name: move_to_device(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [move_to_device(item, device) for item in value]
    return value.to(device) if getattr(value, "ndim", 0) else value
