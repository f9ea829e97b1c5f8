"""Reject models that would be sampled with wrong settings, before their weights are loaded. Needs no torch.

`find_model` and `read_facts` run these checks, so all commands reject the same models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from linfusion_cli.core.errors import DataError
from linfusion_cli.models.files.header import Header

SUPPORTED_MODELS_HINT = "Use a text-to-image model of the SDXL, SD 2.1 or SD 1.5 family."
# Tensor names in single files: the prefix of the UNet, and the projection of the pooled text that only SDXL has.
UNET_PREFIX = "model.diffusion_model."
POOLED_TEXT_KEY = f"{UNET_PREFIX}label_emb.0.0.weight"
# Tensors that trainers add to single files to mark the noise schedule.
EDM_MARKERS = {
    "edm_vpred.sigma_max": "EDM noise levels, as in CosXL",
    "edm_vpred.sigma_min": "EDM noise levels, as in CosXL",
    "edm_mean": "EDM noise levels, as in Playground v2.5",
    "edm_std": "EDM noise levels, as in Playground v2.5",
}
V_PREDICTION_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
# Scheduler classes of diffusers with noise levels that are not computed from betas.
UNSUPPORTED_SCHEDULERS = re.compile(
    r"EDM|Flow|KarrasVe|ScoreSde|Cosine|VQDiffusion|CMStochastic|Wuerstchen|CogVideoX|UnCLIP"
)
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Conditioning other than text and sizes; a missing or false value means that the UNet does not have it.
UNSUPPORTED_CONDITIONING = (
    "time_cond_proj_dim",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
)
PREDICTION_CONFLICT = (
    "{} is contradictory: its tensor {} marks v_prediction, but its metadata says epsilon. v_prediction is used; "
    "--prediction-type epsilon overrides it."
)


def check_compatible(
    model: object, unet: Mapping[str, Any], scheduler: Mapping[str, Any], header: Header | None
) -> None:
    """Raise DataError for the first unsupported property; `header` is None unless the model is a single file."""
    problems = [*find_unet_problems(unet), *find_scheduler_problems(scheduler)]
    problems += [] if header is None else find_shape_problems(header, unet)
    raise_first_problem(model, problems)


def check_markers(header: Header) -> None:
    """Raise DataError for the first marker tensor of an unsupported model; no configs of the family are needed."""
    raise_first_problem(header.file, list(find_marker_problems(header)))


def raise_first_problem(model: object, problems: list[str]) -> None:
    """Raise DataError for the first of `problems`, if there is one."""
    if problems:
        raise DataError(f"{model} is not supported: {problems[0]}.", SUPPORTED_MODELS_HINT)


def find_unet_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield descriptions of the unsupported values in a UNet's config.json."""
    for name in UNSUPPORTED_CONDITIONING:
        if config.get(name):
            yield f"its UNet needs the conditioning {name} {config[name]!r}"
    if config.get("addition_embed_type") not in (None, "text_time"):
        yield f"its UNet has addition_embed_type {config['addition_embed_type']!r} instead of 'text_time'"
    if (config.get("time_embedding_type") or "positional") != "positional":
        yield f"its UNet has time_embedding_type {config['time_embedding_type']!r} instead of 'positional'"
    if config.get("out_channels", 4) != config.get("in_channels", 4):
        yield f"its UNet has {config.get('in_channels', 4)} input and {config.get('out_channels', 4)} output channels"


def find_scheduler_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield descriptions of the unsupported values in a scheduler_config.json."""
    name = str(config.get("_class_name", ""))
    if UNSUPPORTED_SCHEDULERS.search(name):
        yield f"its scheduler_config.json has the class {name}, which does not compute noise levels from betas"
    if config.get("use_flow_sigmas") or (config.get("timestep_type") or "discrete") != "discrete":
        yield "its scheduler_config.json has continuous or flow-matching noise levels"
    if config.get("trained_betas") is None:
        yield from find_beta_problems(config)
    elif not are_betas(config["trained_betas"]):
        yield "its scheduler_config.json has invalid trained_betas: they must be numbers between 0 and 1"
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        yield f"its scheduler_config.json has num_train_timesteps {steps!r}"
    if config.get("prediction_type") not in (None, *PREDICTION_TYPES):
        yield f"its scheduler_config.json has prediction_type {config['prediction_type']!r}"


def find_beta_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield descriptions of missing or invalid betas; diffusers would replace missing ones by defaults."""
    start, end, schedule = (config.get(f"beta_{name}") for name in ("start", "end", "schedule"))
    if start is None or end is None or schedule is None:
        yield "its scheduler_config.json has no betas"
    elif not are_betas([start, end]) or start > end:
        yield f"its scheduler_config.json has beta_start {start!r} and beta_end {end!r}"
    elif schedule not in BETA_SCHEDULES:
        yield f"its scheduler_config.json has beta_schedule {schedule!r}"


def are_betas(values: object) -> bool:
    """Return whether `values` is a non-empty list of floats between 0 and 1."""
    return isinstance(values, list) and len(values) > 0 and all(isinstance(v, float) and 0 < v < 1 for v in values)


def find_marker_problems(header: Header) -> Iterator[str]:
    """Yield descriptions of the unsupported tensors in a single file, by their names."""
    for marker, meaning in EDM_MARKERS.items():
        if any(name == marker or name.endswith(f".{marker}") for name in header.shapes):
            yield f"its tensor {marker} marks {meaning}"
    if any(name.startswith(UNET_PREFIX) and ".cond_proj." in name for name in header.shapes):
        yield "its UNet is conditioned on the guidance scale, like full LCM models (use an LCM LoRA instead)"


def find_shape_problems(header: Header, unet: Mapping[str, Any]) -> Iterator[str]:
    """Yield descriptions of UNet inputs with other shapes than in `unet`, the config of the family."""
    shapes = header.shapes
    expected = {
        f"{UNET_PREFIX}input_blocks.0.0.weight": unet.get("in_channels", 4),
        POOLED_TEXT_KEY: unet.get("projection_class_embeddings_input_dim"),
    }
    for name, channels in expected.items():
        if name in shapes and len(shapes[name]) > 1 and channels is not None and shapes[name][1] != channels:
            yield f"its {name} has {shapes[name][1]} input channels; text-to-image models of its family have {channels}"


def read_prediction_type(header: Header) -> tuple[str | None, str | None]:
    """Return the prediction type of a single file, None if unknown; and a warning if the file is contradictory.

    Trainers add a tensor `v_pred` to models with v-prediction, and `ztsnr` to models trained with zero terminal SNR.
    `modelspec.prediction_type` is from the Model Metadata Standard, `modelspec.predict_key` from ComfyUI. Merging tools
    copy metadata from one file to another, so the tensors have priority.
    """
    metadata = header.metadata
    declared = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or ""
    declared = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(declared.lower())
    marker = next((name for name in (V_PREDICTION_MARKER, ZERO_SNR_MARKER) if name in header.shapes), None)
    if declared == "epsilon" and marker is not None:
        return "v_prediction", PREDICTION_CONFLICT.format(header.file, marker)
    return declared or ("v_prediction" if marker == V_PREDICTION_MARKER else None), None
