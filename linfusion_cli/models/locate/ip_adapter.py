"""Where an IP-Adapter and its image encoder are, and what a weights file's header says. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.core.units import is_file, is_folder, user_path
from linfusion_cli.images.read.source import SourceImage
from linfusion_cli.models.families.facts import read_config
from linfusion_cli.models.files.header import read_header
from linfusion_cli.models.files.hub import hub_errors, split_revision
from linfusion_cli.models.files.parts import PICKLES, weights_files
from linfusion_cli.models.locate.files import FoundFile, Kind, find_file

P = TypeVar("P", bound=PurePath)

FLAG = "--ip-adapter"
PUBLISHED = {"sd15": "models/ip-adapter_sd15.safetensors", "sdxl": "sdxl_models/ip-adapter_sdxl.safetensors"}
# By the tensor that tells a kind: where its projection ends, and what of the encoder's config must be as wide as it.
INPUTS = {"proj.weight": "projection_dim", "proj_in.weight": "hidden_size", "proj.0.weight": "hidden_size"}
OUTPUTS = {"proj.weight": "proj.weight", "proj_in.weight": "proj_out.weight", "proj.0.weight": "proj.3.weight"}
PLAIN = "proj.weight"
CLIP_WIDTHS = {"projection_dim": 512, "hidden_size": 768}  # what CLIPVisionConfig means where a config is silent
FACE_ID = ("perceiver_resampler.", "norm.weight")
OTHER_KIND = "Use an IP-Adapter, a Plus, a Plus Face or a Full Face one."
CONVERT_ADAPTER = "Convert it to safetensors, with the tensors named image_proj.* and ip_adapter.*, or use another one."
ENCODER = "image_encoder"  # the folder of an image encoder, beside an adapter or above it
NAME_ENCODER = "name its folder with --ip-image-encoder."


@dataclass(frozen=True)
class AdapterFile:
    """An IP-Adapter's weights file: the shapes of its tensors, by their names."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def kind(self) -> str:
        """The tensor of the image projection that tells which kind it is: a key of `INPUTS`."""
        return next(name for name in INPUTS if f"image_proj.{name}" in self.shapes)

    @property
    def hears_patches(self) -> bool:
        """Whether it listens to every patch, at the encoder's last layer but one, and not to its summary."""
        return self.kind != PLAIN

    def fits(self, encoder: Mapping[str, Any]) -> bool:
        """Whether it takes what an image encoder of this config makes."""
        width = INPUTS[self.kind]
        vision = encoder.get("vision_config") or encoder
        return self.shapes[f"image_proj.{self.kind}"][-1] == vision.get(width, CLIP_WIDTHS[width])


@dataclass(frozen=True)
class Adapter:
    """An IP-Adapter, its image encoder's folder, the picture it is given, and how much of it is added."""

    weights: AdapterFile
    encoder: Path
    image: SourceImage
    scale: float


def find_adapter(name: str, family: str, download: bool = False) -> FoundFile:
    """The IP-Adapter `name`, as `find_file`; of a folder or repository the one published for `family`, if it is there.

    Raises DataError for FaceID adapters, by their names.
    """
    path, published = user_path(name), PUBLISHED.get(family, "")
    is_pickle = path.suffix.lower() in PICKLES
    if "faceid" in path.name.lower() and (is_pickle or not is_file(path)):  # what a file is, its header says
        raise face_id(name)
    usual = (published, PurePath(published).name) if published else ()
    return find_file(Kind(FLAG, "an IP-Adapter", usual, CONVERT_ADAPTER, ENCODER), name, download)


def face_id(name: object) -> DataError:
    """The error for an IP-Adapter that listens to a face recogniser, which is not here."""
    return DataError(f"{FLAG} {name} is a FaceID adapter, which needs a face recogniser that is not here.", OTHER_KIND)


