"""Shared fixtures. Small models are written once per session; no test uses the network or this machine's caches."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread per process, set before torch and numpy are imported: more threads only slow down work on tensors this
# small, and `make test` runs one process per core.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# nohup, and scripts that run this in the background, ignore these signals. The processes under test would inherit that,
# and the tests would wait for them forever.
for ignored, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, handler)


@pytest.fixture(scope="session")
def xl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small SDXL model in diffusers' layout."""
    from tests.support.small_models import write_small_xl

    return write_small_xl(tmp_path_factory.mktemp("models") / "xl")


@pytest.fixture(scope="session")
def sd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small SD 1.5 model in diffusers' layout."""
    from tests.support.small_models import write_small_sd

    return write_small_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Return a function that runs the program in tmp_path and returns (exit code, stdout, stderr)."""
    from linfusion_cli.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["linfusion", *map(str, arguments)])
        code = app.run_app()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list:
    """Collect the initial and the final RunState of each phase."""
    from linfusion_cli.run.stages import denoise

    states, real = [], denoise.denoise_phase

    def spy(run, models, state, phase):
        final = real(run, models, state, phase)
        states.append((state, final))
        return final

    monkeypatch.setattr(denoise, "denoise_phase", spy)
    return states


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hide this machine's settings, config file, batch system limits and cached models from the tests."""
    for name in [name for name in os.environ if name.startswith(("LINFUSION_", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
