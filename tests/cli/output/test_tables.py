"""Tables fit into any width with one line per row, and show texts literally."""

import pytest
from rich.cells import cell_len

from linfusion_cli.cli.output.plan_table import wrap_settings
from linfusion_cli.cli.output.report_table import format_report
from linfusion_cli.cli.output.tables import (
    Column,
    ShortenedCell,
    Table,
    build_table,
    cut_text,
    format_table,
    wrap_cells,
)
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import RunReport, StageReport

WIDTHS = (30, 50, 80, 110, 200)
TIB = 1 << 40


@pytest.fixture
def report():
    """Report of a run with the longest values: hours, TiB, and a long phase name."""
    stages = [
        StageReport("denoise", phase, Size(131072, 131072), 360000.0, 1000, TIB * 9, TIB * 9, 360000.0, TIB, TIB)
        for phase in ("base", "1024x", "a phase with a long name")
    ]
    report = RunReport({}, {}, {}, {}, {}, size=Size(131072, 131072), format="tiff", file_bytes=TIB)
    report.stages, report.total_seconds = stages, 7200000.0
    return report


def build_wide_table() -> Table:
    columns = (
        Column("stage", min_width=8),
        Column("size", drop_order=2),
        Column("steps", drop_order=1),
        Column("empty", drop_order=1),
        Column("time", is_right_aligned=True),
    )
    table = Table(columns)
    table.add_row("denoise 2x", "2048x2048", ShortenedCell("16, 12 dilated", "16"), "", "2 h 02 min")
    table.add_row("total", "", "", "", "99 h 59 min")
    return table


@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_has_one_line_per_row(report, width):
    lines = format_report(report, width).splitlines()
    assert len(lines) == 1 + len(report.stages) + 1 + 1
    assert all(cell_len(line) <= width for line in lines)
    (total,) = (line for line in lines if line.startswith("total"))
    assert "2000 h 00 min" in total and ("9.0 TiB" in total or width == 30)
    assert all("100 h 00 min" in line for line in lines[1:4]) and "1.0 TiB" in lines[-1]


def test_a_wider_report_has_more_columns(report):
    headings = [format_report(report, width).splitlines()[0].split() for width in WIDTHS]
    assert all(set(narrow) <= set(wide) for narrow, wide in zip(headings, headings[1:], strict=False))
    assert {"GPU", "host", "time"} <= set(headings[1]) and headings[-1].count("planned") == 3


def test_columns_without_values_are_omitted(report):
    for stage in report.stages:
        object.__setattr__(stage, "peak_device_bytes", None)
        object.__setattr__(stage, "planned_device_bytes", None)
    assert "GPU" not in format_report(report, 200)


def test_short_texts_precede_dropped_columns():
    table = build_wide_table()
    assert "16, 12 dilated" in format_table(table, 50)
    short = format_table(table, 49)
    assert "dilated" not in short and "steps" in short and "2048x2048" in short
    narrow = format_table(table, 36)
    assert "size" not in narrow and "steps" in narrow
    cut = format_table(table, 21)
    assert cut.splitlines()[:2] == ["stage            time", "denoise…   2 h 02 min"]


def test_a_table_without_a_width_is_complete():
    lines = format_table(build_wide_table()).splitlines()
    assert lines[0].split() == ["stage", "size", "steps", "empty", "time"] and "16, 12 dilated" in lines[1]


@pytest.mark.parametrize("width", [None, 80])
def test_markup_and_emoji_codes_are_text(width):
    table = build_table("file", "size")
    table.add_row("[red]a lake[/red] :fire: [a lake].png", "[/]")
    assert "[red]a lake[/red] :fire: [a lake].png" in format_table(table, width) and "[/]" in format_table(table, width)


def test_control_characters_do_not_break_a_row():
    table = build_table("file", "size")
    table.add_row("a\nb\x1b[31m.png", "1 B")
    assert format_table(table).splitlines()[1] == "a\\nb\\x1b[31m.png  1 B"


def test_wide_characters_take_two_columns():
    assert cut_text("日本語の湖", 7) == "日本語…"
    table = build_table("name", "size")
    table.add_row("日本", "1 B")
    assert format_table(table).splitlines() == ["name  size", "日本  1 B"]


def test_wrapped_cells_keep_all_text():
    rows = wrap_cells(["prompt", "a lake in the [mist] with-a-very-long-word-in-it", "flag"], [6, 12, 7])
    assert [row[0] for row in rows][:2] == ["prompt", ""] and all(len(row[1]) <= 12 for row in rows)
    assert "".join(row[1] for row in rows).replace(" ", "") == "alakeinthe[mist]with-a-very-long-word-in-it"


@pytest.mark.parametrize("width", WIDTHS)
def test_settings_fit(width):
    prompt = '"' + "a long prompt with [brackets] " * 20 + '"'
    rows = [["guidance_interval", prompt, "job file /a/long/folder/name/jobs.jsonl"], ["seed", "0", "default"]]
    table = build_table("setting", "value", "from")
    for row in wrap_settings(rows, width):
        table.add_row(*row)
    lines = format_table(table, width).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).count("[") >= 20 and any(line.split()[:2] == ["seed", "0"] for line in lines)
