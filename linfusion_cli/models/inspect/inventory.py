"""List the models on this machine, and download others. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli import settings
from linfusion_cli.core.errors import LinfusionError, UsageError
from linfusion_cli.core.fs import expand_home, is_file, is_folder
from linfusion_cli.models.families.facts import FAMILY_NAMES, read_config, read_facts
from linfusion_cli.models.files.header import read_header
from linfusion_cli.models.files.hub import download_repository, is_network_repository
from linfusion_cli.models.files.layout import CONVERT_HINT, LINFUSION_FOLDER, Model
from linfusion_cli.models.locate.files import LORA_KIND, FileKind, download_file, is_lora, split_hub_path
from linfusion_cli.models.locate.model import DEMO, DEMO_FOLDER, PUBLISHED_LINFUSION
from linfusion_cli.settings.sources.presets import is_preset_file

PULL_KIND = FileKind("models pull", "a model", LORA_KIND.standard_names, CONVERT_HINT)

Notify = Callable[[str], None]


@dataclass(frozen=True)
class InventoryEntry:
    """A local model: name for options, description, bytes on disk, commit in the hub, and folder."""

    name: str
    what: str
    bytes: int
    revision: str
    path: Path


def list_local_models() -> Iterator[InventoryEntry]:
    """Yield the embedded model and all snapshots of model repositories in the hub cache."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    size = sum(file.stat().st_size for file in DEMO_FOLDER.rglob("*") if file.is_file())
    yield InventoryEntry(DEMO, f"{describe_snapshot(DEMO_FOLDER)}, embedded", size, "", DEMO_FOLDER)
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        for revision in repository.revisions if repository.repo_type == "model" else ():
            folder = Path(revision.snapshot_path)
            yield InventoryEntry(
                repository.repo_id, describe_snapshot(folder), revision.size_on_disk, revision.commit_hash, folder
            )


def pull_model(name: str, configs: bool, notify: Notify) -> Iterator[Path]:
    """Download `name` and its LinFusion weights; yield the path of each download when it is complete.

    Raise UsageError if `name` is local, Unavailable if a download fails.
    """
    for source in resolve_pull_names(name):
        notify(f"Downloading {source}")
        path = pull_one(source, configs)
        yield path
        if not configs and is_file(path / "model_index.json") and not is_folder(path / LINFUSION_FOLDER):
            linfusion = PUBLISHED_LINFUSION[read_facts(Model(path)).family]
            notify(f"Downloading {linfusion}")
            yield download_repository(linfusion, "")


def resolve_pull_names(name: str) -> list[str]:
    """Return the hub names in the preset `name`, or `name` itself.

    Raise UsageError if it is neither a preset nor a hub id, or a model that is already on this machine.
    """
    if is_folder(expand_home(name)) or is_file(expand_home(name)) or name == DEMO:
        raise UsageError(f"{name} is already on this machine.", "Use a hub id or a preset.")
    if not is_preset_file(name) and name not in settings.list_preset_names():
        if "/" not in name:
            raise build_unknown_name_error(name)
        return [name]
    values = settings.raise_errors(settings.read_preset_layer(name)).values
    if "model" not in values:
        raise UsageError(f"The preset {name} sets no model.", "Use a hub id, or a preset with a model.")
    return [values["model"], *(lora.model for lora in values.get("lora", ()))]


def build_unknown_name_error(name: str) -> UsageError:
    """Return the error for a name that is neither a preset nor OWNER/REPO, with the nearest preset."""
    names = settings.list_preset_names()
    nearest = difflib.get_close_matches(name.lower(), names, 1)
    suggestion = f"Did you mean {nearest[0]}? " if nearest else ""
    hint = f"{suggestion}Use a preset ({', '.join(names)}) or a hub id, OWNER/REPO."
    return UsageError(f"There is no preset {name!r}.", hint)


def pull_one(name: str, configs: bool) -> Path:
    """Download a repository, or one file of it."""
    repository, file = split_hub_path(PULL_KIND, name)
    if file is None and (configs or is_network_repository(name)):
        return download_repository(name, "", configs)
    return download_file(PULL_KIND, name, repository, file).path


def describe_snapshot(folder: Path) -> str:
    """Describe the snapshot of a hub repository by its configs, and whether its weights are complete."""
    try:
        if is_file(folder / "model_index.json"):
            model = Model(folder)
            has_weights = [bool(model.get_part(name).weights) for name in ("unet", "vae", "text_encoder")]
            state = "" if all(has_weights) else ", weights incomplete" if any(has_weights) else ", configs only"
            return FAMILY_NAMES[read_facts(model).family] + state
        if is_file(folder / "config.json"):
            return read_config(folder / "config.json").get("_class_name") or "unknown"
        files = sorted(folder.rglob("*.safetensors"))
        return "LoRA" if any(is_lora(read_header(file)) for file in files) else "unknown"
    except LinfusionError as error:
        return f"unusable: {error.message}"
