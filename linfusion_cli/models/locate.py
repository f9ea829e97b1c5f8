"""Where a model is: embedded, a folder, or a hub id in the local cache. Nothing is downloaded unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from linfusion_cli.errors import DataError, Unavailable, first_line
from linfusion_cli.models.families import read_config, read_facts
from linfusion_cli.units import is_file, is_folder, user_path

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
MODEL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PUBLISHED_LINFUSION = {
    "sdxl": "Yuanshi/LinFusion-XL",
    "sd21": "Yuanshi/LinFusion-2-1",
    "sd15": "Yuanshi/LinFusion-1-5",
}
LINFUSION_WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL_FILES = ("*.json", "*.txt", "*.model")


def find_model(name: str, download: bool = False) -> Path:
    """The folder of the model `name`: `demo`, a diffusers folder, or a hub id; raises Unavailable or DataError."""
    if name == DEMO:
        return DEMO_FOLDER
    folder = user_path(name)
    if is_file(folder):
        raise DataError(f"--model {name} is a file.", "Name a folder in diffusers' layout, a hub id, or demo.")
    if not is_folder(folder):
        return find_in_hub(name, download, "--model", has_all_parts)
    if not is_file(folder / "model_index.json"):
        raise DataError(f"--model {name} has no model_index.json.", "Name a folder in diffusers' layout.")
    return folder


def find_linfusion(name: str, model: Path, family: str, download: bool = False) -> Path | None:
    """The folder of LinFusion weights `name`: a folder, a hub id, `none`, or `auto`.

    `auto` means those that lie in the model's own folder `linfusion`, else those published for its family.
    """
    if name == "none":
        return None
    if name == "auto" and is_folder(model / "linfusion"):
        return model / "linfusion"
    name = PUBLISHED_LINFUSION[family] if name == "auto" else name
    folder = user_path(name)
    return folder if is_folder(folder) else find_in_hub(name, download, "--linfusion", has_linfusion)


def find_vae(name: str, model: Path, download: bool = False) -> Path:
    """The folder of the VAE `name`: a VAE's own or a model's, a hub id, or `auto`, the one in the folder `model`."""
    if name == "auto":
        return model / "vae"
    folder = DEMO_FOLDER if name == DEMO else user_path(name)
    if is_file(folder):
        raise DataError(f"--vae {name} is a file.", "Name a folder in diffusers' layout, or a hub id.")
    if not is_folder(folder):
        folder = find_in_hub(name, download, "--vae", has_vae)
    folder = folder / "vae" if is_folder(folder / "vae") else folder
    if not is_file(folder / "config.json"):
        raise DataError(f"--vae {name} has no config.json.", "Name a folder in diffusers' layout.")
    return folder


def has_vae(folder: Path) -> bool:
    """Whether `folder` is a VAE's with its weights, or a model's with one."""
    return any(is_file(part / "config.json") and bool(weights_files(part)) for part in (folder, folder / "vae"))


def is_here(name: str) -> bool:
    """Whether the model, with the weights of all its parts and LinFusion's for its family, is on this machine."""
    try:
        folder = find_model(name)
        linfusion = find_linfusion("auto", folder, read_facts(folder).family)
        return has_all_parts(folder) and linfusion is not None and has_linfusion(linfusion)
    except (Unavailable, DataError):
        return False


def has_all_parts(folder: Path) -> bool:
    """Whether the model in `folder` has the weights of every part that its index names."""
    try:
        index = read_config(folder / "model_index.json")
        return all(weights_files(folder / part) for part in MODEL_PARTS if part in index)
    except (Unavailable, DataError):
        return False


def has_linfusion(folder: Path) -> bool:
    """Whether LinFusion's weights lie in `folder`."""
    return is_file(folder / LINFUSION_WEIGHTS)


def find_in_hub(name: str, download: bool, kind: str, is_complete: Callable[[Path], bool]) -> Path:
    """The snapshot of hub id `name` in the local cache; what is not complete there is fetched, if `download`."""
    found = cached(name, kind)
    if found is not None and (not download or is_complete(found)):
        return found
    if download:
        return fetch(name, kind)
    way_out = "Add --download to fetch it, name a folder, or use --preset demo, which is embedded."
    raise Unavailable(f"{kind} {name} is not on this machine.", way_out)


def cached(name: str, kind: str) -> Path | None:
    """The snapshot of hub id `name` in the local cache, complete or not; raises Unavailable for what is no hub id."""
    from huggingface_hub import logging, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    logging.set_verbosity_error()
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except (HFValidationError, OSError) as error:
        raise Unavailable(f"{kind} {name}: there is no such folder, and it is no hub id.", "Check it.") from error


def fetch(name: str, kind: str) -> Path:
    """Download what is needed of hub id `name` into the local cache -> its snapshot; raises Unavailable."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    # The hub's HTTP library differs between its versions; its own error derives from that one's, and from OSError.
    network_errors = HfHubHTTPError.__bases__
    try:
        return Path(snapshot_download(name, allow_patterns=download_patterns(name)))
    except RepositoryNotFoundError as error:
        way_out = "Check the name; a private or gated one needs HF_TOKEN."
        raise Unavailable(f"{kind} {name}: the hub has no such repository.", way_out) from error
    except (*network_errors, ValueError) as error:
        raise Unavailable(f"{kind} {name} could not be fetched ({first_line(error)}).", "Try again later.") from error


def download_patterns(name: str) -> list[str]:
    """What of a repository is needed: its configs and, of each part, the half-precision weights where there are any."""
    from huggingface_hub import list_repo_files

    weights = [file for file in list_repo_files(name) if file.endswith(".safetensors")]
    wanted = []
    for folder in {str(Path(file).parent) for file in weights} & {*MODEL_PARTS, "."}:
        files = [file for file in weights if str(Path(file).parent) == folder]
        half = [file for file in files if ".fp16" in file]
        wanted += half or [file for file in files if folder != "." or file == "diffusion_pytorch_model.safetensors"]
    return [*SMALL_FILES, *(f"*/{pattern}" for pattern in SMALL_FILES), *sorted(wanted)]


def weights_files(part: Path) -> list[Path]:
    """The safetensors files of a part of a model: the plain variant, else fp16; raises DataError for pickles."""
    plain = sorted(path for path in part.glob("*.safetensors") if ".fp16" not in path.name)
    files = plain or sorted(part.glob("*.fp16*.safetensors"))
    pickles = [*part.glob("*.bin"), *part.glob("*.ckpt"), *part.glob("*.pt")]
    if not files and pickles:
        raise DataError(
            f"{pickles[0]} is a pickle, which can run code when it is opened.",
            "Convert the model to safetensors (diffusers: save_pretrained(..., safe_serialization=True)).",
        )
    return files
