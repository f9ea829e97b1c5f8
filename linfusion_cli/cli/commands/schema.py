"""`linfusion schema job|preset|report`: print a JSON Schema, for editors and for programs that write or read these."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from linfusion_cli.cli.output.streams import emit_result
from linfusion_cli.cli.parsing.completion import select_matches
from linfusion_cli.core.errors import UsageError
from linfusion_cli.settings.json_schema import SCHEMAS

EXAMPLES = """
linfusion schema job > job.schema.json
"""


def command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="|".join(SCHEMAS),
            help="job (a line of a job list), preset (a preset file), or report (the report of a run).",
            autocompletion=lambda incomplete: select_matches(SCHEMAS, incomplete),
        ),
    ],
) -> None:
    """Print the JSON Schema of a job, a preset or a report."""
    if name not in SCHEMAS:
        raise UsageError(f"There is no schema {name!r}.", f"Use one of {', '.join(SCHEMAS)}.")
    emit_result(json.dumps(SCHEMAS[name](), indent=2, ensure_ascii=False))
