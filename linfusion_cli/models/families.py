"""The facts of a model that its config files tell, without loading weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linfusion_cli.errors import DataError, Unavailable

KINDS = "Use a text-to-image model of the SDXL, SD 2.1 or SD 1.5 family."


@dataclass(frozen=True)
class ModelFacts:
    """What sizes, text and schedule a model works with.

    `native_px` is the side of the square it was trained on, `vae_factor` pixels per latent, `multiple_px` what the
    sides of a picture must be a multiple of; `is_xl` says that it takes two text encoders and size conditioning.
    """

    family: str
    is_xl: bool
    native_px: int
    vae_factor: int
    multiple_px: int
    latent_channels: int
    vae_native_px: int
    zeros_for_empty_prompt: bool
    scheduler_config: dict[str, Any]


def read_facts(folder: Path, vae_folder: Path | None = None) -> ModelFacts:
    """The facts of the model in the diffusers folder `folder`, with its own VAE or that in `vae_folder`.

    Raises Unavailable or DataError naming the file.
    """
    index = read_config(folder / "model_index.json")
    unet = read_config(folder / "unet" / "config.json")
    own_vae = read_config(folder / "vae" / "config.json")
    vae = own_vae if vae_folder is None else read_config(vae_folder / "config.json")
    check_kind(folder, unet, vae)
    try:
        vae_factor = factor(vae)
        if vae_factor != factor(own_vae):
            reason = f"The VAE in {vae_folder} has {vae_factor} pixels per latent, unlike the model's own."
            raise DataError(reason, "Name another --vae.")
        return ModelFacts(
            family=family_of(unet),
            is_xl=is_xl(unet),
            native_px=unet["sample_size"] * vae_factor,
            vae_factor=vae_factor,
            multiple_px=vae_factor * 2 ** (len(unet["block_out_channels"]) - 1),
            latent_channels=unet["in_channels"],
            vae_native_px=vae.get("sample_size", 512),
            zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", False)),
            scheduler_config=read_config(folder / "scheduler" / "scheduler_config.json"),
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"The configs in {folder} lack {error}.", KINDS) from error


def check_kind(folder: Path, unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """Raise DataError for models of a kind that would run and paint something wrong, or fail after minutes."""
    channels = (unet.get("in_channels"), vae.get("latent_channels"))
    if channels[0] != channels[1]:
        raise DataError(f"The UNet in {folder} takes {channels[0]} channels, and its VAE makes {channels[1]}.", KINDS)
    if not isinstance(unet.get("sample_size"), int):
        raise DataError(f"The UNet in {folder} has the sample_size {unet.get('sample_size')!r}.", KINDS)
    for name in ("latents_mean", "latents_std", "shift_factor"):
        if vae.get(name):
            raise DataError(f"The VAE in {folder} has {name}, which is not supported.", KINDS)


def factor(vae_config: dict[str, Any]) -> int:
    """Pixels per latent along a side; a tiny VAE's older configs name the channels of its networks apart."""
    channels = vae_config.get("block_out_channels") or vae_config["decoder_block_out_channels"]
    return 2 ** (len(channels) - 1)


def is_xl(unet_config: dict[str, Any]) -> bool:
    """Whether the UNet takes pooled text and sizes beside the timestep, as SDXL does."""
    return unet_config.get("addition_embed_type") == "text_time"


def family_of(unet_config: dict[str, Any]) -> str:
    """`sdxl`, `sd21` or `sd15`, told by the width of the text the UNet listens to."""
    if is_xl(unet_config):
        return "sdxl"
    return "sd21" if unet_config.get("cross_attention_dim") == 1024 else "sd15"


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; raises Unavailable when it is absent, DataError when it is not one."""
    if not path.is_file():
        raise Unavailable(f"The model is incomplete: {path} is missing.", "Add --download, or name another --model.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}).", "Download the model again.") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a config: it holds no JSON object.", "Download the model again.")
    return config
