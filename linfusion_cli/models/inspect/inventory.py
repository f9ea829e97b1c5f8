"""Which models are on this machine, and the way of others to it. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli import settings
from linfusion_cli.core.errors import LinfusionError, UsageError
from linfusion_cli.core.units import is_file, is_folder, user_path
from linfusion_cli.models.families.facts import FAMILY_NAMES, read_config, read_facts
from linfusion_cli.models.files.header import read_header
from linfusion_cli.models.files.hub import fetch, is_fetched_whole
from linfusion_cli.models.files.parts import CONVERT, LINFUSION, Model
from linfusion_cli.models.locate.files import LORA, Kind, fetch_file, is_lora, split_hub_name
from linfusion_cli.models.locate.model import DEMO, DEMO_FOLDER, PUBLISHED_LINFUSION

PULLED = Kind("models pull", "a model", LORA.usual, CONVERT)

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One model: its name as options take it, what it is, its bytes on disk, the commit of a hub's, and its folder."""

    name: str
    what: str
    bytes: int
    revision: str
    path: Path


def on_this_machine() -> Iterator[Entry]:
    """The embedded model, and every snapshot of a model's repository in the hub's cache."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    size = sum(file.stat().st_size for file in DEMO_FOLDER.rglob("*") if file.is_file())
    yield Entry(DEMO, f"{described(DEMO_FOLDER)}, embedded", size, "", DEMO_FOLDER)
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        for revision in repository.revisions if repository.repo_type == "model" else ():
            folder = Path(revision.snapshot_path)
            yield Entry(repository.repo_id, described(folder), revision.size_on_disk, revision.commit_hash, folder)


def pulled(name: str, configs: bool, say: Notify) -> Iterator[Path]:
    """Fetch `name` and what it needs; where each thing lies, as it arrives. Raises UsageError or Unavailable."""
    for wanted in wanted_by(name):
        say(f"Fetching {wanted}")
        path = fetched(wanted, configs)
        yield path
        if not configs and is_file(path / "model_index.json") and not is_folder(path / LINFUSION):
            linfusion = PUBLISHED_LINFUSION[read_facts(Model(path)).family]
            say(f"Fetching {linfusion}")
            yield fetch(linfusion, "")


def wanted_by(name: str) -> list[str]:
    """The hub's names that a preset means, or `name` itself; raises UsageError for what is on this machine anyway."""
    if is_folder(user_path(name)) or is_file(user_path(name)) or name == DEMO:
        raise UsageError(f"{name} is on this machine already.", "Name a hub id or a preset.")
    if name not in settings.preset_names():
        return [name]
    values = settings.preset_layer(name).values
    return [values["model"], *values.get("lora", ())]


def fetched(name: str, configs: bool) -> Path:
    """One repository, or one file of it, from the hub."""
    repository, file = split_hub_name(PULLED, name)
    if file is None and (configs or is_fetched_whole(name)):
        return fetch(name, "", configs)
    return fetch_file(PULLED, name, repository, file).path


def described(folder: Path) -> str:
    """What the snapshot of a hub repository is, at a glance: by its configs, and whether weights are there."""
    try:
        if is_file(folder / "model_index.json"):
            model = Model(folder)
            have = [bool(model.part(name).weights) for name in ("unet", "vae", "text_encoder")]
            lacks = "" if all(have) else ", weights incomplete" if any(have) else ", configs alone"
            return FAMILY_NAMES[read_facts(model).family] + lacks
        if is_file(folder / "config.json"):
            return read_config(folder / "config.json").get("_class_name") or "unknown"
        files = sorted(folder.rglob("*.safetensors"))
        return "LoRA" if any(is_lora(read_header(file)) for file in files) else "unknown"
    except LinfusionError as error:
        return f"not usable: {error.message}"
