"""`linfusion info FILE`: what a picture file is and what it says of itself, without decoding it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linfusion_cli.cli import render
from linfusion_cli.units import format_bytes

if TYPE_CHECKING:
    from linfusion_cli.images import FileInfo


def command(
    file: Annotated[Path, typer.Argument(help="A TIFF, PNG or JPEG file.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What a picture file says of itself; fails if it is not whole."""
    from linfusion_cli.images import read_info

    found = read_info(file)
    render.answer(json.dumps(asdict(found) | {"path": str(file)}, indent=2) if as_json else described(found))


def described(found: FileInfo) -> str:
    """Lines of `name: value` for a person."""
    tiles = f", tiles of {found.tile_px[0]}x{found.tile_px[1]}" if found.tile_px else ""
    values = {
        "file": found.path,
        "format": f"{found.format}, {found.compression}{tiles}",
        "size": f"{found.width_px}x{found.height_px}",
        "bits": found.bits,
        "dpi": f"{found.dpi:g}" if found.dpi else None,
        "bytes": f"{found.file_bytes} ({format_bytes(found.file_bytes)})",
    }
    return "\n".join([*lines(values), *(["request:", *lines(found.request, "  ")] if found.request else [])])


def lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """One line for each value there is."""
    return [f"{indent}{name}: {value}" for name, value in values.items() if value not in (None, "")]
