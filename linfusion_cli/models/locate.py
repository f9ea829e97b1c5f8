"""Where a model is: embedded, a folder, or a hub id in the local cache. Nothing is downloaded unless asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from linfusion_cli.errors import DataError, Unavailable, UsageError, first_line
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
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LARGEST_LORA_WEIGHT = 10.0
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
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
        raise pickled_lora(name)
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

    with hub_errors(name, "--lora"):
        return Path(hf_hub_download(repository, file or pick_lora(name, list_repo_files(repository))))


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
        raise pickled_lora(name)
    raise DataError(f"--lora {name} holds no safetensors file.", "Name a LoRA's safetensors file.")


def no_such_lora(name: str) -> Unavailable:
    """The error for what is neither on this machine nor a name on the hub."""
    return Unavailable(f"--lora {name}: there is no such file or folder, and it is no hub id.", "Check it.")


def pickled_lora(name: str) -> DataError:
    """The error for a LoRA that is a pickle, or of which there are only pickles."""
    way_out = "Convert it to safetensors, or use another LoRA."
    return DataError(f"--lora {name} is a pickle, which can run code when it is opened.", way_out)


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

    with hub_errors(name, kind):
        return Path(snapshot_download(name, allow_patterns=download_patterns(name)))


@contextmanager
def hub_errors(name: str, kind: str) -> Iterator[None]:
    """Within the context what the hub or the network refuses is an Unavailable that names `kind` and `name`."""
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

    # The hub's HTTP library differs between its versions; its own error derives from that one's, and from OSError.
    network_errors = HfHubHTTPError.__bases__
    try:
        yield
    except RepositoryNotFoundError as error:
        way_out = "Check the name; a private or gated one needs HF_TOKEN."
        raise Unavailable(f"{kind} {name}: the hub has no such repository.", way_out) from error
    except RemoteEntryNotFoundError as error:
        raise Unavailable(f"{kind} {name}: the hub's repository has no such file.", "Check the name.") from error
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
