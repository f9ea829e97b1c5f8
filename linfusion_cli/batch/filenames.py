"""Choose the file names of a batch: every file is inside the output folder, and no two jobs share one."""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.text import quote
from linfusion_cli.run.inputs.phase_files import find_phase_output
from linfusion_cli.settings.request import Request

DEFAULT_TEMPLATE = "{index:04}-{slug}-{seed}"
MAX_SLUG_CHARS = 48
DEFAULT_SLUG = "picture"
MAX_NAME_BYTES = 240  # file systems allow 255; temporary and checkpoint files have longer names than the output
MAX_PATH_BYTES = 1000
SUFFIXES = {"png": ".png", "jpeg": ".jpg"}  # all other formats are TIFF: .tif
IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
FORMAT_SPEC = re.compile(r"[<>^]?\d{0,2}[ds]?")  # at most two digits of width: names stay short
RESULTS_NAME = re.compile(r"results.*\.jsonl", re.IGNORECASE)
SAMPLE_VALUES = {"index": 1, "slug": DEFAULT_SLUG, "seed": 0, "size": "64x64", "width": 64, "height": 64}
OTHER_NAME = "Choose another name."
FIELDS_HINT = f"The fields are {', '.join(SAMPLE_VALUES)}, as in {DEFAULT_TEMPLATE}."


def slugify(prompt: str) -> str:
    """Return the first words of the prompt in lower-case ASCII, joined by -: "A fjord, at 5" -> a-fjord-at-5."""
    ascii_only = unicodedata.normalize("NFKD", prompt[: 10 * MAX_SLUG_CHARS]).encode("ascii", "ignore").decode()
    words = "-".join(re.findall(r"[a-z0-9]+", ascii_only.lower()))
    if len(words) > MAX_SLUG_CHARS:
        words = words[: MAX_SLUG_CHARS + 1].rpartition("-")[0] or words[:MAX_SLUG_CHARS]
    return words or DEFAULT_SLUG


@dataclass(frozen=True)
class FilenameTemplate:
    """A file name with replacement fields as in str.format, restricted to plain values with a width.

    parts: the literal text before a field, the name of the field (None at the end), and its format spec.
    """

    parts: tuple[tuple[str, str | None, str], ...]

    @staticmethod
    def parse(text: str) -> FilenameTemplate:
        """Return the template of --name; raise UsageError if it is invalid."""
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f"--name {quote(text)} is not a valid template: {error}.", FIELDS_HINT) from error
        for _, name, spec, conversion in parsed:
            if name is not None and name not in SAMPLE_VALUES:
                raise UsageError(f"--name {quote(text)} has the unknown field {quote(name)}.", FIELDS_HINT)
            if conversion or not FORMAT_SPEC.fullmatch(spec or ""):
                raise UsageError(f"--name {quote(text)} has a format that is not supported.", FIELDS_HINT)
        template = FilenameTemplate(tuple((before, name, spec or "") for before, name, spec, _ in parsed))
        try:
            template._fill(SAMPLE_VALUES)
        except ValueError as error:
            raise UsageError(f"--name {quote(text)} is not a valid template: {error}.", FIELDS_HINT) from error
        return template

    def format(self, index: int, request: Request) -> str:
        """Return the file name for the job at `index` of its list, with the suffix of its format."""
        size: Size = request.size
        values = {"index": index, "slug": slugify(request.prompt), "seed": request.seed, "size": str(size)}
        name = self._fill(values | {"width": size.width, "height": size.height})
        return name if name.lower().endswith(IMAGE_SUFFIXES) else name + SUFFIXES.get(request.format or "tiff", ".tif")

    def _fill(self, values: dict[str, int | str]) -> str:
        return "".join(
            before + ("" if name is None else format(values[name], spec)) for before, name, spec in self.parts
        )


class FilenameRegistry:
    """The files in a folder that the jobs of a list have reserved, with the line of each job."""

    def __init__(self, folder: Path):
        self._folder, self._resolved_folder = folder, folder.resolve()
        self._reserved: dict[Path, int] = {}
        # The sizes of the phases depend on the model, which is not known here, so names of any size are reserved:
        # outputs that save their phases, and outputs that reserved files could be phases of.
        self._with_phases: dict[Path, int] = {}
        self._phase_like: dict[Path, int] = {}

    def reserve(self, name: str, line: int) -> Path:
        """Reserve the file `name` for the job on `line` and return its path; raise UsageError if that is impossible."""
        check_filename(name)
        path = self._folder / name
        if (resolved := self._resolve(path)) is None:
            raise UsageError(f"Output {quote(name)} resolves outside --output-dir (through a symlink).", OTHER_NAME)
        if resolved in self._reserved:
            reason = f"Output {quote(name)} is already used by line {self._reserved[resolved]}."
            raise UsageError(reason, "Choose another name, or use {index} and {seed} in --name.")
        if (output := find_phase_output(resolved)) is not None:
            if self._with_phases.get(output, line) != line:
                other = self._with_phases[output]
                raise UsageError(f"Output {quote(name)} could be a phase of line {other} (--save-phases).", OTHER_NAME)
            self._phase_like.setdefault(output, line)
        self._reserved[resolved] = line
        return path

    def reserve_phases(self, output: str, line: int) -> None:
        """Reserve the images of the phases of `output`, which is reserved already; raise UsageError."""
        resolved = self._resolve(self._folder / output)
        assert resolved is not None  # `reserve` has checked it
        if self._phase_like.get(resolved, line) != line:
            reason = f"A phase of this job (--save-phases) could be the file of line {self._phase_like[resolved]}."
            raise UsageError(reason, OTHER_NAME)
        self._with_phases[resolved] = line

    def _resolve(self, path: Path) -> Path | None:
        """Return the path without symlinks; None if it is outside the folder."""
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError):  # a loop of links
            return None
        return resolved if resolved.is_relative_to(self._resolved_folder) else None


def check_filename(name: str) -> None:
    """Raise UsageError unless `name`, with its subfolders, can only be a file inside the output folder."""
    problem = None
    if name.startswith("/"):
        problem = "must not start with /"
    elif len(name.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
        problem = f"is longer than {MAX_PATH_BYTES} bytes"
    elif any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        problem = "contains a control character or half of a surrogate pair"
    elif RESULTS_NAME.fullmatch(name):
        problem = "is reserved for the results of the batch"
    else:
        problem = next(filter(None, map(_find_part_problem, name.split("/"))), None)
    if problem:
        raise UsageError(f"Output {quote(name)} {problem}.", "Use a file name inside --output-dir.")


def _find_part_problem(part: str) -> str | None:
    """Return the problem with one part of a path; None if it is valid."""
    if part == "..":
        return "contains .. and could leave the folder"
    if not part or part.startswith("."):
        return "has a part that is empty or starts with a dot"
    if len(part.encode()) > MAX_NAME_BYTES:
        return f"has a part longer than {MAX_NAME_BYTES} bytes"
    return None
