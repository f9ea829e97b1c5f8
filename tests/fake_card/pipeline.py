"""Whole runs at SDXL's real shape on a FakeCard, in a process of its own: what was planned, and what was counted.

    python -m tests.fake_card.pipeline FOLDER SHARED NAME …      prints a JSON object: name -> stages, or the error

FOLDER is for the model's files, SHARED for the compiled guard, which is made once.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.fake_card.cases import CASES, TOTAL_BYTES, Case, VaeCase
from tests.fake_card.device import driver, guard

driver.install(TOTAL_BYTES)  # before modules of the package take functions of torch

# ruff: noqa: E402
import torch
from diffusers import AutoencoderKL

from linfusion_cli.core.errors import Stopped
from linfusion_cli.core.events import Notice, StageAdvanced, StageFinished, StageStarted
from linfusion_cli.core.geometry import Size
from linfusion_cli.models.families.facts import ModelFacts
from linfusion_cli.planning import machine, plan
from linfusion_cli.planning.estimate import CostEstimator
from linfusion_cli.planning.machine import Machine
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.speed import Speed
from linfusion_cli.planning.vae_strategies import patch_counts
from linfusion_cli.run import pipeline
from linfusion_cli.run.stages import convert
from linfusion_cli.settings.request import GenerateRequest
from linfusion_cli.strips import storage
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import encode_rows
from linfusion_cli.vae.stages import decoder_stages, encoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, starts
from tests.fake_card.device.card import FakeCard
from tests.fake_card.device.stubs import Checkpoints, CountingSink, as_fake, stubbed
from tests.fake_card.device.tensor import CUDA
from tests.fake_card.model import write_sdxl
from tools.bench.shapes import SDXL_KEYS, sdxl_vae

# Where single values may be read from the card, and what is there.
SCALARS = {
    "sampling/schedulers/schedule.py:stepped": True,
    "sampling/schedulers/schedule.py:is_finite": True,
    "run/checkpoint/state.py:<genexpr>": True,
    "run/checkpoint/state.py:is_finite": True,
}
H200 = Speed(4e14, 1e12)


class Watch:
    """What the card was asked to do, by stage and step; an observer of the run."""

    def __init__(self, card: FakeCard, stops_at: str | None = None):
        self.card, self.stages, self.notices, self._stops_at = card, [], [], stops_at
        self._now: dict[str, Any] = {}

    def __call__(self, event: Any) -> None:
        match event:
            case Notice(text):
                self.notices.append(text)
            case StageStarted(name, size):
                self._now = {"name": name, "size": str(size), "steps": [self._so_far()]}
            case StageAdvanced():
                self._now["steps"].append(self._so_far())
                if self._now["name"] == self._stops_at:
                    raise Stopped(signal.SIGTERM)
            case StageFinished():
                self.stages.append(self._now | self.peaks())

    def _so_far(self) -> dict[str, int]:
        """The counts of what a step may do rarely or not at all."""
        counts = self.card.counts
        sums = {"syncs": counts.syncs, "blocking": counts.blocking}
        return {"kernels": counts.kernels} | {name: sum(found.values()) for name, found in sums.items()}

    def peaks(self) -> dict[str, Any]:
        card = self.card
        peaks = {"reserved": card.expandable.peak_reserved, "allocated": card.expandable.peak_allocated}
        return card.counts.to_json() | peaks | {"native": card.native.peak_reserved, "pinned": card.peak_pinned}


def run(case: Case, folder: Path) -> dict[str, Any]:
    """One run, or the second of two, which goes on from the first -> its stages: planned, and counted."""
    checkpoints = Checkpoints()
    if case.stops_at:
        with suppress(Stopped):
            make(case, folder, checkpoints, case.stops_at)
    return make(case, folder, checkpoints)


def make(case: Case, folder: Path, checkpoints: Checkpoints, stops_at: str | None = None) -> dict[str, Any]:
    with FakeCard(SCALARS) as card:
        card.fails = list(case.fails)
        sink, watch = CountingSink(), Watch(card, stops_at)
        with stubbed(checkpoints, sink), chosen(case):
            report = pipeline.run_pipeline(request_of(case, folder), None, {}, watch)
        result = {"rows": sink.rows, "complete": sink.is_complete, "notices": watch.notices, "fails": card.fails}
        result |= {"resumed": report.resumed_from, "left_pinned": card.pinned_bytes}
        return result | {"stages": [stage | needed(stage, report.plan) for stage in watch.stages]}


def needed(stage: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """What the plan says of a stage, if it has it: encode and decode are there for each phase, in this order."""
    found = [each for each in planned["stages"] if each["name"] == stage["name"] and each["size"] == stage["size"]]
    return {"plan": found[0]["need"] | {"mode": found[0]["mode"], "steps": found[0]["steps"]}} if found else {}


def request_of(case: Case, folder: Path) -> GenerateRequest:
    model = folder / "sdxl"
    extras: dict[str, Any] = {}
    if "lora" in case.extras:
        extras["lora"] = (str(model / "lora.safetensors"),)
    if "controlnet" in case.extras:
        extras |= {"controlnet": (str(model / "controlnet"),), "control_image": (str(model / "image.png"),)}
        extras["control_phases"] = ("all",)
    if "ip_adapter" in case.extras:
        extras |= {"ip_adapter": (str(model / "adapter" / "ip.safetensors"),), "ip_image": (str(model / "image.png"),)}
    return GenerateRequest(
        prompt="a hill",
        negative_prompt="fog",
        size=Size(case.size, case.size),
        output=folder / f"{case.name}.tif",
        model=str(model),
        linfusion=str(model / "linfusion"),
        linfusion_merge="published",
        steps=case.steps,
        guidance_scale=case.guidance_scale,
        strength=(1.0,),
        upscaler=case.upscaler,
        upscale_space=case.space,
        base_size=None if case.base_px is None else Size(case.base_px, case.base_px),
        attention=(case.attention,),
        scheduler=case.scheduler,
        dtype=case.dtype,
        ram=case.ram,
        vram=case.vram,
        overwrite=True,
        checkpoint_every=3600.0,
        **extras,
    )


@contextmanager
def chosen(case: Case) -> Iterator[None]:
    """Within the context plans have only the ways that the case is about."""

    def modes(*args: Any, **kwargs: Any) -> list[Any]:
        found = [mode for mode in plan_modes(*args, **kwargs) if case.place in (None, mode.place)]
        return [mode for mode in found if case.batched in (None, mode.together)] or found

    plan_modes = plan.modes_for
    with ExitStack() as stack:
        stack.enter_context(patch.object(plan, "modes_for", modes))
        stack.enter_context(patch.object(machine, "measured", lambda device, dtype: H200))
        for module in (machine, storage):
            stack.enter_context(patch.object(module, "segments", lambda: case.segments))
        if not case.decodes:
            stack.enter_context(patch.object(convert, "write_output", lambda *_: None))
        yield


def run_vae(case: VaeCase) -> dict[str, Any]:
    """One image through the VAE alone."""
    with torch.device("meta"):
        vae = sdxl_vae()
    encode = case.kind == "encode"
    stages = encoder_stages(vae) if encode else decoder_stages(vae)
    start = starts(stages)[case.start] if case.start >= 0 else 0
    count = 0 if case.start == 0 else patch_counts(case.kind, (case.size // 8) ** 2)[0]
    method = VaeStrategy(start, count, SDXL_KEYS, case.height, case.place)
    with (
        FakeCard(SCALARS) as card,
        patch.object(storage, "segments", lambda: case.segments),
    ):
        vae = as_fake(vae, torch.bfloat16).to(CUDA)
        facts = ModelFacts("sdxl", True, 1024, 8, 8, 4, 1024, True, {})
        planned_for = Machine(CUDA, torch.float16, torch.bfloat16, 512 << 30, 141 << 30, 0, H200, H200, case.segments)
        size = Size(case.size, case.size)
        need = CostEstimator(facts, MetaModel(nothing(), {}, vae), planned_for).vae(size, encode, "linear", method)
        card.reset()
        rows = 0
        for part in converted(case, vae, method, need.pinned_bytes):
            rows += part.shape[2] * 8 if encode else part.shape[0]
            del part
        gc.collect()
        stage = {"name": case.kind} | Watch(card).peaks() | {"plan": need.__dict__, "steps": []}
        return {"rows": rows, "stages": [stage], "left_pinned": card.pinned_bytes}


def converted(case: VaeCase, vae: AutoencoderKL, method: VaeStrategy, pinned: int) -> Iterator[torch.Tensor]:
    if case.kind == "decode":
        yield from decode_rows(vae, torch.zeros(1, 4, case.size // 8, case.size // 8), method, pinned=pinned)
        return

    def read(top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        return torch.zeros(1, 1, 3).expand(bottom - top, right - left, 3)

    yield from encode_rows(vae, read, Size(case.size, case.size), method, pinned=pinned)


def nothing() -> torch.nn.Module:
    """The UNet of a VAE that runs alone."""
    return torch.nn.Module()


def main(folder: Path, shared: Path, names: list[str]) -> None:
    guard.load_guard(shared / "guard")
    write_sdxl(folder / "sdxl")
    results = {}
    for case in (CASES[name] for name in names):
        began = time.perf_counter()
        try:
            results[case.name] = run_vae(case) if isinstance(case, VaeCase) else run(case, folder)
        except Exception:  # noqa: BLE001 - its test tells of it
            results[case.name] = {"error": traceback.format_exc()}
        results[case.name]["seconds"] = time.perf_counter() - began
        gc.collect()
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
