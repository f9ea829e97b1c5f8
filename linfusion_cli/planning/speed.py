"""Measure the speed of a device, as the basis of time estimates. Takes half a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from linfusion_cli.hardware.cuda import synchronize

PROBE_SEC = 0.15
# The share of the probe's rates that a forward reaches: its matrix products are smaller and of many shapes, and its
# other operations have fewer cache hits. Measured with tools/bench/unet.py and complete runs of the demo model.
EFFICIENCY = {"cpu": 0.8, "cuda": 0.5}
# The share of a data sheet's rates that a plan for another GPU assumes. No GPU was measured yet, so times are lower
# bounds. On an H200, cuBLAS reaches 0.8 of the rate of matrix products.
DATA_SHEET_EFFICIENCY = 1.0


@dataclass(frozen=True)
class Speed:
    """Rates of a device for one dtype: of matrix products, and of values read from or written to memory."""

    flops_per_sec: float
    passes_per_sec: float

    def estimate_seconds(self, flops: float, passes: float) -> float:
        """Return the time of `flops` floating-point operations and `passes` memory accesses."""
        return flops / self.flops_per_sec + passes / self.passes_per_sec


def compute_speed(flops_per_sec: float, bytes_per_sec: float, itemsize: int) -> Speed:
    """Return the speed of a GPU with these rates in its data sheet, for values of `itemsize` bytes."""
    return Speed(DATA_SHEET_EFFICIENCY * flops_per_sec, DATA_SHEET_EFFICIENCY * bytes_per_sec / itemsize)


@cache
def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Measure the rates of `device`: the product of a strip's tokens with a layer's weights, and an activation.

    The result is cached for the process.
    """
    tokens, width = (1024, 512) if device.type == "cpu" else (16384, 2048)
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    weights = torch.randn(width, width, device=device, dtype=dtype)
    efficiency = EFFICIENCY[device.type]
    product_sec = measure_mean_seconds(lambda: x @ weights, device)
    activation_sec = measure_mean_seconds(lambda: F.silu(x), device)
    return Speed(
        efficiency * 2 * tokens * width * width / product_sec, efficiency * 2 * tokens * width / activation_sec
    )


@torch.inference_mode()
def measure_mean_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the mean duration of `work` over PROBE_SEC. The load of other processes is included."""
    work()
    synchronize(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE_SEC:
        work()
        synchronize(device)
        count += 1
    return (time.perf_counter() - started) / count
