"""The file names of --save-phases: valley.tif -> valley-2048x2048.tif."""

from __future__ import annotations

import re
from pathlib import Path

from linfusion_cli.core.geometry import Size

PHASE_NAME = re.compile(r"(.+)-[0-9]+x[0-9]+")  # the stem of a phase's picture, by that of the output


def phase_path(output: Path, size: Size) -> Path:
    """Where --save-phases keeps the picture of a phase: valley.tif -> valley-2048x2048.tif."""
    return output.with_name(f"{output.stem}-{size}{output.suffix}")


def output_of_phase(path: Path) -> Path | None:
    """The output that `path` would be a phase of, by its name; None for other names."""
    match = PHASE_NAME.fullmatch(path.stem)
    return None if match is None else path.with_name(match[1] + path.suffix)
