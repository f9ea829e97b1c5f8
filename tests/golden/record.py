"""`python -m tests.golden.record`: writes the golden values anew, and says how far each is from what it was before."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from tests.golden.cases import LATENTS_FILE, NOISE_FILE, RUNS, final_latents, largest_difference, noises


def record(path: Path, values: dict[str, Tensor]) -> None:
    before = load_file(path) if path.exists() else {}
    for name, value in values.items():
        changed = f"{largest_difference(value, before[name]):.1e} from before" if name in before else "new"
        sys.stdout.write(f"{path.name}: {name}: {changed}\n")
    path.write_bytes(save(values))


if __name__ == "__main__":
    record(NOISE_FILE, noises())
    record(LATENTS_FILE, {name: final_latents(name) for name in RUNS})
