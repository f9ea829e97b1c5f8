"""Runs with SDXL's real shapes on a FakeCard, in a separate process: planned and counted resources.

    python -m tests.fake_card.pipeline FOLDER SHARED NAME …      prints a JSON object: name -> stages, or the error

FOLDER is for the model files, SHARED for the compiled guard, which is built once.
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

driver.install(TOTAL_BYTES)  # before modules of the package import functions of torch

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
from linfusion_cli.planning.vae_strategies import list_patch_counts
from linfusion_cli.run import pipeline
from linfusion_cli.run.stages import write
from linfusion_cli.settings.request import Request
from linfusion_cli.strips import storage
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import encode_rows
from linfusion_cli.vae.stages import build_decoder_stages, build_encoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, find_stream_starts
from tests.fake_card.device.card import FakeCard
from tests.fake_card.device.stubs import Checkpoints, CountingSink, make_fake, stub_files
from tests.fake_card.device.tensor import CUDA
from tests.fake_card.model import write_sdxl
from tests.support.requests import make_request
from tools.bench.shapes import SDXL_KEYS, build_sdxl_vae

# Sites at which single values can be read from the card, and the values that are returned.
SCALARS = {
    "sampling/schedulers/schedule.py:step": True,
    "run/checkpoint/state.py:<genexpr>": True,
    "run/checkpoint/state.py:is_finite": True,
}
H200 = Speed(4e14, 1e12)


class CountRecorder:
    """An observer that records the counts of the card by stage and step."""

    def __init__(self, card: FakeCard, stops_at: str | None = None):
        self.card, self.stages, self.notices, self._stops_at = card, [], [], stops_at
        self._stage: dict[str, Any] = {}

    def __call__(self, event: Any) -> None:
        match event:
            case Notice(text):
                self.notices.append(text)
            case StageStarted(kind=kind, phase_name=phase_name, size=size):
                self._stage = {"kind": kind, "phase_name": phase_name, "size": str(size), "steps": [self._count_step()]}
            case StageAdvanced():
                self._stage["steps"].append(self._count_step())
                if (self._stage["kind"], self._stage["phase_name"]) == ("denoise", self._stops_at):
                    raise Stopped(signal.SIGTERM)
            case StageFinished():
                self.stages.append(self._stage | self.read_counts())

    def _count_step(self) -> dict[str, int]:
        """Return the current counts of events that should be rare within a step."""
        counts = self.card.counts
        sums = {"syncs": counts.syncs, "blocking": counts.blocking}
        return {"kernels": counts.kernels} | {name: sum(found.values()) for name, found in sums.items()}

    def read_counts(self) -> dict[str, Any]:
        """Return the counts and memory peaks of the card."""
        card = self.card
        peaks = {"reserved": card.expandable.peak_reserved, "allocated": card.expandable.peak_allocated}
        return card.counts.to_json() | peaks | {"native": card.native.peak_reserved, "pinned": card.peak_pinned}


def execute_case(case: Case, folder: Path) -> dict[str, Any]:
    """Execute a case: one run, or two, of which the second resumes the first -> its planned and counted stages."""
    checkpoints = Checkpoints()
    if case.stops_at:
        with suppress(Stopped):
            execute_run(case, folder, checkpoints, case.stops_at)
    return execute_run(case, folder, checkpoints)


def execute_run(case: Case, folder: Path, checkpoints: Checkpoints, stops_at: str | None = None) -> dict[str, Any]:
    """Execute one run, and stop it after the first step of the phase `stops_at`."""
    with FakeCard(SCALARS) as card:
        card.fails = list(case.fails)
        sink, recorder = CountingSink(), CountRecorder(card, stops_at)
        with stub_files(checkpoints, sink), restrict_plans(case):
            report = pipeline.run_pipeline(build_request(case, folder), None, {}, recorder)
        result = {"rows": sink.rows, "complete": sink.is_complete, "notices": recorder.notices, "fails": card.fails}
        result |= {"resumed": report.resumed_from, "left_pinned": card.pinned_bytes}
        return result | {"stages": [stage | find_plan(stage, report.plan) for stage in recorder.stages]}


def find_plan(stage: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan of a stage, empty if it has none."""
    found = [
        each for each in planned["stages"] if all(each[key] == stage[key] for key in ("kind", "phase_name", "size"))
    ]
    if not found:
        return {}
    return {"plan": found[0]["estimate"] | {"strategy": found[0]["strategy"], "steps": found[0]["steps"]}}


