"""How the files of a batch are called, so that each lies in its folder and none is another's."""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.text import quote
from linfusion_cli.run.inputs.phase_files import output_of_phase
from linfusion_cli.settings.request import ImageRequest

TEMPLATE = "{index:04}-{slug}-{seed}"
SLUG_LETTERS = 48
NO_SLUG = "picture"
NAME_BYTES = 240  # what else is named after a file needs a few more, and 255 is the most there is
PATH_BYTES = 1000
SUFFIXES = {"png": ".png", "jpeg": ".jpg"}  # a TIFF's is .tif
IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
SPEC = re.compile(r"[<>^]?\d{0,2}[ds]?")  # a width of digits at most: no format can be large, or run anything
RESULTS = re.compile(r"results.*\.jsonl", re.IGNORECASE)
SAMPLE = {"index": 1, "slug": NO_SLUG, "seed": 0, "size": "64x64", "width": 64, "height": 64}


def slug(prompt: str) -> str:
    """The prompt's words in lower-case ASCII, joined by -, as far as they fit: "A fjord, at 5" -> a-fjord-at-5."""
    ascii_only = unicodedata.normalize("NFKD", prompt[: 10 * SLUG_LETTERS]).encode("ascii", "ignore").decode()
    words = "-".join(re.findall(r"[a-z0-9]+", ascii_only.lower()))
    if len(words) > SLUG_LETTERS:
        words = words[: SLUG_LETTERS + 1].rpartition("-")[0] or words[:SLUG_LETTERS]
    return words or NO_SLUG


@dataclass(frozen=True)
class FilenameTemplate:
    """A file's name with fields in braces, as str.format has them: plain numbers and words, and nothing within them."""

    parts: tuple[tuple[str, str | None, str], ...]  # what stands before a field, its name, and its format

    @staticmethod
    def parse(text: str) -> FilenameTemplate:
        """Raises UsageError for what is no template."""
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f"--name {quote(text)} is no template: {error}.", _WAY_OUT) from error
        for _, name, spec, conversion in parsed:
            if name is not None and name not in SAMPLE:
                raise UsageError(f"--name {quote(text)} has the field {quote(name)}, which is none.", _WAY_OUT)
            if conversion or not SPEC.fullmatch(spec or ""):
                raise UsageError(f"--name {quote(text)} has a format that is not allowed.", _WAY_OUT)
        template = FilenameTemplate(tuple((before, name, spec or "") for before, name, spec, _ in parsed))
        try:
            template._filled(SAMPLE)
        except ValueError as error:
            raise UsageError(f"--name {quote(text)} does not work: {error}.", _WAY_OUT) from error
        return template

    def name(self, index: int, request: ImageRequest) -> str:
        """What the picture of the job at this place in its list is called, with its format's suffix."""
        size: Size = request.size
        values = {"index": index, "slug": slug(request.prompt), "seed": request.seed, "size": str(size)}
        name = self._filled(values | {"width": size.width, "height": size.height})
        return name if name.lower().endswith(IMAGE_SUFFIXES) else name + SUFFIXES.get(request.format, ".tif")

    def _filled(self, values: dict[str, int | str]) -> str:
        return "".join(
            before + ("" if name is None else format(values[name], spec)) for before, name, spec in self.parts
        )


_WAY_OUT = f"Its fields are {', '.join(SAMPLE)}, as in {TEMPLATE}."


class FilenameRegistry:
    """Which files in a folder are whose, by the line of the job."""

    def __init__(self, folder: Path):
        self._folder, self._inside = folder, folder.resolve()
        self._taken: dict[Path, int] = {}
        # Outputs whose phases are kept, and outputs that the names of taken files would be phases of. Which sizes the
        # phases have, only the model tells, so every size counts.
        self._phased: dict[Path, int] = {}
        self._like_phases: dict[Path, int] = {}

    def take(self, name: str, line: int) -> Path:
        """The file `name` in the folder, from now on this job's; raises UsageError where it cannot be."""
        check_name(name)
        path = self._folder / name
        if (resolved := self._resolved(path)) is None:
            raise UsageError(f"Its file {quote(name)} would lie elsewhere, by a link in the folder.", "Name another.")
        if resolved in self._taken:
            reason = f"Its file {quote(name)} is that of line {self._taken[resolved]}."
            raise UsageError(reason, "Name another, or let --name have {index} and {seed}.")
        if (output := output_of_phase(resolved)) is not None:
            if self._phased.get(output, line) != line:
                reason = f"Its file {quote(name)} could be a phase of line {self._phased[output]}, by --save-phases."
                raise UsageError(reason, "Name another.")
            self._like_phases.setdefault(output, line)
        self._taken[resolved] = line
        return path

    def take_phases(self, output: str, line: int) -> None:
        """The pictures of the phases of `output`, which was taken: from now on this job's; raises UsageError."""
        resolved = self._resolved(self._folder / output)
        if self._like_phases.get(resolved, line) != line:
            reason = f"Its phases, which --save-phases keeps, could be the file of line {self._like_phases[resolved]}."
            raise UsageError(reason, "Name another.")
        self._phased[resolved] = line

    def _resolved(self, path: Path) -> Path | None:
        """Where a file lies; None if that is not in the folder."""
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError):  # a loop of links
            return None
        return resolved if resolved.is_relative_to(self._inside) else None


def check_name(name: str) -> None:
    """Raise UsageError unless `name`, folders included, can only be a file below the folder that it is put in."""
    reason = None
    if name.startswith("/"):
        reason = "must not begin with /"
    elif len(name.encode("utf-8", "surrogatepass")) > PATH_BYTES:
        reason = f"is longer than {PATH_BYTES} bytes"
    elif any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        reason = "has a character that names cannot have"
    elif RESULTS.fullmatch(name):
        reason = "is the name of the batch's own record"
    else:
        reason = next(filter(None, map(_wrong_with, name.split("/"))), None)
    if reason:
        raise UsageError(f"Its file {quote(name)} {reason}.", "Name a file within --output-dir.")


def _wrong_with(part: str) -> str | None:
    """What is wrong with one of the names in a path."""
    if part == "..":
        return "leaves the folder"
    if not part or part.startswith("."):
        return "has a part that is empty, or begins with a dot"
    if len(part.encode()) > NAME_BYTES:
        return f"has a part that is longer than {NAME_BYTES} bytes"
    return None
