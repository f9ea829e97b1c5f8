"""What of a request's files is there already, by what they hold and not by their names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linfusion_cli import images
from linfusion_cli.device import versions
from linfusion_cli.errors import LinfusionError
from linfusion_cli.images.source import SourcePicture
from linfusion_cli.jobs import latents
from linfusion_cli.jobs.keep import as_json, changes, journal_of
from linfusion_cli.jobs.prepare import prepare
from linfusion_cli.jobs.record import Recorder
from linfusion_cli.jobs.shelf import Shelf
from linfusion_cli.jobs.weights import hashed_weights, named_weights, to_json
from linfusion_cli.journal import Damaged, Entry, Journal
from linfusion_cli.models.digest import WeightsFile
from linfusion_cli.report import RunReport
from linfusion_cli.request import PictureRequest

# What a file's metadata say of how it was made, and which changes nothing in it.
BESIDE = ("output", "overwrite", "preview", "download", "vram", "ram", "keep_latents", "checkpoint_every", "fresh")


@dataclass(frozen=True)
class Made:
    """The files that a run of this very request has made: all of them, some, or none."""

    files: frozenset[Path] = frozenset()
    is_all: bool = False
    report: RunReport | None = None  # where it is all


def made_before(
    request: PictureRequest, picture: SourcePicture | None, recorder: Recorder, shelf: Shelf, keep_complete: bool
) -> Made:
    """What there is, which is looked at with `keep_complete`, or where a run was killed: its journal is still there.

    Raises as `prepare` does.
    """
    killed = journal_of(request).was_begun() and not (request.overwrite or request.fresh)
    if not (keep_complete or killed) or not os.path.lexists(request.output):
        return Made()
    prepared = prepare(request, picture)
    weights = hashed_weights(prepared, recorder, shelf)
    wanted = {path for path in (request.output, request.preview, request.keep_latents) if path is not None}
    proven = read_of(journal_of(request), request) is not None
    found = frozenset(path for path in wanted if is_made_of(path, request, weights, proven))
    if found != wanted:
        return Made(found)
    report = RunReport(request.to_json(), {}, {}, versions(), {}, to_json(weights), recorder.stages)
    report.already_complete = True
    return Made(found, True, report)


def clear_journal(request: PictureRequest) -> None:
    """The files of `request` are complete: what a killed run of it has left goes. Raises TryAgain where one goes on."""
    with (
        images.PendingFile(request.output, overwrite=True),  # takes over a temporary name, which goes
        journal_of(request).held() as journal,
    ):
        if not journal.exists() or read_of(journal, request) is not None:
            journal.remove()


def read_of(journal: Journal, request: PictureRequest) -> Entry | None:
    """What `journal` says, if it is whole and of this request."""
    try:
        entry = journal.read()
    except Damaged:
        return None
    return None if entry is None or changes(entry.head["request"], as_json(request.to_json())) else entry


def may_go(path: Path, request: PictureRequest, weights: Sequence[WeightsFile], proven: bool) -> bool:
    """Whether a file at `path` may be replaced: that is wished, or it is the very one that will be made."""
    return request.overwrite or is_made_of(path, request, weights, proven)


def is_made_of(path: Path, request: PictureRequest, weights: Sequence[WeightsFile], proven: bool) -> bool:
    """Whether there is a whole picture, or latents, at `path` that was made from `request` with these `weights`.

    A file that names no prompts could be of others, unless it is `proven` by a journal that a run of this request was
    at work here.
    """
    if not (request.prompt_metadata or proven):
        return False
    expected = as_json(request.to_json() | {"weights": named_weights(weights)})
    if path == request.keep_latents:
        found = latents.made_with(path)
    else:
        found, expected = picture_made_with(path), expected if request.prompt_metadata else images.scrubbed(expected)
    return found is not None and told(found) == told(expected)


def picture_made_with(path: Path) -> Mapping[str, Any] | None:
    """The request and weights that the picture at `path` says it was made with; None unless it is whole."""
    try:
        return images.verify(path).request
    except LinfusionError:
        return None


def told(request: Mapping[str, Any]) -> dict[str, Any]:
    """What of a request decides a file."""
    return {name: value for name, value in request.items() if name not in BESIDE}
