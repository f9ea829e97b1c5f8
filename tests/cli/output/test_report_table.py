"""The report at the end of a run: a table on a terminal, one line elsewhere."""

import pytest

from linfusion_cli.cli.output import report_table
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import RunReport, StageReport
from tests.cli.output.test_progress import strip_timestamps


@pytest.fixture
def report():
    report = RunReport({}, {}, {}, {}, {}, size=Size(64, 64), format="png", file_bytes=2048, total_seconds=100.0)
    report.output = "a\nb.png"
    report.stages = [StageReport("denoise", "base", Size(64, 64), 10.0, 20, 3 << 30, 1 << 30)]
    return report


def test_a_terminal_gets_a_table_of_measurements(capsys, monkeypatch, report):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    report_table.show_report(report, quiet=False)
    err = capsys.readouterr().err
    for text in ("denoise base", "64x64", "2.00", "3.0 GiB", "1.0 GiB", "1 min 40 s", "2.0 KiB"):
        assert text in err


def test_other_streams_get_one_line(capsys, report):
    report_table.show_report(report, quiet=False)
    (line,) = strip_timestamps(capsys.readouterr().err)
    assert line.startswith("complete: a\\nb.png, 2.0 KiB in 1 min 40 s")
    assert "3.0 GiB of host memory" in line and "1.0 GiB of GPU memory" in line
    report_table.show_report(report, quiet=True)
    assert capsys.readouterr().err == ""
