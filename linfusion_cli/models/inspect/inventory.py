"""Which models are on this machine, and the way of others to it. Needs no torch."""

from __future__ import annotations

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

PULL_KIND = FileKind("models pull", "a model", LORA_KIND.standard_names, CONVERT_HINT)

Notify = Callable[[str], None]


@dataclass(frozen=True)
class InventoryEntry:
    """One model: its name as options take it, what it is, its bytes on disk, the commit of a hub's, and its folder."""

    name: str
    what: str
    bytes: int
    revision: str
    path: Path


def list_local_models() -> Iterator[InventoryEntry]:
    """The embedded model, and every snapshot of a model's repository in the hub's cache."""
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


def pull_model(name: str, configs: bool, say: Notify) -> Iterator[Path]:
    """Fetch `name` and what it needs; where each thing lies, as it arrives. Raises UsageError or Unavailable."""
    for wanted in resolve_pull_names(name):
        say(f"Fetching {wanted}")
        path = pull_one(wanted, configs)
        yield path
        if not configs and is_file(path / "model_index.json") and not is_folder(path / LINFUSION_FOLDER):
            linfusion = PUBLISHED_LINFUSION[read_facts(Model(path)).family]
            say(f"Fetching {linfusion}")
            yield download_repository(linfusion, "")


def resolve_pull_names(name: str) -> list[str]:
    """The hub's names that a preset means, or `name` itself; raises UsageError for what is on this machine anyway."""
    if is_folder(expand_home(name)) or is_file(expand_home(name)) or name == DEMO:
        raise UsageError(f"{name} is on this machine already.", "Name a hub id or a preset.")
    if name not in settings.preset_names():
        return [name]
    values = settings.preset_layer(name).values
    names = [values[key] for key in ("model",) if key in values] + list(values.get("lora", ()))
    if not names:
        raise UsageError(f"The preset {name} names no model.", "Name a hub id, or a preset with a model.")
    return names


def pull_one(name: str, configs: bool) -> Path:
    """One repository, or one file of it, from the hub."""
    repository, file = split_hub_path(PULL_KIND, name)
    if file is None and (configs or is_network_repository(name)):
        return download_repository(name, "", configs)
    return download_file(PULL_KIND, name, repository, file).path


def describe_snapshot(folder: Path) -> str:
    """What the snapshot of a hub repository is, at a glance: by its configs, and whether weights are there."""
    try:
        if is_file(folder / "model_index.json"):
            model = Model(folder)
            have = [bool(model.get_part(name).weights) for name in ("unet", "vae", "text_encoder")]
            lacks = "" if all(have) else ", weights incomplete" if any(have) else ", configs alone"
            return FAMILY_NAMES[read_facts(model).family] + lacks
        if is_file(folder / "config.json"):
            return read_config(folder / "config.json").get("_class_name") or "unknown"
        files = sorted(folder.rglob("*.safetensors"))
        return "LoRA" if any(is_lora(read_header(file)) for file in files) else "unknown"
    except LinfusionError as error:
        return f"not usable: {error.message}"
