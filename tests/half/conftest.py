"""Half precision on the CPU, with the switch that is for developers alone: what a card would do, where none is."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import Tensor

from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import RunReport
from linfusion_cli.hardware.device import dtype_name
from linfusion_cli.run.checkpoint.latents_file import open_latents
from linfusion_cli.run.pipeline import run_pipeline
from linfusion_cli.settings.request import GenerateRequest
from linfusion_cli.unet import predict
from tests.support.fakes import Listener


@pytest.fixture(autouse=True)
def half_on_the_cpu(monkeypatch, clean_environment):
    monkeypatch.setenv("LINFUSION_CPU_HALF", "1")


@dataclass
class Made:
    """What a run has made: its report, what it said, and its latents."""

    report: RunReport
    listener: Listener
    latents: Tensor


@pytest.fixture
def make(xl_model, tmp_path, monkeypatch):
    """Run a small request in tmp_path, of two phases: four steps in the base, and three above it."""
    monkeypatch.chdir(tmp_path)

    def run(observer=None, model_cache=None, **changed) -> Made:
        values = {"prompt": "a hill", "size": Size(128, 128), "model": str(xl_model), "steps": (4,)}
        values |= {"strength": (0.7,), "upscaler": "sdedit", "guidance_scale": (1.0,), "device": "cpu"}
        values |= {"output": Path("a.png"), "keep_latents": Path("a.safetensors"), "checkpoint_every": 3600.0}
        request, listener = GenerateRequest(**values | {"dtype": "float16"} | changed), Listener()
        report = run_pipeline(request, None, {}, observer or listener, model_cache)
        return Made(report, listener, open_latents(request.keep_latents).read())

    return run


@pytest.fixture
def clear(tmp_path):
    """Remove all files that runs have made."""

    def run() -> None:
        for path in tmp_path.iterdir():
            if path.is_file():
                path.unlink()

    return run


@dataclass
class Forwards:
    """The UNet's forwards: the dtype of each, and those that give `value`, by rows of latents, step and dtypes."""

    dtypes: list[str] = field(default_factory=list)
    bad: dict[tuple[int, int], Collection[str]] = field(default_factory=dict)
    value: float = math.nan
    _timesteps: dict[int, list[float]] = field(default_factory=dict)

    def seen(self, latents: Tensor, timestep: Tensor, prediction: Tensor) -> Tensor:
        dtype, of_phase = dtype_name(latents.dtype), self._timesteps.setdefault(latents.shape[-2], [])
        self.dtypes.append(dtype)
        if float(timestep) not in of_phase:
            of_phase.append(float(timestep))
        place = latents.shape[-2], of_phase.index(float(timestep))
        if dtype not in self.bad.get(place, ()):
            return prediction
        prediction = prediction.clone()
        prediction[0, 1, 2, 3] = self.value
        return prediction


@pytest.fixture
def forwards(monkeypatch) -> Forwards:
    """A step is told by its timestep: the first that a phase has is 0, also in later runs of a test."""
    found = Forwards()

    def watched(forward):
        return lambda self, *inputs: found.seen(*inputs[:2], forward(self, *inputs))

    for kind in (predict.WholeUNet, predict.StripUNet):
        monkeypatch.setattr(kind, "_forward", watched(kind._forward))
    return found
