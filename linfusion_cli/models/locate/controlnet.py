"""Locate ControlNets, detect their class, and check whether they fit a model. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from linfusion_cli.core.errors import DataError, Unavailable, UsageError
from linfusion_cli.core.fs import expand_home, is_file, is_folder
from linfusion_cli.models.families.facts import compute_vae_factor, read_config
from linfusion_cli.models.files.hub import find_in_hub
from linfusion_cli.models.files.layout import Model, find_weights_files
from linfusion_cli.models.locate.model import check_weights_suffix

PLAIN_CLASS, UNION_CLASS = "ControlNetModel", "ControlNetUnionModel"
UNION_CLASSES = (UNION_CLASS, "ControlNetModel_Union")  # the second name is in the published config
FAMILY_HINT = "Use a ControlNet for the family of this model."
# Config fields that must be equal, because both networks get the same feature map shapes, text and sizes.
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
# In the order of the published union models for SDXL; not all of them have the last two.
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
    """Return the folder of the ControlNet `name`: a diffusers folder or a hub id; raise Unavailable or DataError."""
    folder = expand_home(name)
    check_weights_suffix("--controlnet", folder)
    if is_file(folder):
        raise DataError(f"--controlnet {name} is a file.", "Use a folder in diffusers' layout, or a hub id.")
    if not is_folder(folder):
        folder = find_in_hub(name, download, "--controlnet", has_controlnet)
    if not is_file(folder / "config.json"):
        raise DataError(f"--controlnet {name} has no config.json.", "Use a folder in diffusers' layout.")
    if not find_weights_files(folder):
        raise Unavailable(f"--controlnet {name} is incomplete: {folder} has no weights.", "Add --download.")
    return folder


def has_controlnet(folder: Path) -> bool:
    """Return whether `folder` has a config and weights."""
    return is_file(folder / "config.json") and bool(find_weights_files(folder))


def is_union(folder: Path) -> bool:
    """Return whether the ControlNet in `folder` takes several control types; raise DataError for other classes."""
    name = read_config(folder / "config.json").get("_class_name")
    if name not in (PLAIN_CLASS, *UNION_CLASSES):
        raise DataError(
            f"{folder} is not a ControlNet: its class is {name}.", f"Use a {PLAIN_CLASS} or a {UNION_CLASS}."
        )
    return name in UNION_CLASSES


def check_fits(folder: Path, model: Model) -> None:
    """Raise DataError for the first property of the ControlNet in `folder` that does not fit the UNet of `model`."""
    net_config, unet_config = read_config(folder / "config.json"), read_config(model.get_part("unet").config_path)
    kind = UNION_CLASS if is_union(folder) else PLAIN_CLASS
    for name in SHARED_FIELDS:
        actual, expected = (config.get(name, CONFIG_DEFAULTS.get(name)) for config in (net_config, unet_config))
        if actual != expected:
            raise build_mismatch_error(folder, name, actual, expected)
    pixels = compute_vae_factor(read_config(model.get_part("vae").config_path))
    widths = net_config.get("conditioning_embedding_out_channels") or DEFAULT_EMBEDDING_CHANNELS[kind]
    if 2 ** (len(widths) - 1) != pixels:
        raise build_mismatch_error(folder, "number of pixels per latent", 2 ** (len(widths) - 1), pixels)
    for name, supported in (("global_pool_conditions", False), ("conditioning_channels", 3)):
        if net_config.get(name, supported) != supported:
            raise DataError(
                f"The ControlNet in {folder} has {name} {net_config[name]}, which is not supported.", FAMILY_HINT
            )


def build_mismatch_error(folder: Path, name: str, actual: object, expected: object) -> DataError:
    """Return the error for a ControlNet with another value of `name` than the model."""
    reason = f"The ControlNet in {folder} does not fit the model: its {name} is {actual}, the model needs {expected}."
    return DataError(reason, FAMILY_HINT)


def parse_control_type(folder: Path, text: str) -> int:
    """Return the index of a control type of a union model, given as name or number; raise UsageError if invalid."""
    count = read_config(folder / "config.json").get("num_control_type", len(CONTROL_TYPES) - 2)
    name = text.strip().lower().replace("-", "_")
    name = CONTROL_TYPE_ALIASES.get(name, name)
    number = int(name) if name.isdecimal() else CONTROL_TYPES.index(name) if name in CONTROL_TYPES else count
    if number >= count:
        hint = f"Use one of {', '.join(CONTROL_TYPES[:count])}, or 0 to {count - 1}."
        raise UsageError(
            f"--control-type {text!r} is not supported by the ControlNet in {folder}.", hint, "control_type"
        )
    return number
