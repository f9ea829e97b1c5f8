"""Format tables as plain text, with one line per row; for narrow terminals texts are shortened and columns dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size

from linfusion_cli.cli.output.log_file import escape_controls

GAP = "  "


class ShortenedCell(NamedTuple):
    """A cell with a second, shorter text for narrow terminals."""

    full: str
    short: str


Cell = str | ShortenedCell


class Column(NamedTuple):
    """A column of a table. Where the table is too wide, the column with the largest `drop_order` is dropped first.

    A column with `min_width` can be cut to this width; a column without is never cut, because it has numbers.
    """

    heading: str
    drop_order: int = 0
    min_width: int | None = None
    is_right_aligned: bool = False


@dataclass
class Table:
    """A table without borders; all rows have a cell for each column."""

    columns: Sequence[Column]
    rows: list[list[Cell]] = field(default_factory=list)

    def add_row(self, *cells: Cell) -> None:
        """Append a row; missing cells at its end are empty."""
        self.rows.append([*cells, *[""] * (len(self.columns) - len(cells))])


class _Texts(NamedTuple):
    """A column with the texts of its cells."""

    column: Column
    texts: list[str]

    @property
    def width(self) -> int:
        return max(map(cell_len, [self.column.heading, *self.texts]))

    @property
    def min_width(self) -> int:
        """Width below which the column must be dropped."""
        return self.width if self.column.min_width is None else min(self.width, self.column.min_width)


def build_table(*headings: str) -> Table:
    """Return an empty table of texts, for which no width may be given."""
    return Table([Column(heading) for heading in headings])


def format_table(table: Table, width: int | None = None) -> str:
    """Return the table with one line per row, each of at most `width` terminal columns.

    Without a width, all columns are complete. With one, columns without any value are omitted.
    """
    if width is None:
        return _join(_read_columns(table, is_short=False))
    full, short = ([each for each in _read_columns(table, is_short) if any(each.texts)] for is_short in (False, True))
    return _join(full if _measure(full) <= width else _fit(short, width))


def wrap_cells(cells: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """Return a row as one or more rows, with its cells wrapped at `widths` terminal columns."""
    from rich.console import Console  # slow to import, not needed for --help
    from rich.text import Text

    console = Console(width=max(widths))
    wrapped = [
        [line.plain for line in Text(text, overflow="fold").wrap(console, width)]
        for text, width in zip(cells, widths, strict=True)
    ]
    return [list(row) for row in zip_longest(*wrapped, fillvalue="")]


def _read_columns(table: Table, is_short: bool) -> list[_Texts]:
    """Return the columns of a table, with control characters escaped."""
    return [
        _Texts(column, [escape_controls(_choose_text(row[index], is_short)) for row in table.rows])
        for index, column in enumerate(table.columns)
    ]


def _choose_text(cell: Cell, is_short: bool) -> str:
    if isinstance(cell, str):
        return cell
    return cell.short if is_short else cell.full


def _measure(columns: Sequence[_Texts]) -> int:
    return sum(each.width for each in columns) + len(GAP) * (len(columns) - 1)


def _fit(columns: list[_Texts], width: int) -> list[_Texts]:
    """Drop columns that do not fit even if others are cut, then cut texts from the last column on."""
    while len(columns) > 1 and sum(each.min_width + len(GAP) for each in columns) - len(GAP) > width:
        columns.remove(max(columns, key=lambda each: each.column.drop_order))
    for index in reversed(range(len(columns))):
        excess, each = _measure(columns) - width, columns[index]
        if excess > 0 and each.min_width < each.width:
            columns[index] = _cut(each, max(each.min_width, each.width - excess))
    return columns


def _cut(each: _Texts, width: int) -> _Texts:
    column = each.column._replace(heading=cut_text(each.column.heading, width))
    return _Texts(column, [cut_text(text, width) for text in each.texts])


def cut_text(text: str, width: int) -> str:
    """Return the text cut to `width` terminal columns, with an ellipsis at its end if it is longer."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, max(0, width - 1))}…"


def _join(columns: Sequence[_Texts]) -> str:
    lines = zip(*map(_align, columns), strict=True)
    return "\n".join(GAP.join(line).rstrip() for line in lines)


def _align(each: _Texts) -> list[str]:
    padded = [(text, " " * (each.width - cell_len(text))) for text in [each.column.heading, *each.texts]]
    return [space + text if each.column.is_right_aligned else text + space for text, space in padded]
