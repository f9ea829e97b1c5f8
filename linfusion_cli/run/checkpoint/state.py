"""How far a run has come: what goes into its journal, and what it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from linfusion_cli.sampling.upscalers.demofusion import ChannelStatistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class PhaseState:
    """A phase, by its index, and what it began with: a picture as latents [1, C, h, w], unless with noise.

    `base` is what the channels of the ladder's first latents were like.
    """

    phase: int = 0
    encoded: Tensor | None = None
    base: ChannelStatistics | None = None

    @cached_property  # a journal does not write the same object again
    def state(self) -> dict[str, Any]:
        base = None if self.base is None else {"mean": self.base.mean, "deviation": self.base.deviation}
        return {"phase": self.phase, "encoded": self.encoded, "base": base}

    @staticmethod
    def of(state: Mapping[str, Any]) -> PhaseState:
        base = None if state["base"] is None else ChannelStatistics(**state["base"])
        return PhaseState(state["phase"], state["encoded"], base)


@dataclass(frozen=True)
class RunState:
    """So many `steps` of a phase are done, with these `latents` [1, C, h, w], None before the first.

    `is_done` says that these are the phase's last. `scheduler` and `noise` are what has to go on with them: see
    `Schedule.state` and `InTurn.state`.
    """

    begun: PhaseState = PhaseState()
    steps: int = 0
    latents: Tensor | None = None
    is_done: bool = False
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    noise: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        """Whether neither its latents nor those that the phase began with have NaN or Inf."""
        found = (self.latents, self.begun.encoded)
        return all(bool(latents.isfinite().all()) for latents in found if latents is not None)

    def on(self, device: torch.device) -> RunState:
        """The same with its latents, and what a scheduler has to go on with, on `device`."""
        latents = None if self.latents is None else self.latents.to(device)
        return replace(self, latents=latents, scheduler=move_to_device(self.scheduler, device))

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """As a journal keeps it."""
        names = ("steps", "latents", "is_done", "scheduler", "noise")
        return {"begun": self.begun.state, "reached": {name: getattr(self, name) for name in names}}

    @staticmethod
    def of(parts: Mapping[str, Mapping[str, Any]]) -> RunState:
        return RunState(PhaseState.of(parts["begun"]), **parts["reached"])


def move_to_device(value: Any, device: torch.device) -> Any:
    """A scheduler's state where its latents are; single numbers, as timesteps, stay on the CPU."""
    if isinstance(value, Mapping):
        return {name: move_to_device(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [move_to_device(item, device) for item in value]
    return value.to(device) if getattr(value, "ndim", 0) else value
