"""The options of the commands: types and help texts.

An option that is not given is None: presets and requests define the default values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from linfusion_cli.settings.request import SCHEDULERS

Prompt = Annotated[
    str | None,
    Argument(help="The prompt; - reads it from standard input. [default: the sample prompt of the preset]"),
]
Image = Annotated[Path, Argument(help="The image to upscale: PNG, JPEG, WebP or TIFF.", show_default=False)]
ImageOption = Annotated[Path | None, Option("--image", help="Plan `upscale` of this image instead of `generate`.")]
Jobs = Annotated[
    str | None,
    Argument(
        help="The list of jobs: a .jsonl, .ndjson or .csv file, a .toml file with [[job]] tables, or a .txt file with "
        "one prompt per line. The format of standard input (-), pipes and files without a suffix is detected from "
        "their first lines."
    ),
]
PromptOption = Annotated[
    str | None,
    Option("--prompt", help="A prompt that describes the image; - reads it from standard input. [default: empty]"),
]
Background = Annotated[
    str | None,
    Option(help="Colour for transparent parts of the input image, e.g. white or #204060. Required for such images."),
]
Size = Annotated[
    str | None,
    Option(
        help="Size of the output in pixels: 16384x8192 (width x height), or 16384 for a square (upscale: for the "
        "longer side). At least 64. [default: the size of the preset; required for upscale]"
    ),
]
Output = Annotated[
    Path | None,
    Option(
        "-o",
        "--output",
        help="Output file: .tif, .png or .jpg. [default: in the current folder, named after size and seed, or after "
        "the input image]",
    ),
]
Preset = Annotated[
    str | None,
    Option(help="A name from `linfusion presets list`, or a .toml file. [default: sdxl if installed, else demo]"),
]
Model = Annotated[
    str | None,
    Option(
        help="A folder in the diffusers layout, a .safetensors file, a Hugging Face model OWNER/REPO[@REVISION] in the "
        "local cache, or demo (the embedded model)."
    ),
]
DecodeModel = Annotated[
    str | None,
    Option("--model", help="The model, if it is not where the run found it. [default: the model of the run]"),
]
Latents = Annotated[
    Path,
    Argument(
        help="A file written by --keep-latents, or the .linfusion folder of an unfinished run.", show_default=False
    ),
]
Linfusion = Annotated[
    str | None,
    Option(
        help="LinFusion weights: a folder, a hub id, none, or auto (the model's own, else its family's). "
        "[default: auto]"
    ),
]
LinfusionMerge = Annotated[
    str | None,
    Option(
        help="How the self-attention of a fine-tuned model is combined with the LinFusion weights: delta (add its "
        "difference from the base model), published (ignore it), keep (use its own projections), or auto (delta if the "
        "base model is installed). [default: auto]"
    ),
]
LinfusionBase = Annotated[
    str | None,
    Option(
        help="The base model for --linfusion-merge delta, for which the LinFusion weights were trained: a folder, a "
        "hub id, or auto (the family's). [default: auto]"
    ),
]
Vae = Annotated[
    str | None,
    Option(
        help="Another VAE: a folder, a file, a hub id, or auto (the model's own). A TAESD is fast, but less accurate. "
        "[default: auto]"
    ),
]
NegativePrompt = Annotated[str | None, Option(help="What the image should not show.")]
StrictPrompt = Annotated[
    bool | None,
    Option(
        "--strict-prompt/--no-strict-prompt",
        help="Reject prompts with syntax of other tools, e.g. weights such as (word:1.3), instead of warning.",
    ),
]
Lora = Annotated[
    list[str] | None,
    Option(
        metavar="LORA",
        help="A LoRA: FILE[:WEIGHT], a folder, or a hub id (OWNER/REPO or OWNER/REPO/FILE). Can be repeated.",
    ),
]
TextualInversion = Annotated[
    list[str] | None,
    Option(
        metavar="FILE",
        help="A textual inversion: FILE[:TOKEN], a folder, or a hub id. The prompt refers to it by TOKEN. "
        "Can be repeated.",
    ),
]
ClipSkip = Annotated[
    int | None,
    Option(help="The hidden layer of the text encoders, counted from the end: 1 is the last. [default: 1; SDXL: 2]"),
]
IpAdapter = Annotated[
    list[str] | None,
    Option(
        metavar="ADAPTER",
        help="An IP-Adapter: a file, a folder, or a hub id (OWNER/REPO or OWNER/REPO/FILE). Can be repeated.",
    ),
]
IpImage = Annotated[
    list[str] | None,
    Option(metavar="FILE", help="The image prompt of an --ip-adapter: one for each, in the same order."),
]
IpScale = Annotated[
    list[float] | None,
    Option(
        metavar="SCALE",
        help="Weight of an --ip-adapter: one for each; the last one holds for the rest. [default: 1]",
        show_default=False,
    ),
]
IpImageEncoder = Annotated[
    str | None,
    Option(help="The folder of the image encoder, or auto: the matching one near the --ip-adapter. [default: auto]"),
]
Controlnet = Annotated[
    list[str] | None,
    Option(
        metavar="CONTROLNET",
        help="A ControlNet or union ControlNet: a folder in the diffusers layout, or a hub id. Can be repeated.",
    ),
]
ControlImage = Annotated[
    list[str] | None,
    Option(metavar="FILE", help="The control image (edges, depth, pose …) of a --controlnet: one for each."),
]
ControlScale = Annotated[
    list[float] | None,
    Option(
        metavar="SCALE",
        help="Weight of a --controlnet, from 0: one for each; the last one holds for the rest. [default: 1]",
        show_default=False,
    ),
]
ControlType = Annotated[
    list[str] | None,
    Option(
        metavar="TYPE",
        help="The type of the control image of a union ControlNet: canny, depth, openpose, tile …, or its index.",
    ),
]
ControlPhases = Annotated[
    str | None,
    Option(help="The phases in which ControlNets are active: base, all, or indices such as 0,1. [default: base]"),
]
Seed = Annotated[int | None, Option(help="The same request with the same seed gives the same image. [default: 0]")]
PredictionType = Annotated[
    str | None,
    Option(
        help="The prediction type of the model: epsilon, v_prediction, or auto (from its config, else measured). "
        "[default: auto]"
    ),
]
Scheduler = Annotated[str | None, Option(help=f"One of {', '.join(SCHEDULERS)}. [default: euler]")]
TimestepSpacing = Annotated[
    str | None,
    Option(help="leading, trailing (for few-step models), linspace, or auto (the model's own). [default: auto]"),
]
Steps = Annotated[
    str | None,
    Option(
        help="Number of steps of the schedule, of which phases above the base run only the last ones; or one number "
        "per phase: 50,30. [default: 30]"
    ),
]
GuidanceScale = Annotated[
    str | None,
    Option(
        help="Classifier-free guidance scale; 1 or less disables guidance. Or one number per phase: 7.5,5. [default: 5]"
    ),
]
GuidanceRescale = Annotated[
    float | None, Option(help="0 to 1; about 0.7 reduces oversaturation at high guidance scales. [default: 0]")
]
GuidanceInterval = Annotated[
    str | None,
    Option(
        metavar="LO,HI",
        help="Apply guidance only at noise levels (sigma) above LO and up to HI (can be inf); 0.28,5.42 for SDXL.",
    ),
]
Upscaler = Annotated[
    str | None,
    Option(
        help="How phases are upscaled: demofusion, sdedit, or none (a single phase at the full size). [default: sdedit]"
    ),
]
UpscaleSpace = Annotated[
    str | None,
    Option(help="Resize between phases in pixel space, or in latent space (faster, but softer). [default: pixel]"),
]
BaseSize = Annotated[
    str | None,
    Option(
        help="Size of the first phase. [default: the aspect ratio of --size with the model's native number of pixels]"
    ),
]
Strength = Annotated[
    str | None,
    Option(
        help="0 to 1: the fraction of the steps that the first phase above the base runs; it decreases linearly for "
        "later phases. Or one number per phase: 0.4,0.3. [default: 0.32]"
    ),
]
Cosine = Annotated[
    str | None,
    Option(
        metavar="A1,A2,A3",
        help="DemoFusion's exponents for skip residual, dilated pass and blur. [default: 3,1,1]",
    ),
]
BlurSigma = Annotated[
    float | None, Option(help="DemoFusion's blur before the dilated pass, in latent pixels. [default: 0.8]")
]
DilatedMin = Annotated[
    float | None,
    Option(help="Skip the dilated pass in steps where its weight is smaller; 0 never skips it. [default: 0.01]"),
]
OriginalSize = Annotated[
    str | None, Option(help="SDXL's original-size conditioning. [default: the size of the output]")
]
TargetSize = Annotated[str | None, Option(help="SDXL's target-size conditioning. [default: the size of the output]")]
CropTopLeft = Annotated[str | None, Option(metavar="TOP,LEFT", help="SDXL's crop conditioning. [default: 0,0]")]
Attention = Annotated[
    str | None,
    Option(
        help="linear, original, or auto (original in the base phase, linear above); or one per phase: original,linear. "
        "[default: auto]"
    ),
]
VaeStatistics = Annotated[
    str | None,
    Option(
        help="GroupNorm statistics of the VAE: exact (of the whole image), sampled (of patches), or auto (exact as far "
        "as the memory budget allows). [default: auto]"
    ),
]
VaeLatents = Annotated[
    str | None,
    Option(
        help="The encoded latents of a phase: the mean of the VAE's distribution, or a seeded sample. [default: mean]"
    ),
]
Vram = Annotated[str | None, Option(help="Budget of GPU memory, e.g. 12GiB. [default: 90 % of the free memory]")]
Ram = Annotated[str | None, Option(help="Budget of host memory, e.g. 32GiB. [default: 90 % of the free memory]")]
Dtype = Annotated[str | None, Option(help="auto, float16, bfloat16 or float32. [default: auto]")]
Device = Annotated[str | None, Option(help="auto, cpu, cuda or cuda:N. [default: auto]")]
Format = Annotated[str | None, Option(help="tiff, png or jpeg. [default: from the suffix of the output]")]
Compression = Annotated[
    str | None, Option(help="Compression of a TIFF: deflate, zstd, lzw, jpeg or none. [default: deflate]")
]
Bits = Annotated[int | None, Option(help="Bits per channel: 8, or 16 for TIFF and PNG. [default: 8]")]
Dither = Annotated[
    bool | None, Option("--dither/--no-dither", help="Dither when rounding to 8 bits: prevents bands in smooth areas.")
]
Dpi = Annotated[float | None, Option(help="Dots per inch in the metadata, for printing. [default: 300]")]
Preview = Annotated[Path | None, Option(help="Also write a copy of at most 2048 px to this file.")]
Overwrite = Annotated[bool | None, Option("--overwrite", help="Replace existing files.")]
Download = Annotated[
    bool | None, Option("--download", help="Download missing models. Without this option, nothing is downloaded.")
]
PromptMetadata = Annotated[
    bool | None,
    Option(
        "--prompt-metadata/--no-prompt-metadata", help="Store the prompts in the metadata of the file. [default: yes]"
    ),
]
KeepLatents = Annotated[
    Path | None, Option(help="Write the final latents to this .safetensors file, for `linfusion decode`.")
]
CheckpointEvery = Annotated[
    float | None,
    Option(metavar="SECONDS", help="Interval of checkpoints; 0 saves one after each step. [default: 60]"),
]
Fresh = Annotated[bool | None, Option("--fresh", help="Start from the beginning, even if there is a checkpoint.")]
TimeLimit = Annotated[
    str | None,
    Option(
        metavar="TIME",
        help="Stop after 50m, 1h30m or 90s, save a checkpoint, and exit with 75. The same command resumes the run.",
    ),
]
SavePhases = Annotated[
    bool | None,
    Option("--save-phases/--no-save-phases", help="Also write the image of every phase, next to the output."),
]
Report = Annotated[Path | None, Option(help="Write the report to this file, as JSON.")]
LogFile = Annotated[
    Path | None,
    Option(help="Append all messages to this file, with timestamps. Several runs can share it, and it can be rotated."),
]
Json = Annotated[
    bool,
    Option("--json", help="Print the report as JSON to stdout instead of the path of the output."),
]
Quiet = Annotated[bool, Option("-q", "--quiet", help="Show no progress and no table, only warnings and errors.")]
