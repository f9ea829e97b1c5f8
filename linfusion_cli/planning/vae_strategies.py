"""List the strategies for decoding and encoding an image on a machine, from the best to the least demanding."""

from __future__ import annotations

from typing import Literal

from linfusion_cli.core.geometry import Size
from linfusion_cli.planning.estimate import CostEstimator
from linfusion_cli.planning.machine import Machine
from linfusion_cli.strips.storage import Place
from linfusion_cli.vae.statistics import MIN_PATCHES, VaeStrategy, find_stream_starts

VaeStageKind = Literal["decode", "start"]  # start: encode the image that a phase starts from

# Rows computed at a time. On a CPU, twice as many rows need twice the memory and save 6 % of the time.
STREAM_ROWS = {"cpu": (8, 4, 2, 1), "cuda": (16, 8, 4, 2, 1)}
LATENTS_PER_PATCH = 8192  # latents of the image per patch: sampling then takes about a tenth of the decoding time
MAX_PATCHES = {"decode": 256, "start": 64}  # one megapixel of cores; patches of the encoder are four times as large
MEMORY_PER_MAPS = 5  # complete maps are used if the memory budget is at least 5 times their size


def list_vae_strategies(kind: VaeStageKind, statistics: str, estimator: CostEstimator, size: Size) -> list[VaeStrategy]:
    """List strategies: exact statistics, then partly exact ones as far as memory allows, then ever smaller samples.

    If `statistics` is "exact" or "sampled", the list has only such strategies.
    """
    facts, stages = estimator.facts, estimator.build_vae_stages(kind == "start")
    heights = STREAM_ROWS[estimator.machine.device.type]
    keys = (facts.vae_native_px // facts.vae_factor) ** 2
    counts = list_patch_counts(kind, size.divide(facts.vae_factor).area)
    (last, *others), places = find_stream_starts(stages), list_places(estimator.machine)
    if not last:  # the VAE has no normalisation
        return [VaeStrategy(0, 0, keys, height) for height in heights]
    if statistics == "exact":
        return [VaeStrategy(last, 0, keys, height, place) for height in heights for place in places]
    sampled = [VaeStrategy(0, count, keys, height) for height in heights for count in counts]
    if statistics == "sampled":
        return sampled
    starts = [(last, 0), *((start, counts[0]) for start in others if start)]
    exact = [VaeStrategy(start, count, keys, heights[0], place) for start, count in starts for place in places]
    return [strategy for strategy in exact if has_room_for_maps(estimator, size, kind, strategy)] + sampled


def list_patch_counts(kind: VaeStageKind, area_lat: int) -> list[int]:
    """List the sample sizes, in patches, for an image of `area_lat` latents, in descending order."""
    maximum = max(MIN_PATCHES, min(MAX_PATCHES[kind], area_lat // LATENTS_PER_PATCH))
    return sorted({maximum, max(MIN_PATCHES, maximum // 4), MIN_PATCHES}, reverse=True)


def list_places(machine: Machine) -> tuple[Place, ...]:
    """List the places for complete maps."""
    return ("device", "host") if machine.device.type == "cuda" else ("device",)


def has_room_for_maps(estimator: CostEstimator, size: Size, kind: VaeStageKind, strategy: VaeStrategy) -> bool:
    """Return whether complete maps fit into a small share of the budget: their benefit does not justify more."""
    machine, peak = estimator.machine, estimator.build_vae_ledger(size, kind == "start", strategy).peak
    device_bytes = machine.device_bytes if machine.device_bytes is not None else machine.host_bytes
    return MEMORY_PER_MAPS * peak["device"] <= device_bytes and MEMORY_PER_MAPS * peak["host"] <= machine.host_bytes
