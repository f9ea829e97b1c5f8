"""What the planner chooses for SDXL on common cards, and what a run in that way reserves on a fake card: a table.

    python -m tests.fake_card.plan_table FOLDER [--cards 8 12 …] [--sizes 2048 …]

FOLDER is for the model's files. The base is denoised at each size, with guidance, and decoded; 64 GiB of host memory.
Takes about a minute for each image of 16384 px.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

from tests.fake_card.pipeline import make  # first, as it replaces functions of torch

# isort: split
from linfusion_cli.errors import DoesNotFit
from tests.fake_card import guard
from tests.fake_card.cases import GIB, Case
from tests.fake_card.model import write_sdxl
from tests.fake_card.stubs import Checkpoints

USABLE = 0.9  # of a card's memory, in GB
HEAD = f"| card | size | UNet | planned | reserved | VAE | planned | reserved | pinned |\n{'|---' * 9}|\n"


def row(card: int, size: int, folder: Path) -> str:
    budget = int(USABLE * card * 1e9)
    case = Case(f"{card}-{size}", size, vram=budget, ram=64 * GIB, steps=(1,), decodes=True)
    try:
        stages = {stage["name"]: stage for stage in make(case, folder, Checkpoints())["stages"] if "plan" in stage}
    except DoesNotFit as error:
        return f"| {card} GB | {size} | {error} |\n"
    unet, vae = stages["base"], stages["decode"]
    mode, method = unet["plan"]["mode"], vae["plan"]["mode"]
    strips = f"{mode['strips']['rows']} rows, {mode['place']}{', batched' if mode['together'] else ''}"
    statistics = "sampled" if not method["start"] else "partly exact" if method["patches"] else "exact"
    cells = [strips, *memory(unet), f"{statistics}, {method['height']} rows, {method['place']}", *memory(vae)]
    pinned = max(unet["pinned"], vae["pinned"]) / GIB
    return f"| {card} GB | {size} | {' | '.join(cells)} | {pinned:.2f} |\n"


def memory(stage: dict) -> list[str]:
    return [f"{stage['plan']['device_bytes'] / GIB:.2f}", f"{stage['reserved'] / GIB:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cards", type=int, nargs="+", default=[8, 12, 16, 24, 48, 80, 141])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    arguments = parser.parse_args()
    guard.load_guard(arguments.folder / "guard")
    write_sdxl(arguments.folder / "sdxl")
    sys.stdout.write(HEAD)
    for card in arguments.cards:
        for size in arguments.sizes:
            sys.stdout.write(row(card, size, arguments.folder))
            sys.stdout.flush()
            gc.collect()


if __name__ == "__main__":
    main()
