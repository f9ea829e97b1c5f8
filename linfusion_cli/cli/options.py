"""The options of commands that make a request. None means "not given": presets know the defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Argument, Option

Prompt = Annotated[
    str | None, Argument(help="What to paint; - reads it from standard input. Default: the preset's sample prompt.")
]
Size = Annotated[str | None, Option(help="Pixels: 16384 (a square) or 16384x8192 (width x height), from 64 up.")]
Output = Annotated[
    Path | None, Option("-o", "--output", help="The file: .tif, .png or .jpg. Default: linfusion-SIZE-seedN.tif here.")
]
Preset = Annotated[str | None, Option(help="A name from `linfusion presets list`, or a .toml file.")]
Model = Annotated[str | None, Option(help="A folder in diffusers' layout, a hub id in the local cache, or demo.")]
Linfusion = Annotated[
    str | None,
    Option(help="LinFusion weights: a folder, a hub id, auto (the model's own or its family's), or none."),
]
Vae = Annotated[
    str | None, Option(help="Another VAE: a folder, a hub id, or auto (the model's own). A TAESD is quick and rough.")
]
NegativePrompt = Annotated[str | None, Option(help="What not to paint.")]
Seed = Annotated[int | None, Option(help="Same seed and request, same picture. [default: 0]")]
Steps = Annotated[int | None, Option(help="Denoising steps of the base; larger phases run a share of them.")]
GuidanceScale = Annotated[float | None, Option(help="How closely to follow the prompt; 1 or less turns guidance off.")]
GuidanceRescale = Annotated[float | None, Option(help="0 to 1; about 0.7 mends burnt colours at high guidance.")]
Strength = Annotated[float | None, Option(help="0 to 1: share of the steps that the first phase above the base runs.")]
Attention = Annotated[
    str | None,
    Option(
        help="auto (the model's own at the base, linear above), linear or original; or one a phase, as original,linear."
    ),
]
VaeStatistics = Annotated[
    str | None,
    Option(help="What the VAE's normalisation goes by: exact (all of the picture), sampled, or auto (what has room)."),
]
VaeLatents = Annotated[
    str | None, Option(help="What a phase begins with: mean of the VAE's distribution, or a seeded sample of it.")
]
Vram = Annotated[str | None, Option(help="GPU memory that may be used, such as 12GiB. Default: 90 % of what is free.")]
Ram = Annotated[str | None, Option(help="Host memory that may be used, such as 32GiB. Default: 90 % of what is free.")]
Dtype = Annotated[str | None, Option(help="auto, float16, bfloat16 or float32.")]
Device = Annotated[str | None, Option(help="auto, cpu, cuda or cuda:N.")]
Format = Annotated[str | None, Option(help="tiff, png or jpeg. Default: by the output's name.")]
Compression = Annotated[str | None, Option(help="Of a TIFF: deflate, zstd, lzw, jpeg or none. [default: deflate]")]
Bits = Annotated[int | None, Option(help="Bits per channel: 8, or 16 in a TIFF or PNG. [default: 8]")]
Dither = Annotated[
    bool | None, Option("--dither/--no-dither", help="Round to 8 bits with noise: no bands in smooth skies.")
]
Dpi = Annotated[float | None, Option(help="Dots per inch, for print. [default: 300]")]
Preview = Annotated[Path | None, Option(help="Write a copy of 2048 px or less here as well, such as preview.jpg.")]
Overwrite = Annotated[bool | None, Option("--overwrite", help="Replace files that exist.")]
Download = Annotated[bool | None, Option("--download", help="Fetch a model that is not here. Never done unasked.")]
PromptMetadata = Annotated[
    bool | None, Option("--prompt-metadata/--no-prompt-metadata", help="Whether the file names its prompts.")
]
Report = Annotated[Path | None, Option(help="Write the report here, as JSON.")]
Json = Annotated[bool, Option("--json", help="Print the report as JSON on stdout, instead of the file's path.")]
Quiet = Annotated[bool, Option("-q", "--quiet", help="No progress and no table; warnings and errors stay.")]


def of_a_request(
    prompt: Prompt = None,
    size: Size = None,
    output: Output = None,
    preset: Preset = None,
    model: Model = None,
    linfusion: Linfusion = None,
    vae: Vae = None,
    negative_prompt: NegativePrompt = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    guidance_rescale: GuidanceRescale = None,
    strength: Strength = None,
    attention: Attention = None,
    vae_statistics: VaeStatistics = None,
    vae_latents: VaeLatents = None,
    vram: Vram = None,
    ram: Ram = None,
    dtype: Dtype = None,
    device: Device = None,
    format: Format = None,
    compression: Compression = None,
    bits: Bits = None,
    dither: Dither = None,
    dpi: Dpi = None,
    preview: Preview = None,
    overwrite: Overwrite = None,
    download: Download = None,
    prompt_metadata: PromptMetadata = None,
) -> None:
    """The options that make a request, in the order of the help."""


def takes_a_request(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as Typer sees it: with the options of a request before its own, the former as one dict."""
    shared, own = (inspect.signature(function).parameters for function in (of_a_request, command))
    hints = get_type_hints(of_a_request, include_extras=True) | get_type_hints(command, include_extras=True)

    def with_options(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in shared}
        command(given, **arguments)

    parameters = [*shared.values(), *(own[name] for name in own if name != "given")]
    with_options.__doc__ = command.__doc__
    with_options.__signature__ = inspect.Signature(
        [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
    )
    with_options.__annotations__ = {parameter.name: hints[parameter.name] for parameter in parameters}
    return with_options
