"""`linfusion models list|pull|check`: which models are here, how others come here, whether one can be used."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from linfusion_cli.cli.output import render
from linfusion_cli.cli.parsing.build_request import quieten_hub
from linfusion_cli.core.units import format_bytes

if TYPE_CHECKING:
    from linfusion_cli.models.inspect.check import Found

app = typer.Typer(help="Models on this machine.", no_args_is_help=True, rich_markup_mode=None)

PATH_COLUMNS = 2000  # a path is to be copied, so it stays whole

Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """Every model on this machine: the embedded one, and what is in the hub's cache."""
    quieten_hub(download=False, quiet=True)
    from linfusion_cli.models.inspect.inventory import on_this_machine

    entries = [asdict(entry) | {"path": str(entry.path)} for entry in on_this_machine()]
    render.answer(json.dumps(entries, indent=2) if as_json else render.plain(inventory_table(entries), PATH_COLUMNS))


def inventory_table(entries: list[dict[str, Any]]) -> Table:
    """One row per model."""
    table = Table("model", "what", "size", "revision", "where", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(entry["name"], entry["what"], format_bytes(entry["bytes"]), entry["revision"][:12], entry["path"])
    return table


@app.command("pull")
def pull(
    name: Annotated[
        str,
        typer.Argument(help="A preset, OWNER/REPO, OWNER/REPO@REVISION, or OWNER/REPO/FILE.safetensors."),
    ],
    configs: Annotated[
        bool, typer.Option("--configs", help="Configs and tokenizers alone: what single files of a family need.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> None:
    """Fetch a model and LinFusion's weights for it into the hub's cache; files that are there are not fetched again."""
    quieten_hub(download=True, quiet=quiet)
    from linfusion_cli.models.inspect.inventory import pulled

    for path in pulled(name, configs, (lambda text: None) if quiet else render.say):
        gc.collect()  # ends the library's progress bars, which would draw themselves once more over the answer
        render.answer(str(path))


@app.command("check")
def check(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="What --model or an option for adapters would take.")],
    as_json: Json = False,
) -> None:
    """Say what a model is; fails with 65 if it cannot be used, naming the first thing that is wrong with it."""
    quieten_hub(download=False, quiet=True)
    from linfusion_cli.models.inspect.check import check as check_model

    found = check_model(name)
    render.answer(json.dumps(asdict(found), indent=2, default=str) if as_json else described(name, found))


def described(name: str, found: Found) -> str:
    """What was found, in lines."""
    table = Table("part", "tensors", "type", "size", "file", box=None, pad_edge=False)
    for part in found.parts:
        files = [str(part.files[0]), *(file.name for file in part.files[1:])]
        table.add_row(part.name, str(part.tensors), part.types, format_bytes(part.bytes), ", ".join(files))
    return "\n".join([f"{name}: {found.what}", render.plain(table, PATH_COLUMNS), *found.remarks])
