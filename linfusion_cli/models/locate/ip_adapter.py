"""Where an IP-Adapter and its image encoder are, and what a weights file's header says. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.core.fs import expand_home, is_file, is_folder
from linfusion_cli.images.read.source import SourceImage
from linfusion_cli.models.families.facts import read_config
from linfusion_cli.models.files.header import read_header
from linfusion_cli.models.files.hub import split_revision, translate_hub_errors
from linfusion_cli.models.files.layout import PICKLE_SUFFIXES, find_weights_files
from linfusion_cli.models.locate.files import FileKind, FileLocation, find_file

PathT = TypeVar("P", bound=PurePath)

FLAG = "--ip-adapter"
PUBLISHED_ADAPTERS = {"sd15": "models/ip-adapter_sd15.safetensors", "sdxl": "sdxl_models/ip-adapter_sdxl.safetensors"}
# By the tensor that tells a kind: where its projection ends, and what of the encoder's config must be as wide as it.
ENCODER_WIDTH_FIELDS = {
    "proj.weight": "projection_dim",
    "proj_in.weight": "hidden_size",
    "proj.0.weight": "hidden_size",
}
OUTPUT_TENSORS = {"proj.weight": "proj.weight", "proj_in.weight": "proj_out.weight", "proj.0.weight": "proj.3.weight"}
PLAIN_KIND = "proj.weight"
DEFAULT_CLIP_WIDTHS = {
    "projection_dim": 512,
    "hidden_size": 768,
}  # what CLIPVisionConfig means where a config is silent
FACE_ID_PREFIXES = ("perceiver_resampler.", "norm.weight")
SUPPORTED_KINDS_HINT = "Use an IP-Adapter, a Plus, a Plus Face or a Full Face one."
CONVERT_ADAPTER_HINT = (
    "Convert it to safetensors, with the tensors named image_proj.* and ip_adapter.*, or use another one."
)
ENCODER_FOLDER = "image_encoder"  # the folder of an image encoder, beside an adapter or above it
NAME_ENCODER_HINT = "name its folder with --ip-image-encoder."


@dataclass(frozen=True)
class AdapterFile:
    """An IP-Adapter's weights file: the shapes of its tensors, by their names."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def kind(self) -> str:
        """The tensor of the image projection that tells which kind it is: a key of `INPUTS`."""
        return next(name for name in ENCODER_WIDTH_FIELDS if f"image_proj.{name}" in self.shapes)

    @property
    def is_patch_based(self) -> bool:
        """Whether it listens to every patch, at the encoder's last layer but one, and not to its summary."""
        return self.kind != PLAIN_KIND

    def fits(self, encoder: Mapping[str, Any]) -> bool:
        """Whether it takes what an image encoder of this config makes."""
        width = ENCODER_WIDTH_FIELDS[self.kind]
        vision = encoder.get("vision_config") or encoder
        return self.shapes[f"image_proj.{self.kind}"][-1] == vision.get(width, DEFAULT_CLIP_WIDTHS[width])


@dataclass(frozen=True)
class Adapter:
    """An IP-Adapter, its image encoder's folder, the picture it is given, and how much of it is added."""

    weights: AdapterFile
    encoder: Path
    image: SourceImage
    scale: float


def find_adapter(name: str, family: str, download: bool = False) -> FileLocation:
    """The IP-Adapter `name`, as `find_file`; of a folder or repository the one published for `family`, if it is there.

    Raises DataError for FaceID adapters, by their names.
    """
    path, published = expand_home(name), PUBLISHED_ADAPTERS.get(family, "")
    is_pickle = path.suffix.lower() in PICKLE_SUFFIXES
    if "faceid" in path.name.lower() and (is_pickle or not is_file(path)):  # what a file is, its header says
        raise build_face_id_error(name)
    usual = (published, PurePath(published).name) if published else ()
    return find_file(FileKind(FLAG, "an IP-Adapter", usual, CONVERT_ADAPTER_HINT, ENCODER_FOLDER), name, download)


def build_face_id_error(name: object) -> DataError:
    """The error for an IP-Adapter that listens to a face recogniser, which is not here."""
    return DataError(
        f"{FLAG} {name} is a FaceID adapter, which needs a face recogniser that is not here.", SUPPORTED_KINDS_HINT
    )


