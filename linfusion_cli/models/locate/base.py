"""The base of a fine-tune: where it is, and its UNet's self-attention, which is all that is read of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.core.fs import expand_home, is_file, is_folder
from linfusion_cli.models.files.header import read_header
from linfusion_cli.models.files.hub import (
    CONFIG_PATTERNS,
    build_download_patterns,
    find_snapshot,
    split_revision,
    translate_hub_errors,
)
from linfusion_cli.models.files.layout import Model, find_weights_files
from linfusion_cli.models.locate.model import DEMO, DEMO_FOLDER, FAMILY_BASES

if TYPE_CHECKING:
    from torch import Tensor

FLAG = "--linfusion-base"
MERGE_HINT = "or use --linfusion-merge published or keep"


def find_base(name: str, model: Model, linfusion: Path, family: str, download: bool = False) -> Path:
    """The folder of the base's UNet: of `demo`, a diffusers folder, a UNet's own, a hub id, or `auto`.

    `auto` is what the weights in `linfusion` were made for: the model in whose folder they lie, as the embedded one's
    do, else what those published for `family` were. Raises Unavailable when it is not on this machine and not to be
    fetched, DataError for what is no model.
    """
    if name == "auto":
        name = str(model.folder) if model.folder in (linfusion.parent, DEMO_FOLDER) else FAMILY_BASES[family]
    folder = DEMO_FOLDER if name == DEMO else expand_home(name)
    if is_file(folder):
        raise DataError(f"{FLAG} {name} is a file.", "Name a folder in diffusers' layout, a hub id, or demo.")
    if not is_folder(folder):
        folder = find_base_in_hub(name, download)
    unet = folder / "unet" if is_folder(folder / "unet") else folder
    if not find_weights_files(unet):
        raise DataError(f"{FLAG} {name} has no UNet's weights.", f"Name another base, {MERGE_HINT}.")
    return unet


def find_local_base(model: Model, linfusion: Path, family: str) -> Path | None:
    """As `find_base` for `auto`, None where it is not on this machine."""
    try:
        return find_base("auto", model, linfusion, family)
    except (Unavailable, DataError):
        return None


def find_base_in_hub(name: str, download: bool) -> Path:
    """The snapshot of hub id `name` in the local cache that has a UNet, fetched if `download`; raises Unavailable."""
    found = find_snapshot(name, FLAG)
    if found is not None and find_weights_files(found / "unet"):
        return found
    if download:
        return download_base(name)
    reason = f"The model's base, {FLAG} {name}, is not on this machine."
    raise Unavailable(reason, f"Name its folder with {FLAG}, add --download to fetch it, {MERGE_HINT}.")


def download_base(name: str) -> Path:
    """Download the UNet alone of hub id `name` into the local cache -> its snapshot; raises Unavailable."""
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(name)
    with translate_hub_errors(name, FLAG):
        weights = [pattern for pattern in build_download_patterns(name) if pattern.startswith("unet/")]
        patterns = [*CONFIG_PATTERNS, "unet/*.json", *weights]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


class BaseWeights:
    """Some of the tensors in the safetensors files of a part of a model, read when they are asked for."""

    def __init__(self, part: Path):
        """Look into the headers alone; raises DataError for a file that is not whole."""
        self.part = part
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in find_weights_files(part):
            shapes = read_header(path).shapes
            self.shapes |= shapes
            self.files |= dict.fromkeys(shapes, path)

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raise DataError naming the first tensor of `wanted`, name -> shape, that is not there in this shape."""
        for name, shape in wanted.items():
            if self.shapes.get(name) != shape:
                given = self.shapes.get(name, "no such tensor")
                reason = f"{name} is {given} in the base {self.part} and {shape} in the model."
                raise DataError(reason, f"Name the model's own base with {FLAG}, {MERGE_HINT}.")

    def read(self, layer: str, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors `names` of a layer, by these names, in the dtype of the file."""
        places: dict[Path, list[str]] = {}
        for name in names:
            places.setdefault(self.files[f"{layer}.{name}"], []).append(name)
        found = {}
        for path, here in places.items():  # a layer nearly always lies in one file, which is opened once for it
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(f"{layer}.{name}") for name in here}
        return {name: found[name] for name in names}
