"""Models that would be sampled with the wrong settings are rejected by name, before anything is loaded. No torch.

One check for all commands: `find_model` and `read_facts` call it for whatever `generate`, `plan` and `models check` are
given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from linfusion_cli.core.errors import DataError
from linfusion_cli.models.files.header import Header

KINDS = "Use a text-to-image model of the SDXL, SD 2.1 or SD 1.5 family."
# In a single file: what the names of its networks begin with, and the embedding that only SDXL has.
UNET = "model.diffusion_model."
POOLED_TEXT = f"{UNET}label_emb.0.0.weight"
# Tensors that trainers put into single files to mark the noise schedule.
EDM_MARKERS = {
    "edm_vpred.sigma_max": "EDM noise levels, as CosXL has them",
    "edm_vpred.sigma_min": "EDM noise levels, as CosXL has them",
    "edm_mean": "EDM noise levels, as Playground v2.5 has them",
    "edm_std": "EDM noise levels, as Playground v2.5 has them",
}
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
# Classes of diffusers whose noise levels do not come from betas.
OTHER_PROCESS = re.compile(r"EDM|Flow|KarrasVe|ScoreSde|Cosine|VQDiffusion|CMStochastic|Wuerstchen|CogVideoX|UnCLIP")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Conditioning of a UNet that a prompt and a size do not give; a value that is absent or false means none.
UNKNOWN_CONDITIONING = (
    "time_cond_proj_dim",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
)
CONTRADICTION = (
    "{} contradicts itself: its tensor {} marks v_prediction, its header says epsilon. v_prediction is used; "
    "--prediction-type epsilon overrides it."
)


def check_compatible(
    model: object, unet: Mapping[str, Any], scheduler: Mapping[str, Any], header: Header | None
) -> None:
    """Raise DataError naming the first thing that is not supported: `header` is that of a model in a single file."""
    problems = [*unet_problems(unet), *scheduler_problems(scheduler)]
    problems += [] if header is None else shape_problems(header, unet)
    raise_first(model, problems)


def check_markers(header: Header) -> None:
    """Raise DataError for a single file whose tensors mark what is not supported; needs no config of its family."""
    raise_first(header.file, list(marker_problems(header)))


def raise_first(model: object, problems: list[str]) -> None:
    """Raise DataError for the first of `problems`, if there are any."""
    if problems:
        raise DataError(f"{model} is not supported: {problems[0]}.", KINDS)


def unet_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What a UNet's config.json has that is not supported, each in words."""
    for name in UNKNOWN_CONDITIONING:
        if config.get(name):
            yield f"its UNet has {name} {config[name]!r}, a conditioning that no prompt gives"
    if config.get("addition_embed_type") not in (None, "text_time"):
        yield f"its UNet has addition_embed_type {config['addition_embed_type']!r} where SDXL has 'text_time'"
    if (config.get("time_embedding_type") or "positional") != "positional":
        yield f"its UNet has time_embedding_type {config['time_embedding_type']!r} instead of 'positional'"
    if config.get("out_channels", 4) != config.get("in_channels", 4):
        yield f"its UNet takes {config.get('in_channels', 4)} channels and gives {config.get('out_channels', 4)}"


def scheduler_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What a scheduler_config.json says that is not supported, each in words."""
    name = str(config.get("_class_name", ""))
    if OTHER_PROCESS.search(name):
        yield f"its scheduler_config.json has the class {name}, whose noise levels do not come from betas"
    if config.get("use_flow_sigmas") or (config.get("timestep_type") or "discrete") != "discrete":
        yield "its scheduler_config.json has continuous or flow-matching noise levels"
    if config.get("trained_betas") is None:
        yield from beta_problems(config)
    elif not are_betas(config["trained_betas"]):
        yield "its scheduler_config.json has trained_betas that are not numbers between 0 and 1"
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        yield f"its scheduler_config.json has num_train_timesteps {steps!r}"
    if config.get("prediction_type") not in (None, *PREDICTION_TYPES):
        yield f"its scheduler_config.json has prediction_type {config['prediction_type']!r}"


def beta_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the betas of a scheduler_config.json: diffusers would take defaults for missing ones."""
    start, end, schedule = (config.get(f"beta_{name}") for name in ("start", "end", "schedule"))
    if start is None or end is None or schedule is None:
        yield "its scheduler_config.json has no betas"
    elif not are_betas([start, end]) or start > end:
        yield f"its scheduler_config.json has beta_start {start!r} and beta_end {end!r}"
    elif schedule not in BETA_SCHEDULES:
        yield f"its scheduler_config.json has beta_schedule {schedule!r}"


def are_betas(values: Any) -> bool:
    """Whether `values` are numbers between 0 and 1, at least one; NaN is not."""
    return isinstance(values, list) and len(values) > 0 and all(isinstance(v, float) and 0 < v < 1 for v in values)


def marker_problems(header: Header) -> Iterator[str]:
    """What the names of a single file's tensors say that is not supported, each in words."""
    for marker, meaning in EDM_MARKERS.items():
        if any(name == marker or name.endswith(f".{marker}") for name in header.shapes):
            yield f"its tensor {marker} marks {meaning}"
    if any(name.startswith(UNET) and ".cond_proj." in name for name in header.shapes):
        yield "its UNet is conditioned on the guidance scale, as whole LCM models are (use their LoRA)"


def shape_problems(header: Header, unet: Mapping[str, Any]) -> Iterator[str]:
    """Inputs of a single file's UNet that are not those in `unet`, the config of its family, each in words."""
    shapes = header.shapes
    expected = {
        f"{UNET}input_blocks.0.0.weight": unet.get("in_channels", 4),
        POOLED_TEXT: unet.get("projection_class_embeddings_input_dim"),
    }
    for name, channels in expected.items():
        if name in shapes and len(shapes[name]) > 1 and channels is not None and shapes[name][1] != channels:
            yield f"its {name} takes {shapes[name][1]} channels, and {channels} in a text-to-image model of its family"


def prediction_in(header: Header) -> tuple[str | None, str | None]:
    """What the model in a single file predicts, None where nothing says it; and a warning where it contradicts itself.

    Tensors called `v_pred` and `ztsnr` are marks that trainers leave in files which predict v, and whose noise ends
    without any signal. `modelspec.prediction_type` is the Model Metadata Standard's, `modelspec.predict_key` ComfyUI's;
    merging tools copy such texts from one file to another, so the tensors win.
    """
    notes = header.notes
    said = notes.get("modelspec.prediction_type") or notes.get("modelspec.predict_key") or ""
    said = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(said.lower())
    marker = next((name for name in (V_PREDICTION, ZERO_SNR) if name in header.shapes), None)
    if said == "epsilon" and marker is not None:
        return "v_prediction", CONTRADICTION.format(header.file, marker)
    return said or ("v_prediction" if marker == V_PREDICTION else None), None
