"""`python -m tests.golden.record`: record the golden values, and print the difference of each to its old value."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from tests.golden.cases import LATENTS_FILE, NOISE_FILE, RUNS, compute_final_latents, draw_noises, max_difference


def record(path: Path, values: dict[str, Tensor]) -> None:
    """Write the values to the file, and print how they differ from its current values."""
    before = load_file(path) if path.exists() else {}
    for name, value in values.items():
        changed = f"{max_difference(value, before[name]):.1e} from before" if name in before else "new"
        sys.stdout.write(f"{path.name}: {name}: {changed}\n")
    path.write_bytes(save(values))


if __name__ == "__main__":
    record(NOISE_FILE, draw_noises())
    record(LATENTS_FILE, {name: compute_final_latents(name) for name in RUNS})
