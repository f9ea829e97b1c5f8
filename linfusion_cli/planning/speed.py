"""How fast this machine is, measured in half a second: what predictions of time stand on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from linfusion_cli.hardware.cuda import synchronize

PROBE_SEC = 0.15
# Of the rates measured by the probe, what a forward reaches: its products are smaller and of many shapes, and its
# other passes find less in the caches. Measured with tools/bench/unet.py and whole runs of the demo model.
SHARE = {"cpu": 0.8, "cuda": 0.5}


@dataclass(frozen=True)
class Speed:
    """Rates of one device in one number format: of matrix products, and of passes over numbers in memory."""

    flops_per_sec: float
    passes_per_sec: float

    def seconds(self, flops: float, passes: float) -> float:
        return flops / self.flops_per_sec + passes / self.passes_per_sec


@cache
def measured(device: torch.device, dtype: torch.dtype) -> Speed:
    """The rates of `device`: a product of a strip's tokens with a layer's weights, and an activation of as many.

    A process measures each once.
    """
    tokens, width = (1024, 512) if device.type == "cpu" else (16384, 2048)
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    weights = torch.randn(width, width, device=device, dtype=dtype)
    share = SHARE[device.type]
    product_sec = mean_seconds(lambda: x @ weights, device)
    activation_sec = mean_seconds(lambda: F.silu(x), device)
    return Speed(share * 2 * tokens * width * width / product_sec, share * 2 * tokens * width / activation_sec)


@torch.inference_mode()
def mean_seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, on average over the probe: what others take of the machine counts."""
    work()
    synchronize(device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < PROBE_SEC:
        work()
        synchronize(device)
        done += 1
    return (time.perf_counter() - began) / done
