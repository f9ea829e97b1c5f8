"""Whether a file that is there is the one that a request makes: told by its content, not by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linfusion_cli import images
from linfusion_cli.errors import LinfusionError
from linfusion_cli.jobs import latents
from linfusion_cli.jobs.keep import as_json, changes, journal_of
from linfusion_cli.journal import Damaged, Entry
from linfusion_cli.request import PictureRequest

# What a file's metadata say of how it was made, and which changes nothing in it.
NOT_IN_A_FILE = {
    "output",
    "overwrite",
    "preview",
    "save_phases",
    "download",
    "vram",
    "ram",
    "keep_latents",
    "checkpoint_every",
    "fresh",
}


def left_files(request: PictureRequest) -> set[Path]:
    """Which files of `request` an earlier run of it has completed before it was killed: its journal is still there."""
    journal = journal_of(request)
    if request.fresh or not journal.exists():
        return set()
    try:
        entry = journal.read()
    except Damaged:
        return set()
    if entry is None or changes(entry.head["request"], as_json(request.to_json())):
        return set()
    return {path for path in files_of(request) if is_left(path, request, entry)}


def files_of(request: PictureRequest) -> set[Path]:
    """What there is when the run is over, but for the pictures of phases."""
    return {path for path in (request.output, request.preview, request.keep_latents) if path is not None}


def is_left(path: Path, request: PictureRequest, found: Entry | None) -> bool:
    """Whether the run that left `found`, of the same request, has completed the file at `path`."""
    return found is not None and is_made_of(path, request, found.head["weights"])


def is_made_of(path: Path, request: PictureRequest, weights: Sequence[Mapping[str, str]]) -> bool:
    """Whether there is a whole picture, or latents, at `path` that was made from `request` with these `weights`.

    Those are as metadata have them: file and sha256 of each.
    """
    expected = as_json(request.to_json() | {"weights": weights})
    if path == request.keep_latents:
        found = latents.made_with(path)
    else:
        found, expected = picture_made_with(path), expected if request.prompt_metadata else images.scrubbed(expected)
    return found is not None and told(found) == told(expected)


def picture_made_with(path: Path) -> Mapping[str, Any] | None:
    """The request and weights that the picture at `path` says it was made with; None where there is none, or half."""
    try:
        return images.read_info(path).request
    except LinfusionError:
        return None


def told(request: Mapping[str, Any]) -> dict[str, Any]:
    """What of a request decides a file."""
    return {name: value for name, value in request.items() if name not in NOT_IN_A_FILE}
