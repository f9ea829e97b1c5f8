"""Half precision on the CPU, enabled by a developer switch: tests of the GPU code path without a GPU."""

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
from linfusion_cli.unet import predict
from tests.support.fakes import Listener
from tests.support.requests import make_request


@pytest.fixture(autouse=True)
def half_on_the_cpu(monkeypatch, clean_environment):
    monkeypatch.setenv("LINFUSION_CPU_HALF", "1")


@dataclass
class RunResult:
    """The report, the events and the latents of a run."""

    report: RunReport
    listener: Listener
    latents: Tensor


@pytest.fixture
def make(xl_model, tmp_path, monkeypatch):
    """Return a function that runs a small request in tmp_path: four steps in the base phase and three in the next."""
    monkeypatch.chdir(tmp_path)

    def run(observer=None, model_cache=None, **changes) -> RunResult:
        values = {"prompt": "a hill", "size": Size(128, 128), "model": str(xl_model), "steps": (4,)}
        values |= {"strength": (0.7,), "upscaler": "sdedit", "guidance_scale": (1.0,), "device": "cpu"}
        values |= {"output": Path("a.png"), "keep_latents": Path("a.safetensors"), "checkpoint_every": 3600.0}
        request, listener = make_request(**values | {"dtype": "float16"} | changes), Listener()
        report = run_pipeline(request, None, {}, observer or listener, model_cache)
        return RunResult(report, listener, open_latents(request.execution.keep_latents).read())

    return run


@pytest.fixture
def clear(tmp_path):
    """Return a function that removes the files of all runs."""

    def run() -> None:
        for path in tmp_path.iterdir():
            if path.is_file():
                path.unlink()

    return run


@dataclass
class ForwardSpy:
    """Records the dtype of each forward pass of the UNet, and makes some of them return `value`.

    `bad` maps (rows of latents, step) to the dtypes in which this pass returns `value`.
    """

    dtypes: list[str] = field(default_factory=list)
    bad: dict[tuple[int, int], Collection[str]] = field(default_factory=dict)
    value: float = math.nan
    _timesteps: dict[int, list[float]] = field(default_factory=dict)

    def record(self, latents: Tensor, timestep: Tensor, prediction: Tensor) -> Tensor:
        """Record a forward pass and return its prediction, or a bad one."""
        dtype, timesteps = dtype_name(latents.dtype), self._timesteps.setdefault(latents.shape[-2], [])
        self.dtypes.append(dtype)
        if float(timestep) not in timesteps:
            timesteps.append(float(timestep))
        step = latents.shape[-2], timesteps.index(float(timestep))
        if dtype not in self.bad.get(step, ()):
            return prediction
        prediction = prediction.clone()
        prediction[0, 1, 2, 3] = self.value
        return prediction


@pytest.fixture
def forwards(monkeypatch) -> ForwardSpy:
    """Spy on all forward passes; steps are numbered by timestep, also in later runs of a test."""
    spy = ForwardSpy()

    def wrap(forward):
        return lambda self, *inputs: spy.record(*inputs[:2], forward(self, *inputs))

    for kind in (predict.WholeUNet, predict.StripUNet):
        monkeypatch.setattr(kind, "_forward", wrap(kind._forward))
    return spy
