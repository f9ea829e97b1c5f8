"""The progress of a run: lines with timestamps in logs, bars on a terminal."""

import time
from datetime import datetime

from linfusion_cli.cli.output import progress
from linfusion_cli.core.events import Notice, Planned, StageAdvanced, StageFinished, StageStarted
from linfusion_cli.core.geometry import Size


def send_stage(observer, pause_sec: float = 0.0) -> None:
    """Send a notice and the events of one phase."""
    observer(Notice("mind the [gap] 😀"))
    observer(StageStarted("denoise", "4x", Size(1024, 512), 8, "steps"))
    observer(StageAdvanced(2))
    time.sleep(pause_sec)
    observer(StageFinished(65.0))


def strip_timestamps(lines: str) -> list[str]:
    """Return the texts of log lines; each must start with a current timestamp with an offset."""
    pairs = [line.split(" ", 1) for line in lines.splitlines()]
    for stamp, _ in pairs:
        moment = datetime.fromisoformat(stamp)
        assert stamp[10] == "T" and abs(datetime.now(moment.tzinfo) - moment).total_seconds() < 60
    return [text for _, text in pairs]


def test_a_log_has_a_line_per_phase_each_with_its_time(capsys):
    with progress.observe_run(quiet=False) as observer:
        send_stage(observer)
    assert strip_timestamps(capsys.readouterr().err) == [
        "linfusion: mind the [gap] 😀",
        "denoise 4x 1024x512: 1 min 05 s",
    ]


def test_preparation_is_one_line_and_very_short_stages_have_none(capsys):
    with progress.observe_run(quiet=False) as observer:
        for kind, phase_name, size, seconds, unit in (
            ("resolve", None, None, 3.0, "request"),
            ("load", None, None, 2.5, "models"),
            ("denoise", "base", Size(64, 64), 0.01, "steps"),
            ("decode", "base", Size(64, 64), 0.01, "rows"),
            ("encode_prompts", None, None, 0.02, "prompts"),
            ("start", "2x", Size(128, 64), 6.0, "rows"),
        ):
            observer(StageStarted(kind, phase_name, size, 1, unit))
            observer(StageFinished(seconds))
    lines = strip_timestamps(capsys.readouterr().err)
    assert lines == ["ready: 5.5 s", "denoise base 64x64: 0.0 s", "start 2x 128x64: 6.0 s"]


def test_a_log_is_never_silent_for_long(capsys, monkeypatch):
    monkeypatch.setattr(progress, "MAX_SILENCE_SEC", 1.5)
    with progress.observe_run(quiet=False) as observer:
        send_stage(observer, pause_sec=2.5)
    lines = capsys.readouterr().err.splitlines()
    assert "denoise 4x 1024x512: 2/8 steps" in lines[1] and lines[1].endswith(" left")


def test_quiet_keeps_notices(capsys):
    with progress.observe_run(quiet=True) as observer:
        send_stage(observer)
    assert strip_timestamps(capsys.readouterr().err) == ["linfusion: mind the [gap] 😀"]


def test_a_terminal_gets_bars(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.observe_run(quiet=False) as observer:
        send_stage(observer)
    err = capsys.readouterr().err
    assert "mind the [gap] 😀" in err and "denoise 4x 1024x512" in err and "8/8 steps" in err


def test_the_estimate_of_a_run_is_one_line(capsys):
    with progress.observe_run(quiet=False) as observer:
        observer(Planned(3725.0, 4 << 30, 17 << 30))
        observer(Planned(3.0, 1 << 30, None))
    with_gpu, without_gpu = strip_timestamps(capsys.readouterr().err)
    assert all(value in with_gpu for value in ("1 h 02 min", "4.0 GiB", "17.0 GiB of GPU memory"))
    assert all(value in without_gpu for value in ("3.0 s", "1.0 GiB")) and "GPU" not in without_gpu
    with progress.observe_run(quiet=True) as observer:
        observer(Planned(3.0, 1 << 30, None))
    assert capsys.readouterr().err == ""
