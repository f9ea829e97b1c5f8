"""Small models are written once for all tests; nothing may reach the network, nor this machine's caches."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread per process, set before torch and numpy are imported: on tensors this small more threads only cost time,
# and `make test` runs one process per core.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# Under nohup or in the background of a script these are ignored. The processes under test would inherit that, and the
# tests would wait for ever.
for ignored, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, handler)


@pytest.fixture(scope="session")
def xl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.small_models import write_small_xl

    return write_small_xl(tmp_path_factory.mktemp("models") / "xl")


@pytest.fixture(scope="session")
def sd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.small_models import write_small_sd

    return write_small_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run the program in tmp_path -> (exit code, stdout, stderr)."""
    from linfusion_cli.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["linfusion", *map(str, arguments)])
        code = app.guarded()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list:
    """What each phase that ran began with, and what it ended with: two `Reached`."""
    from linfusion_cli.run.stages import denoise

    seen, denoised = [], denoise.run_phase

    def spy(run, models, reached, phase):
        result = denoised(run, models, reached, phase)
        seen.append((reached, result))
        return result

    monkeypatch.setattr(denoise, "run_phase", spy)
    return seen


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings, no config file, no limits of a batch system and no cached models but those a test makes."""
    for name in [name for name in os.environ if name.startswith(("LINFUSION_", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