def read_adapter(file: Path) -> AdapterFile:
    """What the header of `file` says; raises DataError for what is no IP-Adapter, or one of a kind not supported."""
    header = read_header(file)
    header.check_types()
    shapes = header.shapes
    names = {name.removeprefix("image_proj.") for name in shapes if name.startswith("image_proj.")}
    other = sorted(name for name in shapes if not name.startswith(("image_proj.", "ip_adapter.")))
    if other or not names or not any(name.startswith("ip_adapter.") for name in shapes):
        holds = other[0] if other else "no image_proj.* and ip_adapter.* together"
        raise DataError(f"{file} is no IP-Adapter: it holds {holds}.", "Name an IP-Adapter's safetensors file.")
    if any(name.startswith(FACE_ID) for name in names) and "proj.weight" not in names:
        raise face_id(file)
    kind = next((name for name in INPUTS if name in names and OUTPUTS[name] in names), None)
    if kind is None or not all(shapes[f"image_proj.{name}"] for name in (kind, OUTPUTS[kind])):
        raise DataError(f"{file} is an IP-Adapter of an unknown kind: it holds image_proj.{min(names)}.", OTHER_KIND)
    return AdapterFile(file, shapes)


def find_encoder(name: str, adapter: AdapterFile, location: FoundFile, download: bool = False) -> Path:
    """The folder of the image encoder for `adapter`: `name`, or for `auto` the one near the file that fits it.

    Raises Unavailable where there is none, DataError where the one that was named does not fit.
    """
    if name != "auto":
        return named_encoder(name, adapter)
    places = encoder_folders(adapter.file)
    found = next((place for place in places if fitting(place, adapter) and weights_files(place)), None)
    if found is None and download and location.repository:
        found = fetch_encoder(location, adapter)
    if found is None:
        looked = ", ".join(f"{place}{'' if is_folder(place) else ' (not there)'}" for place in places)
        reason = f"No image encoder that fits {adapter.file} was found in {looked}."
        raise Unavailable(reason, f"Add --download where it is the hub's, or {NAME_ENCODER}")
    return found


def named_encoder(name: str, adapter: AdapterFile) -> Path:
    """The folder `name` or its `image_encoder`; raises Unavailable or DataError."""
    folder = user_path(name)
    if not is_folder(folder):
        raise Unavailable(f"--ip-image-encoder {name}: there is no such folder.", "Check it.")
    folder = folder if is_file(folder / "config.json") else folder / ENCODER
    if not adapter.fits(read_config(folder / "config.json")):
        width, wanted = INPUTS[adapter.kind], adapter.shapes[f"image_proj.{adapter.kind}"][-1]
        reason = f"The image encoder in {folder} does not fit {adapter.file}, which takes a {width} of {wanted}."
        raise DataError(reason, "Use the encoder that was published with it.")
    return folder


def encoder_folders(file: P) -> list[P]:
    """Where the encoder for a weights file may lie: beside it, or above; some of SDXL's use that of SD 1.5."""
    above = file.parent.parent
    places = (file.parent / ENCODER, above / ENCODER, above / "models" / ENCODER)
    return list(dict.fromkeys(places))


def fitting(folder: Path, adapter: AdapterFile) -> bool:
    """Whether there is an encoder's config in `folder` that fits the adapter."""
    return is_file(folder / "config.json") and adapter.fits(read_config(folder / "config.json"))


def fetch_encoder(location: FoundFile, adapter: AdapterFile) -> Path | None:
    """Download the repository's encoder that fits the adapter, None if it has none; raises Unavailable."""
    from huggingface_hub import hf_hub_download, list_repo_files

    repository, revision = split_revision(location.repository)
    with hub_errors(location.repository, FLAG):
        files = list_repo_files(repository, revision=revision)
        for folder in encoder_folders(PurePosixPath(location.inside)):
            inside = [file for file in files if PurePosixPath(file).parent == folder]
            if str(folder / "config.json") not in inside:
                continue
            found = Path(hf_hub_download(repository, str(folder / "config.json"), revision=revision)).parent
            if adapter.fits(read_config(found / "config.json")):
                for file in needed(inside):
                    hf_hub_download(repository, file, revision=revision)
                return found
    return None


def needed(files: list[str]) -> list[str]:
    """Which of an encoder's files are needed: how it takes pictures, and its weights, in full where there are both."""
    safe = [file for file in files if file.endswith(".safetensors")]
    full = [file for file in safe if ".fp16" not in file]
    return [*(file for file in files if file.endswith("preprocessor_config.json")), *(full or safe)]
