"""A table of the plans for SDXL on common cards, and of the memory that these runs reserve on a fake card.

    python -m tests.fake_card.plan_table FOLDER [--cards 8 12 …] [--sizes 2048 …] [--run]

FOLDER is for the model files. Each run denoises the base phase at the size, with guidance, and decodes it; the host has
64 GiB. With --run the runs are executed, which takes minutes for an image of 16384 px.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

from tests.fake_card.pipeline import build_request, execute_run, restrict_plans  # first: replaces functions of torch

# isort: split
from linfusion_cli.core.errors import OutOfMemoryBudget
from linfusion_cli.run.inputs.resolve import resolve_request
from linfusion_cli.run.stages.plan import plan_run
from tests.fake_card.cases import GIB, Case
from tests.fake_card.device import guard
from tests.fake_card.device.card import FakeCard
from tests.fake_card.device.stubs import Checkpoints, CountingSink, stub_files
from tests.fake_card.model import write_sdxl

USABLE = 0.9  # share of the card's memory
HEAD = f"| card | size | UNet | planned | reserved | VAE | planned | reserved | pinned |\n{'|---' * 9}|\n"


def format_row(card: int, size: int, folder: Path, runs: bool) -> str:
    """Return the row of a card (GB) and size."""
    budget = int(USABLE * card * 1e9)
    case = Case(f"{card}-{size}", size, vram=budget, ram=64 * GIB, steps=(1,), decodes=True)
    try:
        stages = execute_run(case, folder, Checkpoints())["stages"] if runs else plan_stages(case, folder)
    except OutOfMemoryBudget as error:
        return f"| {card} GB | {size} | {error} |\n"
    unet, vae = (next(stage for stage in stages if stage["kind"] == kind) for kind in ("denoise", "decode"))
    denoise, conversion = unet["plan"]["strategy"], vae["plan"]["strategy"]
    strips = f"{denoise['strips']['rows']} rows, {denoise['place']}{', batched' if denoise['batched'] else ''}"
    statistics = "sampled" if not conversion["start"] else "partly exact" if conversion["patches"] else "exact"
    cells = [
        strips,
        *format_memory(unet),
        f"{statistics}, {conversion['height']} rows, {conversion['place']}",
        *format_memory(vae),
    ]
    pinned = max(stage["plan"]["pinned_bytes"] for stage in (unet, vae)) / GIB
    return f"| {card} GB | {size} | {' | '.join(cells)} | {pinned:.2f} |\n"


def plan_stages(case: Case, folder: Path) -> list[dict]:
    """Return the stages of the plan without running them."""
    with FakeCard({}), stub_files(Checkpoints(), CountingSink()), restrict_plans(case):
        stages = plan_run(resolve_request(build_request(case, folder))).to_json()["stages"]
    return [{"kind": stage["kind"], "plan": stage["estimate"] | {"strategy": stage["strategy"]}} for stage in stages]


def format_memory(stage: dict) -> list[str]:
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
            sys.stdout.write(format_row(card, size, arguments.folder, arguments.run))
            sys.stdout.flush()
            gc.collect()


if __name__ == "__main__":
    main()
