"""`linfusion models list|pull|check`: list, download and validate models."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linfusion_cli.cli.output.streams import echo, emit_result
from linfusion_cli.cli.output.tables import Table, build_table, format_table
from linfusion_cli.cli.parsing.build_request import configure_hub
from linfusion_cli.cli.parsing.completion import complete_model, complete_preset
from linfusion_cli.cli.parsing.help import HelpCommand
from linfusion_cli.core.units import format_bytes

if TYPE_CHECKING:
    from linfusion_cli.models.inspect.check import CheckResult

app = typer.Typer(help="List, download and validate models.", rich_markup_mode=None)

LIST_SCHEMA, CHECK_SCHEMA = 1, 1  # of the JSON of `models list` and `models check`
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(cls=HelpCommand, name="list")
def list_models(as_json: Json = False) -> None:
    """List the embedded model and those in the Hugging Face cache."""
    configure_hub(download=False, quiet=True)
    from linfusion_cli.models.inspect.inventory import list_local_models

    entries = [asdict(entry) | {"path": str(entry.path)} for entry in list_local_models()]
    if as_json:
        emit_result(json.dumps({"schema": LIST_SCHEMA, "models": entries}, indent=2))
    else:
        emit_result(format_table(build_model_table(entries)))


def build_model_table(entries: list[dict[str, Any]]) -> Table:
    """Return a table with a row per model."""
    table = build_table("model", "type", "size", "revision", "path")
    for entry in entries:
        table.add_row(entry["name"], entry["what"], format_bytes(entry["bytes"]), entry["revision"][:12], entry["path"])
    return table


@app.command(cls=HelpCommand, name="pull")
def pull_model(
    name: Annotated[
        str,
        typer.Argument(
            help="A preset, OWNER/REPO[@REVISION], or OWNER/REPO/FILE.safetensors.", autocompletion=complete_preset
        ),
    ],
    configs: Annotated[
        bool, typer.Option("--configs", help="Only configs and tokenizers, which single-file models need.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
) -> None:
    """Download a model and its LinFusion weights. Files in the Hugging Face cache are not downloaded again."""
    configure_hub(download=True, quiet=quiet)
    from linfusion_cli.models.inspect.inventory import pull_model

    for path in pull_model(name, configs, (lambda text: None) if quiet else echo):
        gc.collect()  # deletes the progress bars of huggingface_hub, which would be redrawn over the result
        emit_result(str(path))


@app.command(cls=HelpCommand, name="check")
def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A value of --model, --lora, --controlnet or --ip-adapter.",
            autocompletion=complete_model,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Validate a model or adapter and show its type. The exit code is 65 if it is unusable."""
    configure_hub(download=False, quiet=True)
    from linfusion_cli.models.inspect.check import check as check_model

    found = check_model(name)
    if as_json:
        emit_result(json.dumps({"schema": CHECK_SCHEMA} | asdict(found), indent=2, default=str))
    else:
        emit_result(format_check(name, found))


def format_check(name: str, found: CheckResult) -> str:
    """Return the result of a check: type of the model, a table of its parts, and remarks."""
    table = build_table("part", "tensors", "type", "size", "file")
    for part in found.parts:
        files = [str(part.files[0]), *(file.name for file in part.files[1:])]
        table.add_row(part.name, str(part.tensors), part.types, format_bytes(part.bytes), ", ".join(files))
    return "\n".join([f"{name}: {found.what}", format_table(table), *found.remarks])
