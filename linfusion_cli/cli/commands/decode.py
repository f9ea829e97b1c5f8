"""`linfusion decode`: decode saved latents to an image."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from linfusion_cli.cli.commands.run_command import PreparedRun, run_command
from linfusion_cli.cli.parsing.options import add_settings
from linfusion_cli.core.events import Observer

EXAMPLES = """
linfusion decode lake.safetensors -o lake.png --bits 16
linfusion decode lake.tif.linfusion -o lake.tif   # the checkpoint of a run
"""

Latents = Annotated[
    Path,
    typer.Argument(
        help="A file written by --keep-latents, or the .linfusion folder of an unfinished run.", show_default=False
    ),
]


@add_settings("decode")
def command(given: dict[str, Any], latents: Latents) -> None:
    """Decode saved latents to an image.

    Options that are not given keep the values of the run. The output is named after the latents.
    """
    run_command(partial(prepare_decode, latents, given), given)


def prepare_decode(latents: Path, given: dict[str, Any], observer: Observer) -> PreparedRun:
    """Build the request from the one stored with the latents; `given` options replace its settings."""
    from linfusion_cli.run.checkpoint.latents_file import open_latents  # numpy and more: not needed for --help
    from linfusion_cli.run.decode_latents import build_decode_request, decode

    saved_latents = open_latents(latents)
    return PreparedRun(*build_decode_request(saved_latents, given), partial(decode, saved_latents))
