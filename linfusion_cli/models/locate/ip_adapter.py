"""Locate IP-Adapters and their image encoders, and detect the kind of an adapter. Needs no torch."""

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

PathT = TypeVar("PathT", bound=PurePath)

FLAG = "--ip-adapter"
PUBLISHED_ADAPTERS = {"sd15": "models/ip-adapter_sd15.safetensors", "sdxl": "sdxl_models/ip-adapter_sdxl.safetensors"}
# Adapter kinds are identified by a tensor of the image projection. Its width must equal a field of the encoder config;
# the last tensor of the projection must have the width of the text embeddings.
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
}  # defaults of CLIPVisionConfig
FACE_ID_PREFIXES = ("perceiver_resampler.", "norm.weight")
SUPPORTED_KINDS_HINT = "Use an IP-Adapter of the kind standard, Plus, Plus Face or Full Face."
CONVERT_ADAPTER_HINT = (
    "Convert it to safetensors with tensor names image_proj.* and ip_adapter.*, or use another IP-Adapter."
)
ENCODER_FOLDER = "image_encoder"  # the folder of an image encoder, next to an adapter or in a parent folder
NAME_ENCODER_HINT = "set --ip-image-encoder to its folder."


@dataclass(frozen=True)
class AdapterFile:
    """A weights file of an IP-Adapter with the shapes of its tensors."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def kind(self) -> str:
        """The tensor of the image projection that identifies the kind: a key of `ENCODER_WIDTH_FIELDS`."""
        return next(name for name in ENCODER_WIDTH_FIELDS if f"image_proj.{name}" in self.shapes)

    @property
    def is_patch_based(self) -> bool:
        """Whether it takes the patches of the encoder's penultimate layer instead of the pooled embedding."""
        return self.kind != PLAIN_KIND

    def fits(self, encoder: Mapping[str, Any]) -> bool:
        """Return whether the embeddings of an image encoder with this config have the required width."""
        width = ENCODER_WIDTH_FIELDS[self.kind]
        vision = encoder.get("vision_config") or encoder
        return self.shapes[f"image_proj.{self.kind}"][-1] == vision.get(width, DEFAULT_CLIP_WIDTHS[width])


@dataclass(frozen=True)
class Adapter:
    """An IP-Adapter, the folder of its image encoder, its image, and the scale of its attention."""

    weights: AdapterFile
    encoder: Path
    image: SourceImage
    scale: float


def find_adapter(name: str, family: str, download: bool = False) -> FileLocation:
    """Locate the IP-Adapter `name` like `find_file`; in folders and repositories prefer the published one for `family`.

    Raise DataError for FaceID adapters, by their names.
    """
    path, published = expand_home(name), PUBLISHED_ADAPTERS.get(family, "")
    is_pickle = path.suffix.lower() in PICKLE_SUFFIXES
    if "faceid" in path.name.lower() and (is_pickle or not is_file(path)):  # of files, `read_adapter` checks the header
        raise build_face_id_error(name)
    standard_names = (published, PurePath(published).name) if published else ()
    return find_file(
        FileKind(FLAG, "an IP-Adapter", standard_names, CONVERT_ADAPTER_HINT, ENCODER_FOLDER), name, download
    )


def build_face_id_error(name: object) -> DataError:
    """Return the error for an IP-Adapter that needs face embeddings."""
    return DataError(
        f"{FLAG} {name} is a FaceID adapter, which is not supported: it needs a face recognition model.",
        SUPPORTED_KINDS_HINT,
    )


def read_adapter(file: Path) -> AdapterFile:
    """Read the header of `file`; raise DataError if it is not an IP-Adapter, or one of an unsupported kind."""
    header = read_header(file)
    header.check_dtypes()
    shapes = header.shapes
    names = {name.removeprefix("image_proj.") for name in shapes if name.startswith("image_proj.")}
    other = sorted(name for name in shapes if not name.startswith(("image_proj.", "ip_adapter.")))
    if other or not names or not any(name.startswith("ip_adapter.") for name in shapes):
        problem = f"it has the tensor {other[0]}" if other else "it needs tensors image_proj.* and ip_adapter.*"
        raise DataError(f"{file} is not an IP-Adapter: {problem}.", "Use the safetensors file of an IP-Adapter.")
    if any(name.startswith(FACE_ID_PREFIXES) for name in names) and "proj.weight" not in names:
        raise build_face_id_error(file)
    kind = next((name for name in ENCODER_WIDTH_FIELDS if name in names and OUTPUT_TENSORS[name] in names), None)
    if kind is None or not all(shapes[f"image_proj.{name}"] for name in (kind, OUTPUT_TENSORS[kind])):
        raise DataError(
            f"{file} is an IP-Adapter of an unknown kind: it has the tensor image_proj.{min(names)}.",
            SUPPORTED_KINDS_HINT,
        )
    return AdapterFile(file, shapes)


