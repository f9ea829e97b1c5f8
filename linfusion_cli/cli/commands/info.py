"""`linfusion info FILE`: what a picture file is and what it says of itself; `--verify` decodes all of it as well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linfusion_cli.cli.output import render
from linfusion_cli.core.units import format_bytes

if TYPE_CHECKING:
    from linfusion_cli.images import FileInfo


def command(
    file: Annotated[Path, typer.Argument(help="A TIFF, PNG or JPEG file.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Decode every tile or row, and check the checksum that the file carries.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What a picture file says of itself; fails if it is not whole."""
    from linfusion_cli import images

    found = images.verify_image(file) if verify else images.read_info(file)
    verified = decoded(found) | {"checksum": found.file_sha256} if verify else None
    if as_json:
        render.answer(json.dumps(asdict(found) | {"path": str(file), "verified": verified}, indent=2))
    else:
        render.answer(described(found, verified))


def decoded(found: FileInfo) -> dict[str, Any]:
    """What there was to decode: the unit, and how many of it."""
    if not found.tile_px:
        return {"unit": "rows", "count": found.height_px}
    sides = zip((found.width_px, found.height_px), found.tile_px, strict=True)
    across, down = (-(-side // tile) for side, tile in sides)
    return {"unit": "tiles", "count": across * down}


def described(found: FileInfo, verified: Mapping[str, Any] | None) -> str:
    """Lines of `name: value` for a person."""
    tiles = f", tiles of {found.tile_px[0]}x{found.tile_px[1]}" if found.tile_px else ""
    values = {
        "file": found.path,
        "format": f"{found.format}, {found.compression}{tiles}",
        "size": f"{found.width_px}x{found.height_px}",
        "bits": found.bits,
        "dpi": f"{found.dpi:g}" if found.dpi else None,
        "bytes": f"{found.file_bytes} ({format_bytes(found.file_bytes)})",
        "verified": verdict(**verified) if verified else None,
    }
    return "\n".join([*lines(values), *(["request:", *lines(found.request, "  ")] if found.request else [])])


def verdict(unit: str, count: int, checksum: str | None) -> str:
    """A file without a checksum may have changed unnoticed, and the reader is told."""
    seal = f"checksum {checksum} is right" if checksum else "it carries no checksum"
    return f"all {count} {unit} decode, {seal}"


def lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """One line for each value there is."""
    return [f"{indent}{name}: {value}" for name, value in values.items() if value not in (None, "")]
