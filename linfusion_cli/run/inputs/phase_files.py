"""The file names of --save-phases: valley.tif -> valley-2048x2048.tif."""

from __future__ import annotations

import re
from pathlib import Path

from linfusion_cli.core.geometry import Size

PHASE_STEM = re.compile(r"(.+)-[0-9]+x[0-9]+")  # the stem of a phase's file; the group is the stem of the output


def build_phase_path(output: Path, size: Size) -> Path:
    """Return the path of a phase's image: valley.tif -> valley-2048x2048.tif."""
    return output.with_name(f"{output.stem}-{size}{output.suffix}")


def find_phase_output(path: Path) -> Path | None:
    """Return the output that `path` could be a phase of, by its name; None if it does not look like a phase."""
    match = PHASE_STEM.fullmatch(path.stem)
    return None if match is None else path.with_name(match[1] + path.suffix)
