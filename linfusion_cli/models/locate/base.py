"""Base model of a fine-tune: locate its UNet, and read the self-attention weights from it."""

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
    """Return the UNet folder of the base `name`: `demo`, a diffusers folder, a UNet folder, a hub id, or `auto`.

    `auto` is the model that the weights in `linfusion` were trained for: the model that contains this folder (also for
    the embedded model), otherwise the base model of `family`. Raise Unavailable if it is not on this machine and
    `download` is false, DataError if it is not a model.
    """
    if name == "auto":
        name = str(model.folder) if model.folder in (linfusion.parent, DEMO_FOLDER) else FAMILY_BASES[family]
    folder = DEMO_FOLDER if name == DEMO else expand_home(name)
    if is_file(folder):
        raise DataError(f"{FLAG} {name} is a file.", "Use a folder in diffusers' layout, a hub id, or demo.")
    if not is_folder(folder):
        folder = find_base_in_hub(name, download)
    unet = folder / "unet" if is_folder(folder / "unet") else folder
    if not find_weights_files(unet):
        raise DataError(f"{FLAG} {name} has no UNet weights.", f"Use another base, {MERGE_HINT}.")
    return unet


def find_local_base(model: Model, linfusion: Path, family: str) -> Path | None:
    """Return the folder that `find_base` finds for `auto`, None if it is not on this machine."""
    try:
        return find_base("auto", model, linfusion, family)
    except (Unavailable, DataError):
        return None


def find_base_in_hub(name: str, download: bool) -> Path:
    """Return the local snapshot of hub id `name` with a UNet; with `download`, fetch it. Raise Unavailable."""
    snapshot = find_snapshot(name, FLAG)
    if snapshot is not None and find_weights_files(snapshot / "unet"):
        return snapshot
    if download:
        return download_base(name)
    reason = f"The base model {FLAG} {name} is not on this machine."
    raise Unavailable(reason, f"Add --download, set {FLAG} to its folder, {MERGE_HINT}.")


def download_base(name: str) -> Path:
    """Download only the UNet of hub id `name` and return its snapshot; raise Unavailable if that fails."""
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(name)
    with translate_hub_errors(name, FLAG):
        weights = [pattern for pattern in build_download_patterns(name) if pattern.startswith("unet/")]
        patterns = [*CONFIG_PATTERNS, "unet/*.json", *weights]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


class BaseWeights:
    """Lazy access to the tensors in the safetensors files of a network."""

    def __init__(self, part: Path):
        """Read only the headers; raise DataError if a file is incomplete."""
        self.part = part
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in find_weights_files(part):
            shapes = read_header(path).shapes
            self.shapes |= shapes
            self.files |= dict.fromkeys(shapes, path)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise DataError for the first tensor of `expected`, name to shape, that is missing or has another shape."""
        for name, shape in expected.items():
            if self.shapes.get(name) != shape:
                actual = self.shapes.get(name, "missing")
                reason = f"{name} is {actual} in the base {self.part}, but {shape} in the model."
                raise DataError(reason, f"Set {FLAG} to the base of this model, {MERGE_HINT}.")

    def read(self, layer: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Read the tensors `names` of a layer in the dtype of the file; the keys are `names`."""
        names_by_file: dict[Path, list[str]] = {}
        for name in names:
            names_by_file.setdefault(self.files[f"{layer}.{name}"], []).append(name)
        tensors = {}
        for path, names_in_file in names_by_file.items():  # opens each file once, in most cases a single file
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(f"{layer}.{name}") for name in names_in_file}
        return {name: tensors[name] for name in names}
