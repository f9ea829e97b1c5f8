"""Strategies: how a stage of a run is executed, and their JSON values, tagged by kind. Plans and checkpoints hold them.

| kind | stages | strategy |
|---|---|---|
| denoise_whole | denoise | DenoiseStrategy without strips |
| denoise_strips | denoise | DenoiseStrategy with strips |
| vae_stream | start, decode | VaeStrategy |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

from linfusion_cli.core.events import StageKey, StageKind
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.storage import Place
from linfusion_cli.vae.statistics import VaeStrategy

DENOISE_WHOLE, DENOISE_STRIPS, VAE_STREAM = "denoise_whole", "denoise_strips", "vae_stream"
STRIP_FIELDS = ("strips", "place")  # a forward pass without strips has neither


@dataclass(frozen=True)
class DenoiseStrategy:
    """How the UNet of a phase runs: unsplit without `strips`. `batched` runs both halves of guidance in one batch."""

    attention: str
    strips: StripSize | None = None
    place: Place = "device"
    batched: bool = False


Strategy = DenoiseStrategy | VaeStrategy
RecordedStrategy = tuple[str, Strategy | None]  # the type of device, and the strategy if this version knows its kind


def strategy_to_json(strategy: Strategy) -> dict[str, Any]:
    """Return the JSON values of a strategy, with its kind."""
    values = asdict(strategy)
    if isinstance(strategy, VaeStrategy):
        return {"kind": VAE_STREAM} | values
    if strategy.strips is not None:
        return {"kind": DENOISE_STRIPS} | values
    return {"kind": DENOISE_WHOLE} | {name: value for name, value in values.items() if name not in STRIP_FIELDS}


def strategy_from_json(values: Mapping[str, Any]) -> Strategy | None:
    """Return the strategy with these JSON values, without unknown ones; None if its kind is unknown."""
    match values["kind"]:
        case "vae_stream":
            return VaeStrategy(**select_fields(VaeStrategy, values))
        case "denoise_strips":
            strips = StripSize(**select_fields(StripSize, values["strips"]))
            return replace(DenoiseStrategy(**select_fields(DenoiseStrategy, values)), strips=strips)
        case "denoise_whole":
            return DenoiseStrategy(values["attention"], batched=values["batched"])
    return None


def select_fields(strategy_type: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `values` that are fields of this dataclass."""
    return {field.name: values[field.name] for field in fields(strategy_type) if field.name in values}


def recorded_to_json(strategies: Mapping[StageKey, Strategy], device: str) -> list[dict[str, Any]]:
    """Return the strategies of a run's stages in the format of checkpoints; `device` is the type of its device."""
    return [
        {"kind": key.kind, "phase": key.phase, "device": device, "strategy": strategy_to_json(strategy)}
        for key, strategy in strategies.items()
    ]


def recorded_from_json(stages: Sequence[Mapping[str, Any]]) -> dict[StageKey, RecordedStrategy]:
    """Return what `recorded_to_json` saved, by stage; without stages of a kind that only a later version knows."""
    return {
        StageKey(stage["kind"], stage["phase"]): (stage["device"], strategy_from_json(stage["strategy"]))
        for stage in stages
        if stage["kind"] in get_args(StageKind)
    }
