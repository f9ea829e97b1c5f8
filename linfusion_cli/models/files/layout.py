"""Local model files: paths of the config and the weights of each network. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.core.errors import DataError
from linfusion_cli.core.fs import is_file

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
LINFUSION_FOLDER = "linfusion"  # the folder of linear-attention weights inside a model
WEIGHTS_STEMS = ("diffusion_pytorch_model", "model")  # file names of diffusers and transformers
VARIANTS = ("", ".fp16")  # the first one found is read
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
CONVERT_HINT = "Convert it to safetensors (diffusers: from_single_file or from_pretrained, then save_pretrained)."


@dataclass(frozen=True)
class Part:
    """One network: `folder` has its config.json and its weights, unless the weights are in `file`.

    `file` has the tensor names of diffusers or of the original code; in the latter case it can hold a complete model.
    """

    folder: Path
    file: Path | None = None

    @property
    def config_path(self) -> Path:
        """Path of config.json."""
        return self.folder / "config.json"

    @property
    def weights(self) -> list[Path]:
        """The safetensors files, possibly empty; raises DataError like `find_weights_files`."""
        return [self.file] if self.file else find_weights_files(self.folder)

    def __str__(self) -> str:
        """Return the path of the weights, for messages."""
        return str(self.file or self.folder)


@dataclass(frozen=True)
class Model:
    """A model: a folder in diffusers' layout, or a single `file` plus a `folder` with the configs of its family."""

    folder: Path
    file: Path | None = None

    def get_part(self, name: str) -> Part:
        """Return the network `name`, such as "unet"."""
        return Part(self.folder / name, self.file)

    @property
    def index_path(self) -> Path:
        """Path of model_index.json."""
        return self.folder / "model_index.json"

    def __str__(self) -> str:
        return str(self.file or self.folder)


def find_weights_files(folder: Path) -> list[Path]:
    """Return the safetensors files in `folder`, possibly empty: without a variant, otherwise in fp16.

    Raise DataError if shards are missing and no variant is complete, or if there are only pickles.
    """
    first_error = None
    for variant in VARIANTS:
        try:
            if files := find_variant_files(folder, variant):
                return files
        except DataError as error:  # the index was downloaded, but only the other variant's weights
            first_error = first_error or error
    if first_error is not None:
        raise first_error
    pickles = sorted(path for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise build_pickle_error(str(pickles[0]))
    return []


def find_variant_files(folder: Path, variant: str) -> list[Path]:
    """Return the shards or the single file of one variant, or []."""
    for name in WEIGHTS_STEMS:
        index = folder / f"{name}.safetensors.index{variant}.json"
        if is_file(index):
            return list(read_shard_index(index))
        if is_file(file := folder / f"{name}{variant}.safetensors"):
            return [file]
    return []


def read_shard_index(index: Path) -> Iterator[Path]:
    """Yield the shards of an index; raise DataError if one is missing or is not in the same folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        is_safe = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is not a valid shard index ({error!r}).", "Download the model again.") from error
    if not names or not is_safe:
        message = f"{index} must list safetensors files in its own folder."
        raise DataError(message, "Download the model again.")
    for name in names:
        if not is_file(index.parent / name):
            raise DataError(f"The shard {index.parent / name} is missing.", "Download the model again.")
        yield index.parent / name


def build_pickle_error(name: str, hint: str = CONVERT_HINT) -> DataError:
    """Return the error for weights in a pickle."""
    return DataError(f"{name} is a pickle, which can execute code when it is loaded.", hint)
