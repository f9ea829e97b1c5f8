"""The ways to take a picture through a VAE on a machine, the best first."""

from __future__ import annotations

from typing import Literal

from linfusion_cli.core.geometry import Size
from linfusion_cli.planning.estimate import CostEstimator
from linfusion_cli.planning.machine import Machine
from linfusion_cli.strips.storage import Place
from linfusion_cli.vae.statistics import MIN_PATCHES, VaeStrategy, starts

Kind = Literal["decode", "encode"]

# Rows computed at a time. On a CPU taller strips take twice the memory for 6 % less time.
STREAM_ROWS = {"cpu": (8, 4, 2, 1), "cuda": (16, 8, 4, 2, 1)}
LATENTS_PER_PATCH = 8192  # of the picture: a sample then takes about a tenth of the time that decoding takes
MAX_PATCHES = {"decode": 256, "encode": 64}  # a megapixel of cores; an encoder's patches are four times as large
EXACT_SHARE = 5  # whole maps may take so much of the memory that may be used: a fifth


def methods_for(kind: Kind, statistics: str, reckoner: CostEstimator, size: Size) -> list[VaeStrategy]:
    """Statistics from all of the picture, then of as many levels as there is room for, then from ever smaller samples.

    `statistics` is "exact" or "sampled" where only that will do.
    """
    facts, stages = reckoner.facts, reckoner.vae_stages(kind == "encode")
    heights = STREAM_ROWS[reckoner.machine.device.type]
    keys = (facts.vae_native_px // facts.vae_factor) ** 2
    counts = patch_counts(kind, size.divide(facts.vae_factor).area)
    (last, *others), where = starts(stages), places(reckoner.machine)
    if not last:  # it has no statistics
        return [VaeStrategy(0, 0, keys, height) for height in heights]
    if statistics == "exact":
        return [VaeStrategy(last, 0, keys, height, place) for height in heights for place in where]
    sampled = [VaeStrategy(0, count, keys, height) for height in heights for count in counts]
    if statistics == "sampled":
        return sampled
    whole = [(last, 0), *((start, counts[0]) for start in others if start)]
    methods = [VaeStrategy(*ways, keys, heights[0], place) for ways in whole for place in where]
    return [method for method in methods if has_room(reckoner, size, kind, method)] + sampled


def patch_counts(kind: Kind, area_lat: int) -> list[int]:
    """How many patches a sample of a picture may have, the most first."""
    most = max(MIN_PATCHES, min(MAX_PATCHES[kind], area_lat // LATENTS_PER_PATCH))
    return sorted({most, max(MIN_PATCHES, most // 4), MIN_PATCHES}, reverse=True)


def places(machine: Machine) -> tuple[Place, ...]:
    """Where whole maps may wait."""
    return ("device", "host") if machine.device.type == "cuda" else ("device",)


def has_room(reckoner: CostEstimator, size: Size, kind: Kind, method: VaeStrategy) -> bool:
    """Whether whole maps take no more than their share of the memory: the gain is small, and others may want some."""
    machine, peak = reckoner.machine, reckoner.vae_ledger(size, kind == "encode", method).peak
    on_card = machine.device_bytes if machine.device_bytes is not None else machine.host_bytes
    return EXACT_SHARE * peak["device"] <= on_card and EXACT_SHARE * peak["host"] <= machine.host_bytes
