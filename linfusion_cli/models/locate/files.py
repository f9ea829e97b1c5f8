"""Where an adapter is, of whatever kind: one safetensors file, of a folder or a hub repository. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from linfusion_cli.core.errors import DataError, Unavailable, UsageError
from linfusion_cli.core.fs import expand_home, is_file, is_folder
from linfusion_cli.models.files.header import Header
from linfusion_cli.models.files.hub import find_snapshot, split_revision, translate_hub_errors
from linfusion_cli.models.files.layout import CONVERT_HINT, PICKLE_SUFFIXES

MAX_LORA_WEIGHT = 10.0
SAFETENSORS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FileKind:
    """What is looked for: the option that names it, what it is, and the names that its file usually has.

    `convert` is what to do with a pickle; in a folder called `other` lies something else.
    """

    flag: str
    noun: str
    standard_names: tuple[str, ...]
    convert_hint: str
    excluded_folder: str = ""

    def accepts(self, file: str) -> bool:
        """Whether `file`, a path in a folder or repository, is a safetensors file that may be it."""
        return file.endswith(SAFETENSORS_SUFFIX) and self.excluded_folder not in PurePosixPath(file).parts


@dataclass(frozen=True)
class FileLocation:
    """Where a file is; of a hub repository also which, and its path `inside`."""

    path: Path
    repository: str = ""
    path_in_repository: str = ""


MODEL_KIND = FileKind("--model", "a model", (), CONVERT_HINT)
LORA_KIND = FileKind("--lora", "a LoRA", ("pytorch_lora_weights.safetensors",), CONVERT_HINT)
INVERSION_KIND = FileKind(
    "--textual-inversion",
    "a textual inversion",
    ("learned_embeds.safetensors",),
    'Convert it: torch.load(FILE, weights_only=True), then safetensors.torch.save_file({"emb_params": VECTORS}, NEW).',
)


def is_lora(header: Header) -> bool:
    """Whether a file holds a LoRA, of whatever kind."""
    return any("lora" in name for name in header.shapes)


def split_weight(text: str) -> tuple[str, float]:
    """The LoRA and its weight that "FILE:0.8" means, a weight of 1 where none is given; raises UsageError."""
    name, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:  # the colon is the path's own
        colon, weight = "", 1.0
    name = name if colon else text
    if not name.strip():
        raise UsageError(f"--lora {text!r} names no file.", "Write FILE or FILE:0.8.", "lora")
    if not math.isfinite(weight) or abs(weight) > MAX_LORA_WEIGHT:
        hint = f"It must lie between {-MAX_LORA_WEIGHT:g} and {MAX_LORA_WEIGHT:g}: write FILE:0.8."
        raise UsageError(f"--lora {text!r} has the weight {weight:g}.", hint, "lora")
    return name, weight


def split_token(text: str) -> tuple[str, str | None]:
    """The textual inversion and its token that "FILE:TOKEN" means, None where none is given; raises UsageError.

    The colon may be the path's own: behind it is no token where that looks like a path, or where the whole is a file.
    """
    name, colon, token = text.rpartition(":")
    if not colon or is_file(expand_home(text)) or token.endswith(SAFETENSORS_SUFFIX) or set(token) & {"/", "\\"}:
        name, token = text, None
    if not name.strip() or (token is not None and not token.strip()):
        raise UsageError(
            f"--textual-inversion {text!r} is not possible.", "Write FILE or FILE:TOKEN.", "textual_inversion"
        )
    return name, token and token.strip()


def is_hub_file(name: str) -> bool:
    """Whether `name` is OWNER/REPO/FILE.safetensors, and not a file on this machine."""
    return name.endswith(SAFETENSORS_SUFFIX) and name.count("/") > 1 and not is_file(expand_home(name))


def find_lora(name: str, download: bool = False) -> Path:
    """The safetensors file of the LoRA `name`, as `find_file`."""
    return find_file(LORA_KIND, name, download).path


def find_inversion(name: str, download: bool = False) -> Path:
    """The safetensors file of the textual inversion `name`, as `find_file`."""
    return find_file(INVERSION_KIND, name, download).path


def find_file(kind: FileKind, name: str, download: bool) -> FileLocation:
    """The safetensors file `name` means: a file, a folder, a hub id, or a file in a hub repository.

    Of a folder or a repository it is the one with a usual name, else the only one that may be it. Raises Unavailable
    when it is not on this machine and not to be fetched, DataError for pickles and for several files.
    """
    path = expand_home(name)
    if is_folder(path):
        usual = [file for file in kind.standard_names if is_file(path / file)]
        return FileLocation(path / pick_file(kind, name, [*usual, *(file.name for file in path.glob("*"))]))
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise pickled(kind, name)
    if not is_file(path):
        return find_in_repository(kind, name, download)
    if path.suffix.lower() != SAFETENSORS_SUFFIX:
        raise DataError(f"{kind.flag} {name} is no safetensors file.", f"Name {kind.noun}'s safetensors file.")
    return FileLocation(path)


def find_in_repository(kind: FileKind, name: str, download: bool) -> FileLocation:
    """As `find_file`, for `owner/repo` or `owner/repo/file.safetensors`, whose file may lie in a sub folder."""
    repository, file = split_hub_path(kind, name)
    try:
        snapshot = find_snapshot(repository, kind.flag)
    except Unavailable as error:
        raise build_missing_error(kind, name) from error
    here = [] if snapshot is None else [path for path in snapshot.rglob("*") if is_file(path)]
    files = [path.relative_to(snapshot).as_posix() for path in here]
    wanted = next((usual for usual in ([file] if file else kind.standard_names) if usual in files), None)
    if wanted is None and download:
        return download_file(kind, name, repository, file)
    # The cache holds what was fetched before, the hub perhaps more: its only file will do where we may not ask.
    if wanted is None and file is None and any(kind.accepts(path) for path in files):
        wanted = pick_file(kind, name, files)
    if wanted is None:
        hint = "Add --download to fetch it, or name a safetensors file."
        raise Unavailable(f"{kind.flag} {name} is not on this machine.", hint)
    return FileLocation(snapshot / wanted, repository, wanted)


def split_hub_path(kind: FileKind, name: str) -> tuple[str, str | None]:
    """`owner/repo` or `owner/repo/folder/file.safetensors` -> the repository, and the file in it if one is named."""
    parts = name.split("/")
    names_file = name.endswith(SAFETENSORS_SUFFIX)
    if names_file != (len(parts) > 2):
        raise build_missing_error(kind, name)
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def download_file(kind: FileKind, name: str, repository: str, file: str | None) -> FileLocation:
    """Download one file of a hub repository, by default the one that `pick_file` finds; raises Unavailable."""
    from huggingface_hub import hf_hub_download, list_repo_files

    repo, revision = split_revision(repository)
    with translate_hub_errors(name, kind.flag):
        file = file or pick_file(kind, name, list_repo_files(repo, revision=revision))
        return FileLocation(Path(hf_hub_download(repo, file, revision=revision)), repository, file)


def pick_file(kind: FileKind, name: str, files: Iterable[str]) -> str:
    """Which of the `files` of `name` is meant; raises DataError when that is not clear."""
    files = sorted(set(files))
    if usual := next((file for file in kind.standard_names if file in files), None):
        return usual
    safe = [file for file in files if kind.accepts(file)]
    if len(safe) > 1:
        hint = f"Name one of them, as in {kind.flag} {name.rstrip('/')}/{safe[0]}."
        raise DataError(f"{kind.flag} {name} holds several safetensors files: {', '.join(safe)}.", hint)
    if safe:
        return safe[0]
    if any(PurePosixPath(file).suffix.lower() in PICKLE_SUFFIXES for file in files):
        raise pickled(kind, name)
    raise DataError(f"{kind.flag} {name} holds no safetensors file.", f"Name {kind.noun}'s safetensors file.")


def build_missing_error(kind: FileKind, name: str) -> Unavailable:
    """The error for what is neither on this machine nor a name on the hub."""
    return Unavailable(f"{kind.flag} {name}: there is no such file or folder, and it is no hub id.", "Check it.")


def pickled(kind: FileKind, name: str) -> DataError:
    """The error for a pickle, or where there are only pickles."""
    return DataError(f"{kind.flag} {name} is a pickle, which can run code when it is opened.", kind.convert_hint)
