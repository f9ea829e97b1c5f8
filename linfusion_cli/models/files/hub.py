"""The Hugging Face hub: look up its local cache, and download into it on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from linfusion_cli.core.errors import NotInstalled, Unavailable, first_line
from linfusion_cli.models.files.layout import LINFUSION_FOLDER, PARTS

CONFIG_PATTERNS = ("*.json", "*.txt", "*.model")


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `owner/repo@revision` into the repository and the revision, None if none is given."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def find_in_hub(name: str, download: bool, flag: str, is_complete: Callable[[Path], bool]) -> Path:
    """Return the local snapshot of hub id `name`; with `download`, fetch it if it is missing or incomplete."""
    snapshot = find_snapshot(name, flag)
    if snapshot is not None and (not download or is_complete(snapshot)):
        return snapshot
    if download:
        return download_repository(name, flag)
    hint = f"Add --download or run `linfusion models pull {name}`, use a local folder, or use --preset demo."
    raise NotInstalled(f"{flag} {name} is not on this machine.", hint)


def find_snapshot(name: str, flag: str) -> Path | None:
    """Return the local snapshot of hub id `name`, complete or not, or None.

    Raise Unavailable if `name` is not a valid hub id.
    """
    from huggingface_hub import logging, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    logging.set_verbosity_error()
    repository, revision = split_revision(name)
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # Newer versions of huggingface_hub raise if any file of the repository is missing; not all files are needed.
        partial_snapshot = getattr(error, "snapshot_path", None)
        return None if partial_snapshot is None else Path(partial_snapshot)
    except (HFValidationError, OSError) as error:
        message = f"{flag} {name} does not exist: there is no such folder, and it is not a valid hub id."
        raise Unavailable(message, "Check the path or the hub id.") from error


def download_repository(name: str, flag: str, configs_only: bool = False) -> Path:
    """Download the required files of hub id `name` into the local cache and return its snapshot.

    Interrupted downloads are resumed, and files in the cache are not downloaded again. With `configs_only` no weights
    are downloaded. Raise Unavailable if the hub or the network refuses.
    """
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(name)
    with translate_hub_errors(name, flag):
        patterns = build_config_patterns() if configs_only else build_download_patterns(name)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


@contextmanager
def translate_hub_errors(name: str, flag: str) -> Iterator[None]:
    """Translate errors of the hub and the network into Unavailable, with `flag` and `name` in the message."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # huggingface_hub uses requests or httpx, depending on its version; HfHubHTTPError derives from its error class.
    network_errors = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    subject = f"{flag} {name}".strip()
    try:
        yield
    except RepositoryNotFoundError as error:
        hint = "Check the name. Private and gated repositories need HF_TOKEN."
        raise Unavailable(f"{subject}: the hub has no such repository.", hint) from error
    except RevisionNotFoundError as error:
        raise Unavailable(f"{subject}: the repository has no such revision.", "Check the revision.") from error
    except RemoteEntryNotFoundError as error:
        raise Unavailable(f"{subject}: the repository has no such file.", "Check the file name.") from error
    except (*network_errors, ValueError) as error:
        raise Unavailable(f"{subject} could not be downloaded ({first_line(error)}).", "Try again later.") from error


def is_network_repository(name: str) -> bool:
    """Return whether hub id `name` holds a model or a single network, with a config, instead of loose files.

    Raise Unavailable if the hub or the network refuses.
    """
    from huggingface_hub import list_repo_files

    repository, revision = split_revision(name)
    with translate_hub_errors(name, ""):
        files = list_repo_files(repository, revision=revision)
    return "model_index.json" in files or "config.json" in files


def build_config_patterns() -> list[str]:
    """Return the patterns of configs and tokenizers."""
    return [*CONFIG_PATTERNS, *(f"*/{pattern}" for pattern in CONFIG_PATTERNS)]


def build_download_patterns(name: str) -> list[str]:
    """Return the patterns to download: configs, and the weights of each network, in fp16 if the repository has them."""
    from huggingface_hub import list_repo_files

    repository, revision = split_revision(name)
    weights = [file for file in list_repo_files(repository, revision=revision) if file.endswith(".safetensors")]
    patterns: list[str] = []
    for folder in {str(Path(file).parent) for file in weights} & {*PARTS, LINFUSION_FOLDER, "."}:
        files = [file for file in weights if str(Path(file).parent) == folder]
        half = [file for file in files if ".fp16" in file]
        patterns += half or [file for file in files if folder != "." or file == "diffusion_pytorch_model.safetensors"]
    return [*build_config_patterns(), *sorted(patterns)]
