"""A time limit that is too short for any progress is an error that says what the run needs, not 75 forever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linfusion_cli.core.errors import Stopped, TimeLimitReached
from linfusion_cli.core.events import StageAdvanced, StageStarted
from linfusion_cli.core.geometry import Size
from linfusion_cli.run.decode_latents import build_decode_request, decode
from linfusion_cli.run.pipeline import generate
from linfusion_cli.run.progress.time_limit import format_limit
from tests.support.fakes import Listener
from tests.support.requests import make_request

LIMIT_SEC = 600.0


class StoppingListener(Listener):
    """An Observer that raises `stop` when a stage of this kind starts, or at its unit `done`."""

    def __init__(self, kind: str, done: int, stop: BaseException):
        super().__init__()
        self.kind, self.done, self.stop, self.current = kind, done, stop, ""

    def __call__(self, event) -> None:
        super().__call__(event)
        if isinstance(event, StageStarted):
            self.current = event.kind
        is_unit = isinstance(event, StageAdvanced) and event.done >= self.done
        if self.current == self.kind and (is_unit or not self.done):
            raise self.stop


@pytest.fixture
def values(xl_model, tmp_path, monkeypatch) -> dict:
    """The values of a small request with two phases, whose base takes two steps."""
    monkeypatch.chdir(tmp_path)
    common = {"prompt": "a hill", "model": str(xl_model), "upscaler": "demofusion", "strength": (0.9,)}
    return common | {"size": Size(128, 128), "steps": (2,), "output": tmp_path / "a.png"}


def stop_at(values: dict, kind: str, done: int = 0, stop: BaseException | None = None) -> BaseException:
    """Run until `kind`, and return what ended the run."""
    stop = stop or TimeLimitReached(LIMIT_SEC)
    with pytest.raises(Stopped) as caught:
        generate(make_request(**values), {}, StoppingListener(kind, done, stop))
    return caught.value


@pytest.mark.parametrize("kind", ["resolve", "plan", "load", "encode_prompts"])
def test_a_limit_shorter_than_loading_is_an_error_that_names_a_longer_one(values, kind):
    stop = stop_at(values, kind)
    assert stop.exit_code == 2
    assert str(stop).startswith("--time-limit 10m is too short: the run made no progress")
    assert "still preparing and loading" in str(stop) and "Use at least 20m." in str(stop)


def test_a_limit_that_ends_in_the_first_step_names_the_time_of_loading_and_of_a_step(values):
    stop = stop_at(values, "denoise")
    assert stop.exit_code == 2 and "Loading takes 10 min 00 s, and a step about" in str(stop)
    assert int(str(stop).split("Use at least ")[1].removesuffix("m.")) >= 12


def test_with_a_finished_step_the_exit_code_is_75_and_the_same_command_resumes(values):
    stop = stop_at(values, "denoise", done=1)
    assert stop.exit_code == 75 and "Saved: step 1 of 2" in str(stop)


def test_the_same_limit_again_without_another_step_is_an_error(values):
    stop_at(values, "denoise", done=1)
    stop = stop_at(values, "load")
    assert stop.exit_code == 2 and "too short" in str(stop)
    assert generate(make_request(**values), {}).resumed_from is not None


def test_a_limit_that_only_the_decoding_exceeds_is_an_error_from_the_second_time_on(values):
    assert stop_at(values, "write").exit_code == 75  # the steps are done
    stop = stop_at(values, "decode", done=1)
    assert stop.exit_code == 2 and "decoding the image about" in str(stop)


def test_signals_keep_their_exit_code(values):
    assert stop_at(values, "load", stop=Stopped(15)).exit_code == 143


def test_decode_cannot_resume_and_names_its_time(values, tmp_path):
    from linfusion_cli.run.checkpoint.latents_file import open_latents

    latents = tmp_path / "a.safetensors"
    generate(make_request(**values, keep_latents=latents), {})
    saved = open_latents(latents)
    _, request = build_decode_request(saved, {"output": str(tmp_path / "b.png")})
    with pytest.raises(TimeLimitReached) as caught:
        decode(saved, request, {}, StoppingListener("decode", 1, TimeLimitReached(LIMIT_SEC)))
    assert caught.value.exit_code == 2 and "decoding the image about" in str(caught.value)


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1s"), (90, "90s"), (120, "2m"), (121, "3m"), (7200, "120m")])
def test_limits_are_written_as_the_option_takes_them_and_rounded_up(seconds, text):
    assert format_limit(seconds) == text


@pytest.mark.parametrize(("first_job", "code"), [("a hill", 75), ("stops", 2)])
def test_a_batch_with_a_complete_image_has_made_progress(cli, tmp_path, monkeypatch, first_job, code):
    from linfusion_cli.batch import runner

    execute = runner.run_job

    def run_job(request, *arguments):
        if request.prompt == "stops":
            stop = TimeLimitReached(LIMIT_SEC)
            stop.shortfall = "--time-limit 10m is too short."
            raise stop
        return execute(request, *arguments)

    monkeypatch.setattr(runner, "run_job", run_job)
    jobs = [{"prompt": first_job}, {"prompt": "stops"}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    options = ("--preset", "demo", "--size", 64, "--steps", 1, "--device", "cpu", "--time-limit", "10m")
    found, _, err = cli("batch", "jobs.jsonl", "--output-dir", "out", *options)
    assert found == code and ("too short" in err) == (code == 2)


def test_a_real_limit_of_a_second_ends_with_2_and_leaves_no_file(tmp_path):
    command = [sys.executable, "-m", "linfusion_cli", "generate", "a hill", "--preset", "demo", "--size", "64"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    limited = [*command, "--device", "cpu", "--time-limit", "1s", "-o", tmp_path / "a.png"]
    done = subprocess.run(limited, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--time-limit 1s is too short" in done.stderr
    assert not list(tmp_path.glob("a.png*"))
