"""ControlNets: where they are, of what kind, and whether one fits a model. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import DataError, Unavailable, UsageError
from linfusion_cli.core.fs import expand_home, is_file, is_folder
from linfusion_cli.models.families.facts import compute_vae_factor, read_config
from linfusion_cli.models.files.hub import find_in_hub
from linfusion_cli.models.files.layout import Model, find_weights_files
from linfusion_cli.models.locate.model import check_weights_suffix

PLAIN_CLASS, UNION_CLASS = "ControlNetModel", "ControlNetUnionModel"
UNION_CLASSES = (UNION_CLASS, "ControlNetModel_Union")  # the second by those who made them
FAMILY_HINT = "Use a ControlNet made for this model's family."
# What decides whether the maps of both networks have one shape, and whether both hear the same text and sizes.
SHARED_FIELDS = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
CONFIG_DEFAULTS = {"in_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
DEFAULT_EMBEDDING_CHANNELS = {PLAIN_CLASS: [16, 32, 96, 256], UNION_CLASS: [48, 96, 192, 384]}
# In the order of the published union models for SDXL; the last two are in some of them only.
CONTROL_TYPES = ("openpose", "depth", "hed", "canny", "normal", "segment", "tile", "repaint")
CONTROL_TYPE_ALIASES = {
    "pose": "openpose",
    "pidi": "hed",
    "scribble": "hed",
    "softedge": "hed",
    "ted": "hed",
    "lineart": "canny",
    "anime_lineart": "canny",
    "mlsd": "canny",
    "seg": "segment",
    "inpaint": "repaint",
    "outpaint": "repaint",
}


def find_controlnet(name: str, download: bool = False) -> Path:
    """The folder of the ControlNet `name`: in diffusers' layout, or a hub id; raises Unavailable or DataError."""
    folder = expand_home(name)
    check_weights_suffix("--controlnet", folder)
    if is_file(folder):
        raise DataError(f"--controlnet {name} is a file.", "Name a folder in diffusers' layout, or a hub id.")
    if not is_folder(folder):
        folder = find_in_hub(name, download, "--controlnet", has_controlnet)
    if not is_file(folder / "config.json"):
        raise DataError(f"--controlnet {name} has no config.json.", "Name a folder in diffusers' layout.")
    if not find_weights_files(folder):
        raise Unavailable(f"--controlnet {name} is incomplete: {folder} has no weights.", "Add --download.")
    return folder


def has_controlnet(folder: Path) -> bool:
    """Whether `folder` has a ControlNet's config and weights."""
    return is_file(folder / "config.json") and bool(find_weights_files(folder))


def is_union(folder: Path) -> bool:
    """Whether the ControlNet in `folder` takes pictures of several kinds; raises DataError for what is none."""
    name = read_config(folder / "config.json").get("_class_name")
    if name not in (PLAIN_CLASS, *UNION_CLASSES):
        raise DataError(
            f"{folder} is of the kind {name}, and no ControlNet.", f"Use a {PLAIN_CLASS} or a {UNION_CLASS}."
        )
    return name in UNION_CLASSES


def check_fits(folder: Path, model: Model) -> None:
    """Raise DataError naming the first thing in which the ControlNet in `folder` does not fit the UNet of `model`."""
    net, unet = read_config(folder / "config.json"), read_config(model.get_part("unet").config_path)
    kind = UNION_CLASS if is_union(folder) else PLAIN_CLASS
    for name in SHARED_FIELDS:
        theirs, ours = (config.get(name, CONFIG_DEFAULTS.get(name)) for config in (net, unet))
        if theirs != ours:
            raise build_mismatch_error(folder, name, theirs, ours)
    pixels = compute_vae_factor(read_config(model.get_part("vae").config_path))
    widths = net.get("conditioning_embedding_out_channels") or DEFAULT_EMBEDDING_CHANNELS[kind]
    if 2 ** (len(widths) - 1) != pixels:
        raise build_mismatch_error(folder, "the number of pixels per latent", 2 ** (len(widths) - 1), pixels)
    for name, works in (("global_pool_conditions", False), ("conditioning_channels", 3)):
        if net.get(name, works) != works:
            raise DataError(f"The ControlNet in {folder} has {name} {net[name]}, which is not supported.", FAMILY_HINT)


def build_mismatch_error(folder: Path, what: str, theirs: Any, ours: Any) -> DataError:
    reason = f"The ControlNet in {folder} does not fit the model: {what} is {theirs} in it and {ours} in the model."
    return DataError(reason, FAMILY_HINT)


def parse_control_type(folder: Path, written: str) -> int:
    """The number that a union model has for a kind of picture, written as a number or a name; raises UsageError."""
    count = read_config(folder / "config.json").get("num_control_type", len(CONTROL_TYPES) - 2)
    name = written.strip().lower().replace("-", "_")
    name = CONTROL_TYPE_ALIASES.get(name, name)
    number = int(name) if name.isdecimal() else CONTROL_TYPES.index(name) if name in CONTROL_TYPES else count
    if number >= count:
        hint = f"Use one of {', '.join(CONTROL_TYPES[:count])}, or 0 to {count - 1}."
        raise UsageError(f"--control-type {written!r} is none that the model in {folder} knows.", hint, "control_type")
    return number
