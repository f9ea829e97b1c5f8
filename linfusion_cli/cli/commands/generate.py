"""`linfusion generate`: generate an image from a prompt."""

from __future__ import annotations

from typing import Any

from linfusion_cli.cli.commands.run_command import run_request
from linfusion_cli.cli.parsing.options import add_settings

EXAMPLES = """
linfusion generate "a lake at dawn" --size 8192 -o lake.tif
linfusion generate "a lake" --preset sdxl-lightning --size 4096x2048 --download
linfusion generate - --steps 50,30 --seed 7 < prompt.txt
linfusion generate "a lake" --size 16384 --time-limit 8h   # resume: same command
"""


@add_settings("generate")
def command(given: dict[str, Any]) -> None:
    """Generate an image from a prompt and write it to a file."""
    from linfusion_cli.run.pipeline import generate  # numpy and more: slow to import, not needed for --help

    run_request(given, generate)
