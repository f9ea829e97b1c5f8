"""The facts of a model that its config files, or the header of its one file, tell without loading weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.models.families.compatibility import (
    KINDS,
    POOLED_TEXT,
    UNET,
    ZERO_SNR,
    check_compatible,
    prediction_in,
)
from linfusion_cli.models.files.header import Header, read_header
from linfusion_cli.models.files.parts import Model, Part

FAMILY_NAMES = {"sdxl": "SDXL", "sd21": "SD 2.1", "sd15": "SD 1.5"}
# In a single file: what the names of the VAE begin with, and those that only SDXL's refiner has.
VAE, IN_REFINER = "first_stage_model.", "conditioner.embedders.0.model."


@dataclass(frozen=True)
class ModelFacts:
    """What sizes, text and schedule a model works with.

    `native_px` is the side of the square it was trained on, `vae_factor` pixels per latent, `multiple_px` what the
    sides of a picture must be a multiple of; `is_xl` says that it takes two text encoders and size conditioning.
    `warnings` are what a user should know of it, a sentence each.
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
    warnings: tuple[str, ...] = ()

    @property
    def prediction_type(self) -> str | None:
        """What the UNet predicts, `epsilon`, `v_prediction` or `sample`; None where nothing says it."""
        return self.scheduler_config.get("prediction_type")

    def predicting(self, prediction_type: str) -> ModelFacts:
        """The same of a model that predicts this, whatever it says of it itself."""
        return replace(self, scheduler_config=self.scheduler_config | {"prediction_type": prediction_type}, warnings=())


def read_facts(model: Model, vae_part: Part | None = None) -> ModelFacts:
    """The facts of `model`, with its own VAE or `vae_part`; raises Unavailable or DataError naming the file."""
    index = read_config(model.index)
    unet = read_config(model.part("unet").config)
    own_vae = read_config(model.part("vae").config)
    vae = own_vae if vae_part is None else read_config(vae_part.config)
    check_kind(model, index, unet, vae)
    header = None if model.file is None else read_header(model.file)
    scheduler, warnings = scheduler_config(model, header)
    check_compatible(model, unet, scheduler, header)
    try:
        vae_factor = factor(vae)
        if vae_factor != factor(own_vae):
            reason = f"The VAE in {vae_part} has {vae_factor} pixels per latent, unlike the model's own."
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
            scheduler_config=scheduler,
            warnings=warnings,
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"The configs in {model.folder} lack {error}.", KINDS) from error


def scheduler_config(model: Model, header: Header | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Its noise schedule, of a single file that of its family but for what its `header` says; and warnings about it."""
    config = read_config(model.folder / "scheduler" / "scheduler_config.json")
    if header is None:
        return config, ()
    predicted, warning = prediction_in(header)
    return scheduled_by(config, header, predicted), () if warning is None else (warning,)


def scheduled_by(config: Mapping[str, Any], header: Header, predicted: str | None) -> dict[str, Any]:
    """A family's noise schedule as it is for one file; what that predicts its family does not tell."""
    kept = {name: value for name, value in config.items() if name != "prediction_type"}
    if ZERO_SNR in header.shapes:
        kept |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return kept | ({"prediction_type": predicted} if predicted else {})


def check_kind(model: Model, index: dict[str, Any], unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """Raise DataError for models of a kind that would run and paint something wrong, or fail after minutes."""
    channels = (unet.get("in_channels"), vae.get("latent_channels"))
    if channels[0] != channels[1]:
        raise DataError(f"The UNet in {model} takes {channels[0]} channels, and its VAE makes {channels[1]}.", KINDS)
    if index.get("requires_aesthetics_score"):
        raise DataError(f"{model} is SDXL's refiner, which paints nothing by itself.", KINDS)
    if not isinstance(unet.get("sample_size"), int):
        raise DataError(f"The UNet in {model} has the sample_size {unet.get('sample_size')!r}.", KINDS)
    for name in ("latents_mean", "latents_std", "shift_factor"):
        if vae.get(name):
            raise DataError(f"The VAE of {model} has {name}, which is not supported.", KINDS)


def factor(vae_config: dict[str, Any]) -> int:
    """Pixels per latent along a side; a tiny VAE's older configs name the channels of its networks apart."""
    channels = vae_config.get("block_out_channels") or vae_config["decoder_block_out_channels"]
    return 2 ** (len(channels) - 1)


def is_xl(unet_config: dict[str, Any]) -> bool:
    """Whether the UNet takes pooled text and sizes beside the timestep, as SDXL does."""
    return unet_config.get("addition_embed_type") == "text_time"


def family_of(unet_config: dict[str, Any]) -> str:
    """`sdxl`, `sd21` or `sd15`: the last projects into its transformers with convolutions, the others linearly."""
    if is_xl(unet_config):
        return "sdxl"
    return "sd21" if unet_config.get("use_linear_projection") else "sd15"


def family_of_file(header: Header) -> str:
    """`sdxl`, `sd21` or `sd15`, by the names and shapes in a single file; raises DataError where it is none of them."""
    shapes = header.shapes
    if not any(name.startswith(UNET) for name in shapes):
        some = min(shapes, default="nothing")
        raise DataError(f"{header.file} is no whole model: it holds {some}, and nothing called {UNET}*.", KINDS)
    if any(name.startswith(IN_REFINER) for name in shapes):
        raise DataError(f"{header.file} is SDXL's refiner, which paints nothing by itself.", KINDS)
    if POOLED_TEXT in shapes:
        return "sdxl"
    into = [shape for name, shape in shapes.items() if name.startswith(UNET) and name.endswith(".proj_in.weight")]
    if not into:
        raise DataError(f"{header.file} is a model of another kind.", KINDS)
    return "sd21" if len(into[0]) == 2 else "sd15"


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
