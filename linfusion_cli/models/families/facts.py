"""Facts about a model from its config files or the header of its single file. No weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.models.families.compatibility import (
    POOLED_TEXT_KEY,
    SUPPORTED_MODELS_HINT,
    UNET_PREFIX,
    ZERO_SNR_MARKER,
    check_compatible,
    read_prediction_type,
)
from linfusion_cli.models.files.header import Header, read_header
from linfusion_cli.models.files.layout import Model, Part

FAMILY_NAMES = {"sdxl": "SDXL", "sd21": "SD 2.1", "sd15": "SD 1.5"}
# Prefixes of tensor names in single files; the second one occurs only in SDXL's refiner.
VAE_PREFIX, REFINER_PREFIX = "first_stage_model.", "conditioner.embedders.0.model."


@dataclass(frozen=True)
class ModelFacts:
    """Family, sizes, text conditioning and noise schedule of a model.

    `native_px` is the side of the training images, `vae_factor` the pixels per latent, and image sides must be
    multiples of `multiple_px`. Models with `is_xl` have two text encoders and size conditioning. `warnings` are
    sentences for the user.
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
        """`epsilon`, `v_prediction` or `sample`; None if unknown."""
        return self.scheduler_config.get("prediction_type")

    def with_prediction_type(self, prediction_type: str) -> ModelFacts:
        """Return a copy with this prediction type and without warnings."""
        return replace(self, scheduler_config=self.scheduler_config | {"prediction_type": prediction_type}, warnings=())


def read_facts(model: Model, vae_part: Part | None = None) -> ModelFacts:
    """Read the facts about `model`, with its own VAE or with `vae_part`.

    Raise Unavailable if a config is missing, and DataError if it is broken or the model is not supported.
    """
    index = read_config(model.index_path)
    unet = read_config(model.get_part("unet").config_path)
    own_vae = read_config(model.get_part("vae").config_path)
    vae = own_vae if vae_part is None else read_config(vae_part.config_path)
    check_model_kind(model, index, unet, vae)
    header = None if model.file is None else read_header(model.file)
    scheduler, warnings = read_scheduler_config(model, header)
    check_compatible(model, unet, scheduler, header)
    try:
        vae_factor = compute_vae_factor(vae)
        if vae_factor != compute_vae_factor(own_vae):
            reason = f"The VAE in {vae_part} has {vae_factor} pixels per latent, unlike the VAE of the model."
            raise DataError(reason, "Use another --vae.")
        return ModelFacts(
            family=detect_family(unet),
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
        raise DataError(f"The configs in {model.folder} lack {error}.", SUPPORTED_MODELS_HINT) from error


def read_scheduler_config(model: Model, header: Header | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the scheduler config and warnings; for a single file, adapt the config of its family by `header`."""
    config = read_config(model.folder / "scheduler" / "scheduler_config.json")
    if header is None:
        return config, ()
    prediction_type, warning = read_prediction_type(header)
    return adapt_scheduler_config(config, header, prediction_type), () if warning is None else (warning,)


def adapt_scheduler_config(config: Mapping[str, Any], header: Header, prediction_type: str | None) -> dict[str, Any]:
    """Adapt the scheduler config of a family to a single file; the prediction type is always that of the file."""
    adapted = {name: value for name, value in config.items() if name != "prediction_type"}
    if ZERO_SNR_MARKER in header.shapes:
        adapted |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return adapted | ({"prediction_type": prediction_type} if prediction_type else {})


def check_model_kind(model: Model, index: dict[str, Any], unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """Raise DataError for models that would run and produce wrong images, or fail after minutes."""
    channels = (unet.get("in_channels"), vae.get("latent_channels"))
    if channels[0] != channels[1]:
        raise DataError(
            f"The UNet in {model} has {channels[0]} input channels, but its VAE has {channels[1]} latent channels.",
            SUPPORTED_MODELS_HINT,
        )
    if index.get("requires_aesthetics_score"):
        raise DataError(f"{model} is the SDXL refiner, which cannot be used alone.", SUPPORTED_MODELS_HINT)
    if not isinstance(unet.get("sample_size"), int):
        message = f"The UNet in {model} has sample_size {unet.get('sample_size')!r}; an integer is required."
        raise DataError(message, SUPPORTED_MODELS_HINT)
    for name in ("latents_mean", "latents_std", "shift_factor"):
        if vae.get(name):
            raise DataError(f"The VAE of {model} has {name}, which is not supported.", SUPPORTED_MODELS_HINT)


def compute_vae_factor(vae_config: dict[str, Any]) -> int:
    """Return the pixels per latent along a side; old configs of tiny VAEs have only `decoder_block_out_channels`."""
    channels = vae_config.get("block_out_channels") or vae_config["decoder_block_out_channels"]
    return 2 ** (len(channels) - 1)


def is_xl(unet_config: dict[str, Any]) -> bool:
    """Return whether the UNet takes pooled text and sizes in addition to the timestep, like SDXL."""
    return unet_config.get("addition_embed_type") == "text_time"


def detect_family(unet_config: dict[str, Any]) -> str:
    """Return `sdxl`, `sd21` or `sd15`; only `sd15` has convolutions as input projections of its transformers."""
    if is_xl(unet_config):
        return "sdxl"
    return "sd21" if unet_config.get("use_linear_projection") else "sd15"


def detect_file_family(header: Header) -> str:
    """Return `sdxl`, `sd21` or `sd15` by tensor names and shapes; raise DataError for all other files."""
    shapes = header.shapes
    if not any(name.startswith(UNET_PREFIX) for name in shapes):
        example = min(shapes, default="no tensors")
        raise DataError(
            f"{header.file} is not a complete model: it has {example}, but no {UNET_PREFIX}*.",
            SUPPORTED_MODELS_HINT,
        )
    if any(name.startswith(REFINER_PREFIX) for name in shapes):
        raise DataError(f"{header.file} is the SDXL refiner, which cannot be used alone.", SUPPORTED_MODELS_HINT)
    if POOLED_TEXT_KEY in shapes:
        return "sdxl"
    projections = [
        shape for name, shape in shapes.items() if name.startswith(UNET_PREFIX) and name.endswith(".proj_in.weight")
    ]
    if not projections:
        raise DataError(f"{header.file} is a model of an unsupported family.", SUPPORTED_MODELS_HINT)
    return "sd21" if len(projections[0]) == 2 else "sd15"


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise Unavailable if the file is missing, DataError if it is not a JSON object."""
    if not path.is_file():
        raise Unavailable(f"The model is incomplete: {path} is missing.", "Add --download, or use another --model.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}).", "Download the model again.") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a config: it is not a JSON object.", "Download the model again.")
    return config
