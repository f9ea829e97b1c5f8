"""`linfusion presets list` and `linfusion presets show NAME`."""

from __future__ import annotations

from typing import Annotated

import typer

from linfusion_cli import settings
from linfusion_cli.cli.output import render

app = typer.Typer(help="The presets that come with the program.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_presets() -> None:
    """Names and models of all presets."""
    for name in settings.preset_names():
        render.answer(f"{name:16}{settings.preset_layer(name).values['model']}")


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="A name from the list, or the path of a .toml file.")]) -> None:
    """The file of one preset: a start for one's own."""
    settings.preset_layer(name)
    render.answer(settings.preset_path(name).read_text(encoding="utf-8").rstrip())
