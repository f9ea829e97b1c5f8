"""Groups of options that commands share, and the decorator that adds them to a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from typing import Any, get_type_hints

from linfusion_cli.cli.parsing import options


def request_options(
    size: options.Size = None,
    output: options.Output = None,
    preset: options.Preset = None,
    model: options.Model = None,
    linfusion: options.Linfusion = None,
    linfusion_merge: options.LinfusionMerge = None,
    linfusion_base: options.LinfusionBase = None,
    vae: options.Vae = None,
    lora: options.Lora = None,
    textual_inversion: options.TextualInversion = None,
    clip_skip: options.ClipSkip = None,
    ip_adapter: options.IpAdapter = None,
    ip_image: options.IpImage = None,
    ip_scale: options.IpScale = None,
    ip_image_encoder: options.IpImageEncoder = None,
    controlnet: options.Controlnet = None,
    control_image: options.ControlImage = None,
    control_scale: options.ControlScale = None,
    control_type: options.ControlType = None,
    control_phases: options.ControlPhases = None,
    negative_prompt: options.NegativePrompt = None,
    strict_prompt: options.StrictPrompt = None,
    seed: options.Seed = None,
    prediction_type: options.PredictionType = None,
    scheduler: options.Scheduler = None,
    timestep_spacing: options.TimestepSpacing = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance_rescale: options.GuidanceRescale = None,
    guidance_interval: options.GuidanceInterval = None,
    upscaler: options.Upscaler = None,
    upscale_space: options.UpscaleSpace = None,
    base_size: options.BaseSize = None,
    strength: options.Strength = None,
    cosine: options.Cosine = None,
    blur_sigma: options.BlurSigma = None,
    dilated_min: options.DilatedMin = None,
    original_size: options.OriginalSize = None,
    target_size: options.TargetSize = None,
    crop_top_left: options.CropTopLeft = None,
    attention: options.Attention = None,
    vae_statistics: options.VaeStatistics = None,
    vae_latents: options.VaeLatents = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    format: options.Format = None,
    compression: options.Compression = None,
    bits: options.Bits = None,
    dither: options.Dither = None,
    dpi: options.Dpi = None,
) -> None:
    """Declare the options of a request, in the order of the help."""


def file_options(
    preview: options.Preview = None,
    save_phases: options.SavePhases = None,
    overwrite: options.Overwrite = None,
    download: options.Download = None,
    prompt_metadata: options.PromptMetadata = None,
    keep_latents: options.KeepLatents = None,
    checkpoint_every: options.CheckpointEvery = None,
    fresh: options.Fresh = None,
) -> None:
    """Declare the options of a request about its files: what else is written, downloaded and saved."""


REQUEST_GROUPS = (request_options, file_options)


def generate_options(prompt: options.Prompt = None) -> None:
    """Declare the options that only `generate` has."""


def upscale_options(
    image: options.Image, prompt: options.PromptOption = None, background: options.Background = None
) -> None:
    """Declare the options that only `upscale` has."""


def plan_options(
    prompt: options.Prompt = None, image: options.ImageOption = None, background: options.Background = None
) -> None:
    """Declare the options that only `plan` has."""


def batch_options(jobs: options.Jobs = None, background: options.Background = None) -> None:
    """Declare the options that only `batch` has."""


def decode_options(
    output: options.Output = None,
    model: options.DecodeModel = None,
    vae: options.Vae = None,
    vae_statistics: options.VaeStatistics = None,
    format: options.Format = None,
    compression: options.Compression = None,
    bits: options.Bits = None,
    dither: options.Dither = None,
    dpi: options.Dpi = None,
    preview: options.Preview = None,
    overwrite: options.Overwrite = None,
    prompt_metadata: options.PromptMetadata = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    download: options.Download = None,
) -> None:
    """Declare the settings that `decode` can replace."""


def collect_options(
    *groups: Callable[..., None], without: Container[str] = (), own_first: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the parameters of `groups` to a command, which gets them as the dict `given`.

    Options named in `without` are left out. In the help, the command's own options come last, or after the first group
    if `own_first` is set.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        declared = {name: parameter for group in groups for name, parameter in _find_parameters(group).items()}
        shared = {name: parameter for name, parameter in declared.items() if name not in without}
        own = [parameter for name, parameter in _find_parameters(command).items() if name != "given"]
        hints = {
            name: hint
            for function in (*groups, command)
            for name, hint in get_type_hints(function, include_extras=True).items()
        }

        def with_options(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in shared}
            command(given, **arguments)

        own_index = len(_find_parameters(groups[0])) if own_first else len(shared)
        ordered = [*list(shared.values())[:own_index], *own, *list(shared.values())[own_index:]]
        keyword = inspect.Parameter.KEYWORD_ONLY  # allows parameters without a default after those with one
        parameters = [parameter.replace(annotation=hints[parameter.name], kind=keyword) for parameter in ordered]
        with_options.__doc__ = command.__doc__
        with_options.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]  # Typer reads it
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate


def _find_parameters(function: Callable[..., None]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)