def build_request(case: Case, folder: Path) -> Request:
    """Build the request of a case."""
    model = folder / "sdxl"
    extras: dict[str, Any] = {}
    if "lora" in case.extras:
        extras["lora"] = (str(model / "lora.safetensors"),)
    if "controlnet" in case.extras:
        extras |= {"controlnet": (str(model / "controlnet"),), "control_image": (str(model / "image.png"),)}
        extras["control_phases"] = ("all",)
    if "ip_adapter" in case.extras:
        extras |= {"ip_adapter": (str(model / "adapter" / "ip.safetensors"),), "ip_image": (str(model / "image.png"),)}
    return make_request(
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
def restrict_plans(case: Case) -> Iterator[None]:
    """Restrict plans to the strategies of the case."""

    def list_matching(*args: Any, **kwargs: Any) -> list[Any]:
        strategies = [each for each in list_strategies(*args, **kwargs) if case.place in (None, each.place)]
        return [each for each in strategies if case.batched in (None, each.batched)] or strategies

    list_strategies = plan.list_denoise_strategies
    with ExitStack() as stack:
        stack.enter_context(patch.object(plan, "list_denoise_strategies", list_matching))
        stack.enter_context(patch.object(machine, "measure_speed", lambda device, dtype: H200))
        for module in (machine, storage):
            stack.enter_context(patch.object(module, "detect_segments", lambda: case.segments))
        if not case.decodes:
            stack.enter_context(patch.object(write, "write_output", lambda *_: None))
        yield


def run_vae(case: VaeCase) -> dict[str, Any]:
    """Encode or decode one image with the VAE alone."""
    with torch.device("meta"):
        vae = build_sdxl_vae()
    encode = case.kind == "encode"
    stages = build_encoder_stages(vae) if encode else build_decoder_stages(vae)
    start = find_stream_starts(stages)[case.start] if case.start >= 0 else 0
    count = 0 if case.start == 0 else list_patch_counts("start" if encode else "decode", (case.size // 8) ** 2)[0]
    method = VaeStrategy(start, count, SDXL_KEYS, case.height, case.place)
    with (
        FakeCard(SCALARS) as card,
        patch.object(storage, "detect_segments", lambda: case.segments),
    ):
        vae = make_fake(vae, torch.bfloat16).to(CUDA)
        facts = ModelFacts("sdxl", True, 1024, 8, 8, 4, 1024, True, {})
        planned_for = Machine(CUDA, torch.float16, torch.bfloat16, 512 << 30, 141 << 30, 0, H200, H200, case.segments)
        size = Size(case.size, case.size)
        need = CostEstimator(facts, MetaModel(empty_unet(), {}, vae), planned_for).estimate_conversion(
            size, encode, "linear", method
        )
        card.reset()
        rows = 0
        for part in convert_rows(case, vae, method, need.pinned_bytes):
            rows += part.shape[2] * 8 if encode else part.shape[0]
            del part
        gc.collect()
        stage = {"name": case.kind} | CountRecorder(card).read_counts() | {"plan": need.__dict__, "steps": []}
        return {"rows": rows, "stages": [stage], "left_pinned": card.pinned_bytes}


def convert_rows(case: VaeCase, vae: AutoencoderKL, method: VaeStrategy, pinned: int) -> Iterator[torch.Tensor]:
    if case.kind == "decode":
        yield from decode_rows(vae, torch.zeros(1, 4, case.size // 8, case.size // 8), method, pinned_bytes=pinned)
        return

    def read(top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        return torch.zeros(1, 1, 3).expand(bottom - top, right - left, 3)

    yield from encode_rows(vae, read, Size(case.size, case.size), method, pinned_bytes=pinned)


def empty_unet() -> torch.nn.Module:
    """Return a UNet without layers, for a VAE that runs alone."""
    return torch.nn.Module()


def main(folder: Path, shared: Path, names: list[str]) -> None:
    guard.load_guard(shared / "guard")
    write_sdxl(folder / "sdxl")
    results = {}
    for case in (CASES[name] for name in names):
        started = time.perf_counter()
        try:
            results[case.name] = run_vae(case) if isinstance(case, VaeCase) else execute_case(case, folder)
        except Exception:  # noqa: BLE001 - reported by the test of the case
            results[case.name] = {"error": traceback.format_exc()}
        results[case.name]["seconds"] = time.perf_counter() - started
        gc.collect()
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
