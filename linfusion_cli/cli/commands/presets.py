"""`linfusion presets list` and `linfusion presets show NAME`."""

from __future__ import annotations

from typing import Annotated

import typer

from linfusion_cli import settings
from linfusion_cli.cli.output.streams import echo_line, emit_result
from linfusion_cli.cli.parsing.completion import complete_preset
from linfusion_cli.cli.parsing.help import HelpCommand
from linfusion_cli.core.errors import ConfigError, UsageError

SHADOWED = "{} is ignored: {} has the same name."
app = typer.Typer(help="List and show presets: the built-in ones and your own.", rich_markup_mode=None)


@app.command(cls=HelpCommand, name="list")
def list_presets() -> None:
    """List all presets: name, model, default size and source."""
    presets = settings.find_presets()
    width = max(len(preset.name) for preset in presets)
    for preset in presets:
        if preset.shadowed_by is not None:
            echo_line(SHADOWED.format(preset.path, preset.shadowed_by))
            continue
        try:
            values = settings.raise_errors(settings.read_preset_layer(str(preset.path))).values
        except (ConfigError, UsageError) as error:  # one broken file must not hide the others
            echo_line(str(error))
            continue
        emit_result(f"{preset.name:{width}}  {values.get('model', '-')}  {values.get('size', '-')}  {preset.source}")


@app.command(cls=HelpCommand, name="show")
def show(
    name: Annotated[
        str,
        typer.Argument(help="A name from the list, or the path of a .toml file.", autocompletion=complete_preset),
    ],
) -> None:
    """Print the file of a preset, as a start for your own."""
    settings.raise_errors(settings.read_preset_layer(name))
    emit_result(settings.find_preset_file(name).read_text(encoding="utf-8").rstrip())
