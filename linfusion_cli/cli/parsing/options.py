"""The options of commands that make a request. None means "not given": presets know the defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Argument, Option

from linfusion_cli.settings.request import SCHEDULERS

Prompt = Annotated[
    str | None, Argument(help="What to paint; - reads it from standard input. Default: the preset's sample prompt.")
]
Image = Annotated[Path, Argument(help="The picture: PNG, JPEG, WebP or TIFF.", show_default=False)]
ImageOption = Annotated[Path | None, Option("--image", help="Plan `upscale` of this picture, instead of `generate`.")]
Jobs = Annotated[
    str | None,
    Argument(
        help="The list: .jsonl or .ndjson, .csv, .toml with [[job]] tables, or .txt with a prompt a line; no other "
        "suffix. Standard input (-), pipes and files without a suffix are recognised by their first lines."
    ),
]
PromptOption = Annotated[
    str | None, Option("--prompt", help="What the picture shows; - reads it from standard input. Default: nothing.")
]
Background = Annotated[
    str | None, Option(help="The colour behind transparent parts, such as white or #204060; refused without one.")
]
Size = Annotated[
    str | None,
    Option(help="Pixels: 16384 (a square; of a picture, its longer side) or 16384x8192 (width x height), from 64 up."),
]
Output = Annotated[
    Path | None,
    Option("-o", "--output", help="The file: .tif, .png or .jpg. Default: here, named after size and seed or picture."),
]
Preset = Annotated[str | None, Option(help="A name from `linfusion presets list`, or a .toml file.")]
Model = Annotated[
    str | None,
    Option(help="A folder in diffusers' layout, a .safetensors, OWNER/REPO[@REVISION] in the local cache, or demo."),
]
Linfusion = Annotated[
    str | None,
    Option(help="LinFusion weights: a folder, a hub id, auto (the model's own or its family's), or none."),
]
LinfusionMerge = Annotated[
    str | None,
    Option(
        help="What a fine-tune's own attention brings to them: its difference from its base (delta), nothing "
        "(published), its projections in place of theirs (keep), or auto: delta where the base is here."
    ),
]
LinfusionBase = Annotated[
    str | None,
    Option(help="The model that those weights were made for, for delta: a folder, a hub id, or auto (its family's)."),
]
Vae = Annotated[
    str | None,
    Option(help="Another VAE: a folder, a file, a hub id, or auto (the model's own). A TAESD is quick and rough."),
]
NegativePrompt = Annotated[str | None, Option(help="What not to paint.")]
StrictPrompt = Annotated[
    bool | None,
    Option("--strict-prompt/--no-strict-prompt", help="Refuse weights such as (word:1.3), which are read literally."),
]
Lora = Annotated[
    list[str] | None,
    Option(help="A LoRA: FILE[:WEIGHT], a folder, or a hub id (OWNER/REPO or OWNER/REPO/FILE). May be given again."),
]
TextualInversion = Annotated[
    list[str] | None,
    Option(help="A textual inversion: FILE[:TOKEN], found as LoRAs are. TOKEN in the prompt stands for it."),
]
ClipSkip = Annotated[
    int | None,
    Option(help="Which layer of the text encoders to listen to, from the end: 1 the last. [default: 1; SDXL: 2]"),
]
IpAdapter = Annotated[
    list[str] | None,
    Option(help="An IP-Adapter: a file, a folder, or a hub id (OWNER/REPO or OWNER/REPO/FILE). May be given again."),
]
IpImage = Annotated[list[str] | None, Option(help="The picture that an --ip-adapter listens to: one for each.")]
IpScale = Annotated[
    list[float] | None,
    Option(help="How much it adds; one for each, the last for all that follow. [default: 1]", show_default=False),
]
IpImageEncoder = Annotated[
    str | None, Option(help="The image encoder's folder; auto is the one near the --ip-adapter that fits it.")
]
Controlnet = Annotated[
    list[str] | None,
    Option(help="A ControlNet: a folder in diffusers' layout, or a hub id; union models too. May be given again."),
]
ControlImage = Annotated[
    list[str] | None, Option(help="The picture it follows (edges, depth, a pose …), one for each --controlnet.")
]
ControlScale = Annotated[
    list[float] | None, Option(help="How strongly, from 0; the last holds for all that follow. [default: 1]")
]
ControlType = Annotated[
    list[str] | None,
    Option(help="What the picture of a union model shows: canny, depth, openpose, tile …; or its number."),
]
ControlPhases = Annotated[
    str | None, Option(help="Where they act: base, all, or numbers of phases, such as 0,1. [default: base]")
]
Seed = Annotated[int | None, Option(help="Same seed and request, same picture. [default: 0]")]
PredictionType = Annotated[
    str | None, Option(help="What the model predicts: epsilon, v_prediction, or auto (its config, else a probe).")
]
Scheduler = Annotated[str | None, Option(help=f"One of {', '.join(SCHEDULERS)}. [default: euler]")]
TimestepSpacing = Annotated[
    str | None, Option(help="leading, trailing (few-step models) or linspace; auto is the model's own.")
]
Steps = Annotated[
    str | None, Option(help="Steps of the schedule, of which larger phases run the last; or a number a phase: 50,30.")
]
GuidanceScale = Annotated[
    str | None, Option(help="How closely to follow the prompt; 1 or less turns guidance off. Or a number a phase.")
]
GuidanceRescale = Annotated[float | None, Option(help="0 to 1; about 0.7 mends burnt colours at high guidance.")]
GuidanceInterval = Annotated[
    str | None,
    Option(metavar="LO,HI", help="Guidance only at noise levels above LO, up to HI (or inf): 0.28,5.42 for SDXL."),
]
Upscaler = Annotated[
    str | None,
    Option(help="How a picture grows: demofusion, sdedit, or none (one phase at the full size)."),
]
UpscaleSpace = Annotated[
    str | None, Option(help="Enlarge the pixel picture between phases, or its latent one: quicker and softer.")
]
BaseSize = Annotated[str | None, Option(help="Size of the first phase. Default: the model's own area, in proportion.")]
Strength = Annotated[
    str | None,
    Option(
        help="0 to 1: share of the steps that the first phase above the base runs, from which the others go down; "
        "or a number a phase."
    ),
]
Cosine = Annotated[
    str | None,
    Option(metavar="A1,A2,A3", help="DemoFusion's exponents: skip residual, dilated pass, blur. [default: 3,1,1]"),
]
BlurSigma = Annotated[
    float | None, Option(help="DemoFusion's blur before the dilated pass, in latents. [default: 0.8]")
]
DilatedMin = Annotated[
    float | None,
    Option(help="Leave the dilated pass out where its weight is less; 0 always runs it. [default: 0.01]"),
]
OriginalSize = Annotated[str | None, Option(help="What SDXL is told of the picture's size. Default: its final size.")]
TargetSize = Annotated[str | None, Option(help="The same of its size after cropping. Default: its final size.")]
CropTopLeft = Annotated[str | None, Option(metavar="TOP,LEFT", help="What SDXL is told of the crop. [default: 0,0]")]
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
KeepLatents = Annotated[
    Path | None, Option(help="Keep the finished latents in this .safetensors, for `linfusion decode`.")
]
CheckpointEvery = Annotated[
    float | None, Option(metavar="SECONDS", help="How often the state is saved; 0 is after each step. [default: 60]")
]
Fresh = Annotated[bool | None, Option("--fresh", help="Begin anew, whatever an earlier run has left.")]
TimeLimit = Annotated[
    str | None,
    Option(metavar="TIME", help="Save the state and end after 50m, 1h30m or 90s, with 75: run the same command again."),
]
SavePhases = Annotated[
    bool | None, Option("--save-phases/--no-save-phases", help="Keep every phase's picture beside the output.")
]
Report = Annotated[Path | None, Option(help="Write the report here, as JSON.")]
LogFile = Annotated[
    Path | None, Option(help="Append each line to this file as well, with its time; it may be shared and rotated.")
]
Json = Annotated[
    bool,
    Option("--json", help="Print the report as JSON on stdout, instead of the file's path; nothing if the run fails."),
]
Quiet = Annotated[bool, Option("-q", "--quiet", help="No progress and no table; warnings and errors stay.")]


def of_a_request(
    size: Size = None,
    output: Output = None,
    preset: Preset = None,
    model: Model = None,
    linfusion: Linfusion = None,
    linfusion_merge: LinfusionMerge = None,
    linfusion_base: LinfusionBase = None,
    vae: Vae = None,
    lora: Lora = None,
    textual_inversion: TextualInversion = None,
    clip_skip: ClipSkip = None,
    ip_adapter: IpAdapter = None,
    ip_image: IpImage = None,
    ip_scale: IpScale = None,
    ip_image_encoder: IpImageEncoder = None,
    controlnet: Controlnet = None,
    control_image: ControlImage = None,
    control_scale: ControlScale = None,
    control_type: ControlType = None,
    control_phases: ControlPhases = None,
    negative_prompt: NegativePrompt = None,
    strict_prompt: StrictPrompt = None,
    seed: Seed = None,
    prediction_type: PredictionType = None,
    scheduler: Scheduler = None,
    timestep_spacing: TimestepSpacing = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    guidance_rescale: GuidanceRescale = None,
    guidance_interval: GuidanceInterval = None,
    upscaler: Upscaler = None,
    upscale_space: UpscaleSpace = None,
    base_size: BaseSize = None,
    strength: Strength = None,
    cosine: Cosine = None,
    blur_sigma: BlurSigma = None,
    dilated_min: DilatedMin = None,
    original_size: OriginalSize = None,
    target_size: TargetSize = None,
    crop_top_left: CropTopLeft = None,
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
) -> None:
    """The options that make a request, in the order of the help."""


def of_its_files(
    preview: Preview = None,
    save_phases: SavePhases = None,
    overwrite: Overwrite = None,
    download: Download = None,
    prompt_metadata: PromptMetadata = None,
    keep_latents: KeepLatents = None,
    checkpoint_every: CheckpointEvery = None,
    fresh: Fresh = None,
) -> None:
    """Those of a request that say what else is written, and how."""


def of_generate(prompt: Prompt = None) -> None:
    """What `generate` takes before them."""


def of_upscale(image: Image, prompt: PromptOption = None, background: Background = None) -> None:
    """What `upscale` takes before them."""


def of_plan(prompt: Prompt = None, image: ImageOption = None, background: Background = None) -> None:
    """What `plan` takes before them."""


def of_batch(jobs: Jobs = None, background: Background = None) -> None:
    """What `batch` takes before them."""


def takes_a_request(
    before: Callable[..., None], without: Container[str] = (), own_first: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command: it gets the options of `before` and of a request as one dict, before those of its own.

    It has no options `without`. With `own_first`, its own stand before those of a request in the help.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        sources = (before, of_a_request, of_its_files)
        all_of_them = {name: it for f in sources for name, it in inspect.signature(f).parameters.items()}
        shared = {name: parameter for name, parameter in all_of_them.items() if name not in without}
        own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "given"]
        hints = {
            name: hint for f in (*sources, command) for name, hint in get_type_hints(f, include_extras=True).items()
        }

        def with_options(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in shared}
            command(given, **arguments)

        first = len(inspect.signature(before).parameters) if own_first else len(shared)
        order = [*list(shared.values())[:first], *own, *list(shared.values())[first:]]
        by_name = inspect.Parameter.KEYWORD_ONLY  # one without a default may follow one that has one
        parameters = [parameter.replace(annotation=hints[parameter.name], kind=by_name) for parameter in order]
        with_options.__doc__ = command.__doc__
        with_options.__signature__ = inspect.Signature(parameters)
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorated
