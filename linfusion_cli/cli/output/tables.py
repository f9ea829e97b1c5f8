"""Format tables as plain text."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

MAX_COLUMNS = 120


def build_table(*headings: str) -> Table:
    """Return an empty table without borders."""
    return Table(*headings, box=None, pad_edge=False)


def format_table(table: Table, max_columns: int = MAX_COLUMNS) -> str:
    """Return the table as text of at most `max_columns` columns, independent of the terminal."""
    text = io.StringIO()
    Console(file=text, width=max_columns, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
