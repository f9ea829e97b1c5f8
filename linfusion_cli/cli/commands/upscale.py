"""`linfusion upscale`: upscale an existing image."""

from __future__ import annotations

from typing import Any

from linfusion_cli.cli.commands.run_command import run_request
from linfusion_cli.cli.parsing.options import add_settings

EXAMPLES = """
linfusion upscale photo.jpg
linfusion upscale photo.jpg --size 16384 --prompt "an alpine valley" -o large.tif
linfusion upscale logo.png --size 4096 --background white
"""


@add_settings("upscale")
def command(given: dict[str, Any]) -> None:
    """Upscale an existing image and write the larger one to a file."""
    from linfusion_cli.run.pipeline import generate  # numpy and more: slow to import, not needed for --help

    run_request(given, generate)
