"""Hugging Face's hub: its cache on this machine, and downloads into it when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from linfusion_cli.core.errors import Unavailable, first_line
from linfusion_cli.models.files.parts import LINFUSION, PARTS

SMALL_FILES = ("*.json", "*.txt", "*.model")


def split_revision(name: str) -> tuple[str, str | None]:
    """`owner/repo@revision` -> the repository, and the revision if one is pinned."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def find_in_hub(name: str, download: bool, kind: str, is_complete: Callable[[Path], bool]) -> Path:
    """The snapshot of hub id `name` in the local cache; what is not complete there is fetched, if `download`."""
    found = cached(name, kind)
    if found is not None and (not download or is_complete(found)):
        return found
    if download:
        return fetch(name, kind)
    hint = f"Add --download or run `linfusion models pull {name}` to fetch it, name a folder, or use --preset demo."
    raise Unavailable(f"{kind} {name} is not on this machine.", hint)


def cached(name: str, kind: str) -> Path | None:
    """The snapshot of hub id `name` in the local cache, complete or not; raises Unavailable for what is no hub id."""
    from huggingface_hub import logging, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    logging.set_verbosity_error()
    repository, revision = split_revision(name)
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # Newer libraries call a snapshot incomplete that lacks any of the hub's files, and we fetch what is needed.
        partly = getattr(error, "snapshot_path", None)
        return None if partly is None else Path(partly)
    except (HFValidationError, OSError) as error:
        raise Unavailable(f"{kind} {name}: there is no such folder, and it is no hub id.", "Check it.") from error


def fetch(name: str, kind: str, configs_only: bool = False) -> Path:
    """Download what is needed of hub id `name` into the local cache -> its snapshot; raises Unavailable.

    Where a connection breaks it is taken up again, and files that are there are left as they are. `configs_only` leaves
    the weights out.
    """
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(name)
    with hub_errors(name, kind):
        patterns = small_patterns() if configs_only else download_patterns(name)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


@contextmanager
def hub_errors(name: str, kind: str) -> Iterator[None]:
    """Within the context what the hub or the network refuses is an Unavailable that names `kind` and `name`."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The hub's HTTP library differs between its versions; its own error derives from that one's, and from OSError.
    network_errors = HfHubHTTPError.__bases__
    subject = f"{kind} {name}".strip()
    try:
        yield
    except RepositoryNotFoundError as error:
        hint = "Check the name; a private or gated one needs HF_TOKEN."
        raise Unavailable(f"{subject}: the hub has no such repository.", hint) from error
    except RevisionNotFoundError as error:
        raise Unavailable(f"{subject}: the hub's repository has no such revision.", "Check it.") from error
    except RemoteEntryNotFoundError as error:
        raise Unavailable(f"{subject}: the hub's repository has no such file.", "Check the name.") from error
    except (*network_errors, ValueError) as error:
        raise Unavailable(f"{subject} could not be fetched ({first_line(error)}).", "Try again later.") from error


def is_fetched_whole(name: str) -> bool:
    """Whether hub id `name` holds a model, or a part of one with its config, and not files of many kinds.

    Raises Unavailable.
    """
    from huggingface_hub import list_repo_files

    repository, revision = split_revision(name)
    with hub_errors(name, ""):
        files = list_repo_files(repository, revision=revision)
    return "model_index.json" in files or "config.json" in files


def small_patterns() -> list[str]:
    """Configs and tokenizers."""
    return [*SMALL_FILES, *(f"*/{pattern}" for pattern in SMALL_FILES)]


def download_patterns(name: str) -> list[str]:
    """What of a repository is needed: its configs and, of each part, the half-precision weights where there are any."""
    from huggingface_hub import list_repo_files

    repository, revision = split_revision(name)
    weights = [file for file in list_repo_files(repository, revision=revision) if file.endswith(".safetensors")]
    wanted = []
    for folder in {str(Path(file).parent) for file in weights} & {*PARTS, LINFUSION, "."}:
        files = [file for file in weights if str(Path(file).parent) == folder]
        half = [file for file in files if ".fp16" in file]
        wanted += half or [file for file in files if folder != "." or file == "diffusion_pytorch_model.safetensors"]
    return [*small_patterns(), *sorted(wanted)]