def read_adapter(file: Path) -> AdapterFile:
    """What the header of `file` says; raises DataError for what is no IP-Adapter, or one of a kind not supported."""
    header = read_header(file)
    header.check_dtypes()
    shapes = header.shapes
    names = {name.removeprefix("image_proj.") for name in shapes if name.startswith("image_proj.")}
    other = sorted(name for name in shapes if not name.startswith(("image_proj.", "ip_adapter.")))
    if other or not names or not any(name.startswith("ip_adapter.") for name in shapes):
        holds = other[0] if other else "no image_proj.* and ip_adapter.* together"
        raise DataError(f"{file} is no IP-Adapter: it holds {holds}.", "Name an IP-Adapter's safetensors file.")
    if any(name.startswith(FACE_ID_PREFIXES) for name in names) and "proj.weight" not in names:
        raise build_face_id_error(file)
    kind = next((name for name in ENCODER_WIDTH_FIELDS if name in names and OUTPUT_TENSORS[name] in names), None)
    if kind is None or not all(shapes[f"image_proj.{name}"] for name in (kind, OUTPUT_TENSORS[kind])):
        raise DataError(
            f"{file} is an IP-Adapter of an unknown kind: it holds image_proj.{min(names)}.", SUPPORTED_KINDS_HINT
        )
    return AdapterFile(file, shapes)


def find_encoder(name: str, adapter: AdapterFile, location: FileLocation, download: bool = False) -> Path:
    """The folder of the image encoder for `adapter`: `name`, or for `auto` the one near the file that fits it.

    Raises Unavailable where there is none, DataError where the one that was named does not fit.
    """
    if name != "auto":
        return find_named_encoder(name, adapter)
    places = list_encoder_folders(adapter.file)
    found = next((place for place in places if has_fitting_encoder(place, adapter) and find_weights_files(place)), None)
    if found is None and download and location.repository:
        found = download_encoder(location, adapter)
    if found is None:
        looked = ", ".join(f"{place}{'' if is_folder(place) else ' (not there)'}" for place in places)
        reason = f"No image encoder that fits {adapter.file} was found in {looked}."
        raise Unavailable(reason, f"Add --download where it is the hub's, or {NAME_ENCODER_HINT}")
    return found


def find_named_encoder(name: str, adapter: AdapterFile) -> Path:
    """The folder `name` or its `image_encoder`; raises Unavailable or DataError."""
    folder = expand_home(name)
    if not is_folder(folder):
        raise Unavailable(f"--ip-image-encoder {name}: there is no such folder.", "Check it.")
    folder = folder if is_file(folder / "config.json") else folder / ENCODER_FOLDER
    if not adapter.fits(read_config(folder / "config.json")):
        width, wanted = ENCODER_WIDTH_FIELDS[adapter.kind], adapter.shapes[f"image_proj.{adapter.kind}"][-1]
        reason = f"The image encoder in {folder} does not fit {adapter.file}, which takes a {width} of {wanted}."
        raise DataError(reason, "Use the encoder that was published with it.")
    return folder


def list_encoder_folders(file: PathT) -> list[PathT]:
    """Where the encoder for a weights file may lie: beside it, or above; some of SDXL's use that of SD 1.5."""
    above = file.parent.parent
    places = (file.parent / ENCODER_FOLDER, above / ENCODER_FOLDER, above / "models" / ENCODER_FOLDER)
    return list(dict.fromkeys(places))


def has_fitting_encoder(folder: Path, adapter: AdapterFile) -> bool:
    """Whether there is an encoder's config in `folder` that fits the adapter."""
    return is_file(folder / "config.json") and adapter.fits(read_config(folder / "config.json"))


def download_encoder(location: FileLocation, adapter: AdapterFile) -> Path | None:
    """Download the repository's encoder that fits the adapter, None if it has none; raises Unavailable."""
    from huggingface_hub import hf_hub_download, list_repo_files

    repository, revision = split_revision(location.repository)
    with translate_hub_errors(location.repository, FLAG):
        files = list_repo_files(repository, revision=revision)
        for folder in list_encoder_folders(PurePosixPath(location.path_in_repository)):
            inside = [file for file in files if PurePosixPath(file).parent == folder]
            if str(folder / "config.json") not in inside:
                continue
            found = Path(hf_hub_download(repository, str(folder / "config.json"), revision=revision)).parent
            if adapter.fits(read_config(found / "config.json")):
                for file in select_encoder_files(inside):
                    hf_hub_download(repository, file, revision=revision)
                return found
    return None


def select_encoder_files(files: list[str]) -> list[str]:
    """Which of an encoder's files are needed: how it takes pictures, and its weights, in full where there are both."""
    safe = [file for file in files if file.endswith(".safetensors")]
    full = [file for file in safe if ".fp16" not in file]
    return [*(file for file in files if file.endswith("preprocessor_config.json")), *(full or safe)]
