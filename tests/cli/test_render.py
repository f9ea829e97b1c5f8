import time

from linfusion_cli.cli import render
from linfusion_cli.events import Notice, Planned, StageAdvanced, StageFinished, StageStarted
from linfusion_cli.geometry import Size
from linfusion_cli.report import RunReport, StageReport


def run_stage(observer, pause: float = 0.0) -> None:
    observer(Notice("mind the [gap] 😀"))
    observer(StageStarted("4x", Size(1024, 512), 8, "steps"))
    observer(StageAdvanced(2))
    time.sleep(pause)
    observer(StageFinished(65.0))


def test_a_log_has_a_line_per_stage(capsys):
    with render.watching(quiet=False) as observer:
        run_stage(observer)
    assert capsys.readouterr().err.splitlines() == ["linfusion: mind the [gap] 😀", "4x 1024x512: 1 min 05 s"]


def test_a_log_is_never_silent_for_long(capsys, monkeypatch):
    monkeypatch.setattr(render, "QUIET_SEC", 1.5)
    with render.watching(quiet=False) as observer:
        run_stage(observer, pause=2.5)
    lines = capsys.readouterr().err.splitlines()
    assert "4x 1024x512: 2/8 steps" in lines[1] and lines[1].endswith(" left")


def test_quiet_keeps_notices(capsys):
    with render.watching(quiet=True) as observer:
        run_stage(observer)
    assert capsys.readouterr().err == "linfusion: mind the [gap] 😀\n"


def test_a_terminal_gets_bars(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with render.watching(quiet=False) as observer:
        run_stage(observer)
    err = capsys.readouterr().err
    assert "mind the [gap] 😀" in err and "4x 1024x512" in err and "8/8 steps" in err


def test_what_a_run_will_take_is_said_in_one_line(capsys):
    with render.watching(quiet=False) as observer:
        observer(Planned(3725.0, 4 << 30, 17 << 30))
        observer(Planned(3.0, 1 << 30, None))
    err = capsys.readouterr().err
    assert "expected: about 1 h 02 min, 4.0 GiB of memory and 17.0 GiB of the GPU's\n" in err
    assert "expected: about 3.0 s, 1.0 GiB of memory\n" in err
    with render.watching(quiet=True) as observer:
        observer(Planned(3.0, 1 << 30, None))
    assert capsys.readouterr().err == ""


def test_the_table_shows_what_was_measured(capsys):
    report = RunReport({}, {}, {}, {}, size=Size(64, 64), format="png", file_bytes=2048, total_seconds=100.0)
    report.stages = [StageReport("base", "denoise", Size(64, 64), 10.0, 20, 3 << 30, 1 << 30)]
    render.show_report(report)
    err = capsys.readouterr().err
    for text in ("base", "64x64", "2.00", "3.0 GiB", "1.0 GiB", "1 min 40 s", "2.0 KiB"):
        assert text in err
