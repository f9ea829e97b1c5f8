"""`linfusion info FILE`: show format and metadata of an image file; `--verify` also decodes all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linfusion_cli.cli.output.streams import emit_result
from linfusion_cli.core.units import format_bytes

if TYPE_CHECKING:
    from linfusion_cli.images import FileInfo

SCHEMA = 1  # of the JSON; the request in it has its own number

EXAMPLES = """
linfusion info lake.tif
linfusion info lake.tif --verify
"""


def command(
    file: Annotated[Path, typer.Argument(help="A TIFF, PNG or JPEG file.")],
    verify: Annotated[bool, typer.Option("--verify", help="Decode the whole file, and verify its checksum.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show format and metadata of an image file. The exit code is 65 if the file is damaged."""
    from linfusion_cli import images

    info = images.verify_image(file) if verify else images.read_info(file)
    verified = count_units(info) | {"checksum": info.file_sha256} if verify else None
    if as_json:
        emit_result(json.dumps({"schema": SCHEMA} | asdict(info) | {"path": str(file), "verified": verified}, indent=2))
    else:
        emit_result(format_info(info, verified))


def count_units(info: FileInfo) -> dict[str, Any]:
    """Return the unit in which the file is decoded, "tiles" or "rows", and their number."""
    if not info.tile_px:
        return {"unit": "rows", "count": info.height_px}
    sides = zip((info.width_px, info.height_px), info.tile_px, strict=True)
    columns, rows = (-(-side // tile) for side, tile in sides)
    return {"unit": "tiles", "count": columns * rows}


def format_info(info: FileInfo, verified: Mapping[str, Any] | None) -> str:
    """Return lines of `name: value`."""
    tiles = f", tiles of {info.tile_px[0]}x{info.tile_px[1]}" if info.tile_px else ""
    values = {
        "file": info.path,
        "format": f"{info.format}, {info.compression}{tiles}",
        "size": f"{info.width_px}x{info.height_px}",
        "bits": info.bits,
        "dpi": f"{info.dpi:g}" if info.dpi else None,
        "bytes": f"{info.file_bytes} ({format_bytes(info.file_bytes)})",
        "verified": format_verification(**verified) if verified else None,
    }
    request = ["request:", *format_values(info.request, "  ")] if info.request else []
    return "\n".join([*format_values(values), *request])


def format_verification(unit: str, count: int, checksum: str | None) -> str:
    """Return the result of a verification; without a checksum, changes that still decode are not detected."""
    checksum_result = f"checksum {checksum} matches" if checksum else "the file has no checksum"
    return f"all {count} {unit} decode, {checksum_result}"


def format_values(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return one line per value that is set."""
    return [f"{indent}{name}: {value}" for name, value in values.items() if value not in (None, "")]
