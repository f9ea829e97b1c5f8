"""Checkpoints of stopped runs of the embedded model, in the folders next to this file, and the requests to resume them.

Paths in them are relative to the current folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from linfusion_cli.core.errors import Stopped
from linfusion_cli.core.events import Event, StageAdvanced, StageStarted, format_stage
from linfusion_cli.core.report import RunReport
from linfusion_cli.images.read.source import inspect_source, read_source_rows
from linfusion_cli.run.pipeline import generate
from tests.golden.cases import RUN
from tests.support.requests import make_request

FOLDER = Path(__file__).parent
RULE = (
    "The checkpoint {} of this SCHEMA and NUMERICS does not give the image of an uninterrupted run any more. Keep it "
    "readable, or raise NUMERICS (other latents) or SCHEMA (another format) in linfusion_cli/checkpoint/versions.py, "
    "mention the number in CHANGELOG.md, and run `python -m tests.golden.checkpoints`."
)
SOURCE = Path("source.png")


@dataclass(frozen=True)
class Case:
    """A run that stops in `stage` after `done` units; `resumed_from` is how the report describes its saved state."""

    stage: str
    done: int
    resumed_from: str
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "base": Case("denoise base", 3, "step 3 of 8 in phase base", {"upscaler": "sdedit", "scheduler": "euler-a"}),
    "second-phase": Case(
        "denoise 2x", 2, "step 2 of 4 in phase 2x", {"upscaler": "demofusion", "scheduler": "dpmpp-2m"}
    ),
    "decode": Case("decode 2x", 1, "the finished latents", {"upscaler": "demofusion"}),
    "upscale": Case("denoise 2.2x", 2, "step 2 of 4 in phase 2.2x", {"upscaler": "demofusion", "image": SOURCE}),
}


def execute(name: str, output: str, observer: Callable[[Event], None] = lambda _: None) -> RunReport:
    """Execute or resume the run `name` in the current folder."""
    settings = RUN | CASES[name].settings | {"bits": 16, "output": Path(output), "checkpoint_every": 0.0}
    if "image" in settings:
        settings |= {"base_size": None, "attention": ("linear",)}
        shutil.copy(FOLDER / SOURCE, SOURCE)
    return generate(make_request(**settings), {}, observer)


def stop_in(case: Case) -> Callable[[Event], None]:
    """Return an observer that stops the run of `case`."""
    stage = ""

    def observer(event: Event) -> None:
        nonlocal stage
        if isinstance(event, StageStarted):
            stage = format_stage(event.kind, event.phase_name)
        elif isinstance(event, StageAdvanced) and stage == case.stage and event.done >= case.done:
            raise Stopped(15)

    return observer


def record(name: str) -> None:
    """Stop the run `name` in the current folder, and keep its checkpoint."""
    try:
        execute(name, "a.png", stop_in(CASES[name]))
    except Stopped:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        shutil.copytree("a.png.linfusion", FOLDER / name, ignore=shutil.ignore_patterns("lock"))
    else:
        raise AssertionError(f"the run {name} has no stage {CASES[name].stage}")


def place(name: str) -> None:
    """Copy the checkpoint of the run `name` to the current folder."""
    shutil.copytree(FOLDER / name, "a.png.linfusion")


def find_difference(one: str, other: str) -> float:
    """Return the largest difference of two images, in parts of white."""
    first, second = (read_pixels(Path(path)) for path in (one, other))
    return float(np.abs(first - second).max())


def read_pixels(path: Path) -> np.ndarray:
    """Return the pixels [H, W, 3] of an image, 0 to 1."""
    return np.concatenate(list(read_source_rows(inspect_source(path), (0, 0, 0), lambda _: None))).astype(np.float64)