def find_encoder(name: str, adapter: AdapterFile, location: FileLocation, download: bool = False) -> Path:
    """Return the folder of the image encoder for `adapter`: `name`, or for `auto` one near the adapter that fits.

    Raise Unavailable if no encoder is found, DataError if the encoder `name` does not fit.
    """
    if name != "auto":
        return find_named_encoder(name, adapter)
    folders = list_encoder_folders(adapter.file)
    encoder = next((path for path in folders if has_fitting_encoder(path, adapter) and find_weights_files(path)), None)
    if encoder is None and download and location.repository:
        encoder = download_encoder(location, adapter)
    if encoder is None:
        searched = ", ".join(f"{path}{'' if is_folder(path) else ' (does not exist)'}" for path in folders)
        reason = f"No image encoder fits {adapter.file} (searched: {searched})."
        raise Unavailable(reason, f"Add --download if the adapter is from the hub, or {NAME_ENCODER_HINT}")
    return encoder


def find_named_encoder(name: str, adapter: AdapterFile) -> Path:
    """Return the folder `name` or its subfolder `image_encoder`; raise Unavailable or DataError."""
    folder = expand_home(name)
    if not is_folder(folder):
        raise Unavailable(f"--ip-image-encoder {name} is not an existing folder.", "Check the path.")
    folder = folder if is_file(folder / "config.json") else folder / ENCODER_FOLDER
    if not adapter.fits(read_config(folder / "config.json")):
        field, width = ENCODER_WIDTH_FIELDS[adapter.kind], adapter.shapes[f"image_proj.{adapter.kind}"][-1]
        reason = f"The image encoder in {folder} does not fit {adapter.file}, which needs {field} {width}."
        raise DataError(reason, "Use the encoder that was published with the adapter.")
    return folder


def list_encoder_folders(file: PathT) -> list[PathT]:
    """Return candidate folders for the encoder of a weights file; some SDXL adapters use the encoder of SD 1.5."""
    root = file.parent.parent
    folders = (file.parent / ENCODER_FOLDER, root / ENCODER_FOLDER, root / "models" / ENCODER_FOLDER)
    return list(dict.fromkeys(folders))


def has_fitting_encoder(folder: Path, adapter: AdapterFile) -> bool:
    """Return whether `folder` has the config of an encoder that fits the adapter."""
    return is_file(folder / "config.json") and adapter.fits(read_config(folder / "config.json"))


def download_encoder(location: FileLocation, adapter: AdapterFile) -> Path | None:
    """Download the encoder that fits from the adapter's repository, or return None; raise Unavailable."""
    from huggingface_hub import hf_hub_download, list_repo_files

    repository, revision = split_revision(location.repository)
    with translate_hub_errors(location.repository, FLAG):
        files = list_repo_files(repository, revision=revision)
        for folder in list_encoder_folders(PurePosixPath(location.path_in_repository)):
            folder_files = [file for file in files if PurePosixPath(file).parent == folder]
            if str(folder / "config.json") not in folder_files:
                continue
            encoder = Path(hf_hub_download(repository, str(folder / "config.json"), revision=revision)).parent
            if adapter.fits(read_config(encoder / "config.json")):
                for file in select_encoder_files(folder_files):
                    hf_hub_download(repository, file, revision=revision)
                return encoder
    return None


def select_encoder_files(files: list[str]) -> list[str]:
    """Return the preprocessor config and the weights of an encoder, in full precision if available."""
    weights = [file for file in files if file.endswith(".safetensors")]
    full = [file for file in weights if ".fp16" not in file]
    return [*(file for file in files if file.endswith("preprocessor_config.json")), *(full or weights)]
