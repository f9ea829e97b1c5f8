"""Memory and rates of common GPUs, for `linfusion plan --gpu`. Needs no torch.

Figures are from NVIDIA's data sheets, and for GeForce cards from the white papers of their architectures: dense tensor
core rates in fp16 with fp32 accumulation, as in cuBLAS, and fp32 rates without tensor cores.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from math import nan
from typing import Any

from linfusion_cli.core.errors import UsageError

GIB = 1 << 30
PCIE_3, PCIE_4, PCIE_5 = 10e9, 20e9, 40e9  # bytes per second over 16 lanes, one direction at a time
USABLE_SHARE = 0.9
MAKERS = re.compile(r"^(?:nvidia|tesla|geforce)+")


@dataclass(frozen=True)
class Gpu:
    """A GPU: its memory and its rates in TFLOP/s, GB/s, and bytes per second to and from the host."""

    name: str
    memory_gib: int
    half_tflops: float
    single_tflops: float
    memory_gb_per_sec: float
    copy_bytes_per_sec: float
    has_bfloat16: bool = True

    @property
    def memory_bytes(self) -> int:
        """The memory in bytes."""
        return self.memory_gib * GIB

    @property
    def default_budget_bytes(self) -> int:
        """The budget unless --vram sets another: less than the memory, as the driver needs some."""
        return int(USABLE_SHARE * self.memory_bytes)

    def to_json(self) -> dict[str, Any]:
        """Return name and memory for JSON, null if they are unknown."""
        return {"name": self.name or None, "memory_bytes": self.memory_bytes or None}


GPUS = {
    "rtx2080ti": Gpu("NVIDIA GeForce RTX 2080 Ti", 11, 53.8, 13.4, 616, PCIE_3, has_bfloat16=False),
    "rtx3060": Gpu("NVIDIA GeForce RTX 3060", 12, 25.5, 12.7, 360, PCIE_4),
    "rtx3080": Gpu("NVIDIA GeForce RTX 3080", 10, 59.5, 29.8, 760, PCIE_4),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 24, 71, 35.6, 936, PCIE_4),
    "rtx4060ti-16g": Gpu("NVIDIA GeForce RTX 4060 Ti 16 GB", 16, 44.1, 22.1, 288, PCIE_4 / 2),  # 8 lanes
    "rtx4070": Gpu("NVIDIA GeForce RTX 4070", 12, 58.3, 29.1, 504, PCIE_4),
    "rtx4070ti-super": Gpu("NVIDIA GeForce RTX 4070 Ti SUPER", 16, 88.2, 44.1, 672, PCIE_4),
    "rtx4080": Gpu("NVIDIA GeForce RTX 4080", 16, 97.5, 48.7, 717, PCIE_4),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 24, 165.2, 82.6, 1008, PCIE_4),
    "rtx5080": Gpu("NVIDIA GeForce RTX 5080", 16, 112.6, 56.3, 960, PCIE_5),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 32, 209.5, 104.8, 1792, PCIE_5),
    "t4": Gpu("NVIDIA T4", 16, 65, 8.1, 320, PCIE_3, has_bfloat16=False),
    "v100-16g": Gpu("NVIDIA V100 16 GB", 16, 125, 15.7, 900, PCIE_3, has_bfloat16=False),
    "v100": Gpu("NVIDIA V100 32 GB", 32, 125, 15.7, 900, PCIE_3, has_bfloat16=False),
    "a10": Gpu("NVIDIA A10", 24, 125, 31.2, 600, PCIE_4),
    "a6000": Gpu("NVIDIA RTX A6000", 48, 154.8, 38.7, 768, PCIE_4),
    "a100-40g": Gpu("NVIDIA A100 40 GB", 40, 312, 19.5, 1555, PCIE_4),
    "a100": Gpu("NVIDIA A100 80 GB", 80, 312, 19.5, 2039, PCIE_4),
    "l4": Gpu("NVIDIA L4", 24, 121, 30.3, 300, PCIE_4),
    "l40s": Gpu("NVIDIA L40S", 48, 362, 91.6, 864, PCIE_4),
    "h100": Gpu("NVIDIA H100 80 GB", 80, 989, 67, 3350, PCIE_5),
    "h200": Gpu("NVIDIA H200", 141, 989, 67, 4800, PCIE_5),
    "b200": Gpu("NVIDIA B200", 180, 2250, 75, 7700, PCIE_5),
}
UNKNOWN_GPU = Gpu("", 0, nan, nan, nan, nan)  # of --vram without --gpu: all of its times are nan


def find_gpu(name: str) -> Gpu:
    """Return the GPU `name`, ignoring case, spaces, dashes and the maker; raise UsageError if it is unknown."""
    keys = {normalize_name(text): key for key, gpu in GPUS.items() for text in (gpu.name, key)}
    key = keys.get(normalize_name(name))
    if key is not None:
        return GPUS[key]
    similar = difflib.get_close_matches(normalize_name(name)[:40], keys, 1, cutoff=0.5)
    suggestion = f"Did you mean {keys[similar[0]]}? " if similar else ""
    raise UsageError(f"--gpu {name!r} is unknown.", f"{suggestion}Known are {', '.join(GPUS)}.")


def normalize_name(name: str) -> str:
    """Return the letters and digits of a GPU's name without its maker: "NVIDIA RTX 4090" -> "rtx4090"."""
    return MAKERS.sub("", "".join(re.findall(r"[a-z0-9]", name.lower())))
