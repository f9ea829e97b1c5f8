"""The parts of a model on this machine: where the config and the weights of each lie. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.core.errors import DataError
from linfusion_cli.core.units import is_file

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
LINFUSION = "linfusion"  # the folder of a model's own linear attention
WEIGHTS = ("diffusion_pytorch_model", "model")  # as diffusers and transformers call them
VARIANTS = ("", ".fp16")  # of a model that is here in both, the plain one is read
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CONVERT = "Convert it to safetensors (diffusers: from_single_file or from_pretrained, then save_pretrained)."


@dataclass(frozen=True)
class Part:
    """One network: the folder of its config.json, with its weights there, or in a `file` of their own.

    Such a file has the names of diffusers, or those of the original code, where it may hold a whole model.
    """

    folder: Path
    file: Path | None = None

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def weights(self) -> list[Path]:
        """The safetensors files that are read, none where they are missing; raises DataError as `weights_files`."""
        return [self.file] if self.file else weights_files(self.folder)

    def __str__(self) -> str:
        """Where the weights are, for a person."""
        return str(self.file or self.folder)


@dataclass(frozen=True)
class Model:
    """A model in diffusers' folder layout, or one in a single `file`, with its family's configs in the `folder`."""

    folder: Path
    file: Path | None = None

    def part(self, name: str) -> Part:
        """The part `name`, such as "unet"."""
        return Part(self.folder / name, self.file)

    @property
    def index(self) -> Path:
        return self.folder / "model_index.json"

    def __str__(self) -> str:
        return str(self.file or self.folder)


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files of the part in `folder`, the plain variant or else fp16; [] if there are none.

    Raises DataError where a shard is missing and no variant is whole, and for pickles.
    """
    broken = None
    for variant in VARIANTS:
        try:
            if files := files_of(folder, variant):
                return files
        except DataError as error:  # a small file that came along, of shards that were not fetched
            broken = broken or error
    if broken is not None:
        raise broken
    pickles = sorted(path for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles:
        raise pickled(str(pickles[0]))
    return []


def files_of(folder: Path, variant: str) -> list[Path]:
    """As `weights_files`, of one variant: its shards, or its one file."""
    for name in WEIGHTS:
        index = folder / f"{name}.safetensors.index{variant}.json"
        if is_file(index):
            return list(shards(index))
        if is_file(file := folder / f"{name}{variant}.safetensors"):
            return [file]
    return []


def shards(index: Path) -> Iterator[Path]:
    """The files that an index of shards names; raises DataError for one that is missing or lies elsewhere."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        safe = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is no index of shards ({error!r}).", "Download the model again.") from error
    if not names or not safe:
        raise DataError(f"{index} names no safetensors files beside it.", "Download the model again.")
    for name in names:
        if not is_file(index.parent / name):
            raise DataError(f"The shard {index.parent / name} is missing.", "Download the model again.")
        yield index.parent / name


def pickled(name: str) -> DataError:
    """The error for weights that are a pickle, or of which there are only pickles."""
    return DataError(f"{name} is a pickle, which can run code when it is opened.", CONVERT)
