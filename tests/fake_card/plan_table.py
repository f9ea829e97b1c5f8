"""What the planner chooses for SDXL on common cards, and what a run in that way reserves on a fake card: a table.

    python -m tests.fake_card.plan_table FOLDER [--cards 8 12 …] [--sizes 2048 …] [--run]

FOLDER is for the model's files. The base is denoised at each size, with guidance, and decoded; 64 GiB of host memory.
With --run each of them is run too, which takes minutes for an image of 16384 px.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

from tests.fake_card.pipeline import chosen, make, request_of  # first, as it replaces functions of torch

# isort: split
from linfusion_cli.core.errors import OutOfMemoryBudget
from linfusion_cli.run.inputs.resolve import resolve_request
from linfusion_cli.run.stages.plan import plan_run
from tests.fake_card.cases import GIB, Case
from tests.fake_card.device import guard
from tests.fake_card.device.card import FakeCard
from tests.fake_card.device.stubs import Checkpoints, CountingSink, stubbed
from tests.fake_card.model import write_sdxl

USABLE = 0.9  # of a card's memory, in GB
HEAD = f"| card | size | UNet | planned | reserved | VAE | planned | reserved | pinned |\n{'|---' * 9}|\n"


def row(card: int, size: int, folder: Path, runs: bool) -> str:
    budget = int(USABLE * card * 1e9)
    case = Case(f"{card}-{size}", size, vram=budget, ram=64 * GIB, steps=(1,), decodes=True)
    try:
        stages = make(case, folder, Checkpoints())["stages"] if runs else planned(case, folder)
    except OutOfMemoryBudget as error:
        return f"| {card} GB | {size} | {error} |\n"
    unet, vae = (next(stage for stage in stages if stage["name"] == name) for name in ("base", "decode"))
    mode, method = unet["plan"]["mode"], vae["plan"]["mode"]
    strips = f"{mode['strips']['rows']} rows, {mode['place']}{', batched' if mode['together'] else ''}"
    statistics = "sampled" if not method["start"] else "partly exact" if method["patches"] else "exact"
    cells = [strips, *memory(unet), f"{statistics}, {method['height']} rows, {method['place']}", *memory(vae)]
    pinned = max(stage["plan"]["pinned_bytes"] for stage in (unet, vae)) / GIB
    return f"| {card} GB | {size} | {' | '.join(cells)} | {pinned:.2f} |\n"


def planned(case: Case, folder: Path) -> list[dict]:
    """The stages of the plan alone."""
    with FakeCard({}), stubbed(Checkpoints(), CountingSink()), chosen(case):
        stages = plan_run(resolve_request(request_of(case, folder))).to_json()["stages"]
    return [{"name": stage["name"], "plan": stage["need"] | {"mode": stage["mode"]}} for stage in stages]


def memory(stage: dict) -> list[str]:
    reserved = f"{stage['reserved'] / GIB:.2f}" if "reserved" in stage else ""
    return [f"{stage['plan']['device_bytes'] / GIB:.2f}", reserved]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cards", type=int, nargs="+", default=[8, 12, 16, 24, 48, 80, 141])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--run", action="store_true")
    arguments = parser.parse_args()
    guard.load_guard(arguments.folder / "guard")
    write_sdxl(arguments.folder / "sdxl")
    sys.stdout.write(HEAD)
    for card in arguments.cards:
        for size in arguments.sizes:
            sys.stdout.write(row(card, size, arguments.folder, arguments.run))
            sys.stdout.flush()
            gc.collect()


if __name__ == "__main__":
    main()
