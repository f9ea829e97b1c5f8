"""Locate safetensors files of models and adapters: local files, folders, hub repositories. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from linfusion_cli.core.errors import DataError, NotInstalled, Unavailable
from linfusion_cli.core.fs import expand_home, is_file, is_folder
from linfusion_cli.models.files.header import Header
from linfusion_cli.models.files.hub import find_snapshot, split_revision, translate_hub_errors
from linfusion_cli.models.files.layout import CONVERT_HINT, PICKLE_SUFFIXES, build_pickle_error

SAFETENSORS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FileKind:
    """A kind of file to locate: its option, a noun for messages, and the standard names of such a file.

    `convert_hint` is the hint for pickles; files in a folder called `excluded_folder` are ignored.
    """

    flag: str
    noun: str
    standard_names: tuple[str, ...]
    convert_hint: str
    excluded_folder: str = ""

    def accepts(self, file: str) -> bool:
        """Return whether `file`, a path in a folder or repository, is a candidate."""
        return file.endswith(SAFETENSORS_SUFFIX) and self.excluded_folder not in PurePosixPath(file).parts


@dataclass(frozen=True)
class FileLocation:
    """Local path of a file; if it is from the hub, also its repository and its path there."""

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
    """Return whether a file is a LoRA of any kind."""
    return any("lora" in name for name in header.shapes)


def is_hub_file(name: str) -> bool:
    """Return whether `name` is OWNER/REPO/FILE.safetensors and not a local file."""
    return name.endswith(SAFETENSORS_SUFFIX) and name.count("/") > 1 and not is_file(expand_home(name))


def find_lora(name: str, download: bool = False) -> Path:
    """Return the safetensors file of the LoRA `name`, like `find_file`."""
    return find_file(LORA_KIND, name, download).path


def find_inversion(name: str, download: bool = False) -> Path:
    """Return the safetensors file of the textual inversion `name`, like `find_file`."""
    return find_file(INVERSION_KIND, name, download).path


def find_file(kind: FileKind, name: str, download: bool) -> FileLocation:
    """Locate the safetensors file `name`: a file, a folder, a hub id, or a file in a hub repository.

    In a folder or repository it is the file with a standard name, otherwise the only candidate. Raise Unavailable if it
    is not on this machine and `download` is false, DataError for pickles and for several candidates.
    """
    path = expand_home(name)
    if is_folder(path):
        standard = [file for file in kind.standard_names if is_file(path / file)]
        return FileLocation(path / pick_file(kind, name, [*standard, *(file.name for file in path.glob("*"))]))
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise build_pickle_error(f"{kind.flag} {name}", kind.convert_hint)
    if not is_file(path):
        return find_in_repository(kind, name, download)
    if path.suffix.lower() != SAFETENSORS_SUFFIX:
        raise build_format_error(kind, f"{kind.flag} {name} is not a safetensors file.")
    return FileLocation(path)


def find_in_repository(kind: FileKind, name: str, download: bool) -> FileLocation:
    """Locate the file of `owner/repo` or `owner/repo/path/file.safetensors`, like `find_file`."""
    repository, file = split_hub_path(kind, name)
    try:
        snapshot = find_snapshot(repository, kind.flag)
    except Unavailable as error:
        raise build_missing_error(kind, name) from error
    files = [] if snapshot is None else list_files(snapshot)
    selected = next((path for path in ([file] if file else kind.standard_names) if path in files), None)
    if selected is None and download:
        return download_file(kind, name, repository, file)
    # The repository can have more files than the cache; without `download` a single candidate in the cache is used.
    if selected is None and file is None and any(kind.accepts(path) for path in files):
        selected = pick_file(kind, name, files)
    if snapshot is None or selected is None:
        hint = "Add --download, or use a local safetensors file."
        raise NotInstalled(f"{kind.flag} {name} is not on this machine.", hint)
    return FileLocation(snapshot / selected, repository, selected)


def list_files(folder: Path) -> list[str]:
    """Return the relative paths of all files in `folder` and its subfolders."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_file(path)]


def split_hub_path(kind: FileKind, name: str) -> tuple[str, str | None]:
    """Split `owner/repo` or `owner/repo/folder/file.safetensors` into the repository and the file, or None."""
    parts = name.split("/")
    has_file = name.endswith(SAFETENSORS_SUFFIX)
    if has_file != (len(parts) > 2):
        raise build_missing_error(kind, name)
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def download_file(kind: FileKind, name: str, repository: str, file: str | None) -> FileLocation:
    """Download `file` from a hub repository, by default the file that `pick_file` selects; raise Unavailable."""
    from huggingface_hub import hf_hub_download, list_repo_files

    repo, revision = split_revision(repository)
    with translate_hub_errors(name, kind.flag):
        file = file or pick_file(kind, name, list_repo_files(repo, revision=revision))
        return FileLocation(Path(hf_hub_download(repo, file, revision=revision)), repository, file)


def pick_file(kind: FileKind, name: str, files: Iterable[str]) -> str:
    """Return the file with a standard name or the only candidate; raise DataError if it is ambiguous."""
    files = sorted(set(files))
    if standard := next((file for file in kind.standard_names if file in files), None):
        return standard
    candidates = [file for file in files if kind.accepts(file)]
    if len(candidates) > 1:
        hint = f"Select one, e.g. {kind.flag} {name.rstrip('/')}/{candidates[0]}."
        raise DataError(f"{kind.flag} {name} has several safetensors files: {', '.join(candidates)}.", hint)
    if candidates:
        return candidates[0]
    if any(PurePosixPath(file).suffix.lower() in PICKLE_SUFFIXES for file in files):
        raise build_pickle_error(f"{kind.flag} {name}", kind.convert_hint)
    raise build_format_error(kind, f"{kind.flag} {name} has no safetensors file.")


def build_missing_error(kind: FileKind, name: str) -> Unavailable:
    """Return the error for a name that is neither a local path nor a valid hub id."""
    reason = f"{kind.flag} {name} does not exist: there is no such file or folder, and it is not a valid hub id."
    return Unavailable(reason, "Check the path or the hub id.")


def build_format_error(kind: FileKind, reason: str) -> DataError:
    """Return the error for a path without a safetensors file."""
    return DataError(reason, f"Use the safetensors file of {kind.noun}.")
