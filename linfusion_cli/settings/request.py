"""The request of a user: what to generate, and how. Frozen, validated on construction, independent of torch."""

from __future__ import annotations

from dataclasses import dataclass

from linfusion_cli.core.geometry import Size
from linfusion_cli.settings.checks import check_request
from linfusion_cli.settings.execution import ExecutionOptions
from linfusion_cli.settings.groups import INVERSION, LORA, ControlNet, ImageSource, IpAdapter, Lora, TextualInversion
from linfusion_cli.settings.kinds import PHASE, list_of, repeat
from linfusion_cli.settings.setting import ALL_COMMANDS, NETWORKS, group, nested, setting

DTYPES = ("auto", "float32", "bfloat16", "float16")
LINFUSION_MERGES = ("auto", "published", "keep", "delta")
ATTENTIONS = ("auto", "linear", "original")
UPSCALERS = ("demofusion", "sdedit", "none")
UPSCALE_SPACES = ("pixel", "latent")
SCHEDULERS = (
    "euler",
    "euler-a",
    "ddim",
    "dpmpp-2m",
    "dpmpp-2m-karras",
    "dpmpp-2m-sde",
    "unipc",
    "lcm",
    "pndm",
)
TIMESTEP_SPACINGS = ("auto", "leading", "trailing", "linspace")
PREDICTION_TYPES = ("auto", "epsilon", "v_prediction")
VAE_STATISTICS = ("auto", "exact", "sampled")
VAE_LATENTS = ("mean", "sample")
FORMATS = ("tiff", "png", "jpeg")
COMPRESSIONS = ("deflate", "zstd", "lzw", "jpeg", "none")
BITS = (8, 16)
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that determines an image, and how to execute it: the same request gives the same image.

    `size` is in pixels. An image is upscaled if `source` is set, and generated from the prompt otherwise. Per phase,
    the last value holding for all later phases: `steps`, `guidance_scale`, `attention` and `strength`.
    """

    prompt: str = setting(
        help="The prompt; - reads it from standard input.",
        panel="Prompt and guidance",
        default_text="the sample prompt of the preset; empty for upscale",
        commands=("generate", "upscale", "plan"),
        argument_of=("generate", "plan"),
        aliases=("text", "positive_prompt", "caption"),
    )
    size: Size = setting(
        help="Size of the output in pixels, at least 64: 16384x8192 (width x height), or 16384 for a square (upscale: "
        "for the longer side).",
        panel="Most used",
        rank=1,
        default_text="the size of the preset; upscale: twice the input image",
        aliases=("resolution", "image_size"),
    )
    model: str = setting(
        help="A folder in the diffusers layout, a .safetensors file, a Hugging Face model OWNER/REPO[@REVISION] in the "
        "cache, or demo.",
        panel="Most used",
        rank=4,
        default_text="the model of the preset",
        names_file=True,
        reloads=NETWORKS,
        commands=ALL_COMMANDS,
        aliases=("checkpoint", "ckpt", "sd_model", "model_name"),
        completion="models",
    )
    negative_prompt: str = setting(
        "",
        help="What the image should not show.",
        panel="Most used",
        rank=6,
        default_text="",
        aliases=("negative", "uc", "neg_prompt"),
    )
    seed: int = setting(
        0,
        help="The same request with the same seed gives the same image.",
        panel="Most used",
        rank=7,
        limits=(0, MAX_SEED),
    )
    steps: tuple[int, ...] = setting(
        (30,),
        help="Number of steps of the schedule, of which phases above the base run only the last ones. Or one number "
        "per phase: 50,30.",
        panel="Most used",
        rank=8,
        metavar="N[,N…]",
        limits=(1, 1000),
        per_phase=True,
        aliases=("num_inference_steps", "num_steps", "sampling_steps"),
    )
    guidance_scale: tuple[float, ...] = setting(
        (5.0,),
        help="Classifier-free guidance scale; 1 or less disables guidance. Or one number per phase: 7.5,5.",
        panel="Most used",
        rank=9,
        metavar="SCALE[,SCALE…]",
        limits=(0, 100),
        per_phase=True,
        aliases=("cfg", "cfg_scale", "guidance", "scale"),
    )
    lora: tuple[Lora, ...] = setting(
        (),
        kind=repeat(LORA),
        help="A LoRA: FILE[:WEIGHT], a folder, or a hub id (OWNER/REPO or OWNER/REPO/FILE). Can be repeated.",
        panel="Most used",
        rank=10,
        repeated=True,
        reloads=("unet", "text_encoders"),
        used_by_decode=False,
        aliases=("loras",),
        completion="files",
    )
    guidance_rescale: float = setting(
        0.0,
        help="0 to 1; about 0.7 reduces oversaturation at high guidance scales.",
        panel="Prompt and guidance",
        limits=(0, 1),
    )
    guidance_interval: tuple[float, ...] = setting(
        (),
        help="Apply guidance only at noise levels (sigma) above LO and up to HI (can be inf); 0.28,5.42 for SDXL.",
        panel="Prompt and guidance",
        metavar="LO,HI",
        default_text="at all noise levels",
    )
    clip_skip: int | None = setting(
        None,
        help="The hidden layer of the text encoders, counted from the end: 1 is the last.",
        panel="Prompt and guidance",
        default_text="1; SDXL: 2",
        limits=(1, 100),
    )
    textual_inversion: tuple[TextualInversion, ...] = setting(
        (),
        kind=repeat(INVERSION),
        help="A textual inversion: FILE[:TOKEN], a folder, or a hub id. The prompt refers to it by TOKEN. Can be "
        "repeated.",
        panel="Model",
        repeated=True,
        reloads=("text_encoders",),
        used_by_decode=False,
        aliases=("embedding", "embeddings"),
        completion="files",
    )
    linfusion: str = setting(
        "auto",
        help="LinFusion weights: a folder, a hub id, none, or auto (the model's own, else its family's).",
        panel="Model",
        metavar="WEIGHTS",
        reloads=("unet",),
        used_by_decode=False,
        completion="models",
    )
    linfusion_merge: str = setting(
        "auto",
        help="How the self-attention of a fine-tuned model is combined with the LinFusion weights: delta (add its "
        "difference from the base model), published (ignore it), keep (use its own projections), or auto (delta if the "
        "base model is installed).",
        panel="Model",
        choices=LINFUSION_MERGES,
        reloads=("unet",),
        used_by_decode=False,
    )
    linfusion_base: str = setting(
        "auto",
        help="The base model for --linfusion-merge delta, for which the LinFusion weights were trained: a folder, a "
        "hub id, or auto (the family's).",
        panel="Model",
        metavar="MODEL",
        names_file=True,
        reloads=("unet",),
        used_by_decode=False,
        completion="models",
    )
    vae: str = setting(
        "auto",
        help="Another VAE: a folder, a file, a hub id, or auto (the model's own). A TAESD is fast, but less accurate.",
        panel="Model",
        metavar="MODEL",
        names_file=True,
        reloads=("vae",),
        commands=ALL_COMMANDS,
        completion="models",
    )
    prediction_type: str = setting(
        "auto",
        help="The prediction type of the model, or auto (from its config, else measured).",
        panel="Model",
        choices=PREDICTION_TYPES,
    )
    attention: tuple[str, ...] = setting(
        ("auto",),
        help="linear, original, or auto (original in the base phase, linear above); or one per phase: original,linear.",
        panel="Model",
        metavar="KIND[,KIND…]",
        choices=ATTENTIONS,
        per_phase=True,
        used_by_decode=False,
    )
    source: ImageSource | None = nested(None, item=ImageSource)
    controlnet: tuple[ControlNet, ...] = group(item=ControlNet)
    control_phases: tuple[str, ...] = setting(
        ("base",),
        kind=list_of(PHASE, "PHASE[,PHASE…]"),
        help="The phases in which ControlNets are active: base, all, or indices such as 0,1.",
        panel="Input images",
        used_by_decode=False,
    )
    ip_adapter: tuple[IpAdapter, ...] = group(item=IpAdapter)
    ip_image_encoder: str = setting(
        "auto",
        help="The folder of the image encoder, or auto: the matching one near the --ip-adapter.",
        panel="Input images",
        metavar="FOLDER",
        names_file=True,
        reloads=("unet",),
        used_by_decode=False,
        completion="files",
    )
    scheduler: str = setting(
        "euler",
        help="The scheduler.",
        panel="Sampling",
        choices=SCHEDULERS,
        aliases=("sampler", "sampler_name", "sampling_method"),
    )
    timestep_spacing: str = setting(
        "auto",
        help="The spacing of the timesteps: trailing for few-step models, or auto (the model's own).",
        panel="Sampling",
        choices=TIMESTEP_SPACINGS,
    )
    upscaler: str = setting(
        "sdedit",
        help="How phases are upscaled: demofusion, sdedit, or none (a single phase at the full size).",
        panel="Upscaling",
        choices=UPSCALERS,
    )
    upscale_space: str = setting(
        "pixel",
        help="Resize between phases in pixel space, or in latent space (faster, but softer).",
        panel="Upscaling",
        choices=UPSCALE_SPACES,
    )
    base_size: Size | None = setting(
        None,
        help="Size of the first phase.",
        panel="Upscaling",
        default_text="the aspect ratio of --size with the model's native number of pixels",
    )
    strength: tuple[float, ...] = setting(
        (0.32,),
        help="0 to 1: the fraction of the steps that the first phase above the base runs; it decreases linearly for "
        "later phases. Or one number per phase: 0.4,0.3.",
        panel="Upscaling",
        metavar="X[,X…]",
        limits=(0, 1),
        per_phase=True,
        aliases=("denoise", "denoising_strength"),
    )
    cosine: tuple[float, ...] = setting(
        (3.0, 1.0, 1.0),
        help="DemoFusion's exponents for skip residual, dilated pass and blur.",
        panel="Upscaling",
        metavar="A1,A2,A3",
        limits=(0, 100),
    )
    blur_sigma: float = setting(
        0.8,
        help="DemoFusion's blur before the dilated pass, in latent pixels.",
        panel="Upscaling",
        metavar="SIGMA",
        limits=(0.01, 100),
    )
    dilated_min: float = setting(
        0.01,
        help="Skip the dilated pass in steps where its weight is smaller; 0 never skips it.",
        panel="Upscaling",
        metavar="WEIGHT",
        limits=(0, 1),
    )
    save_phases: bool = setting(
        False,
        help="Also write the image of every phase, next to the output.",
        panel="Output file",  # decides="latents": a resumed run cannot write the phases that are over
    )
    original_size: Size | None = setting(
        None,
        help="SDXL's original-size conditioning.",
        panel="SDXL size conditioning",
        default_text="the size of the output",
    )
    target_size: Size | None = setting(
        None,
        help="SDXL's target-size conditioning.",
        panel="SDXL size conditioning",
        default_text="the size of the output",
    )
    crop_top_left: tuple[int, ...] = setting(
        (0, 0), help="SDXL's crop conditioning.", panel="SDXL size conditioning", metavar="TOP,LEFT"
    )
    dtype: str = setting(
        "auto",
        help="The precision of the UNet; auto is float16 on a GPU, float32 on a CPU.",
        panel="Memory and device",
        choices=DTYPES,
        reloads=NETWORKS,
        commands=ALL_COMMANDS,
        aliases=("precision",),
    )
    vae_statistics: str = setting(
        "auto",
        help="GroupNorm statistics of the VAE: exact (of the whole image), sampled (of patches), or auto (exact as far "
        "as the memory budget allows).",
        panel="Memory and device",
        choices=VAE_STATISTICS,
        commands=ALL_COMMANDS,
    )
    vae_latents: str = setting(
        "mean",
        help="The encoded latents of a phase: the mean of the VAE's distribution, or a seeded sample.",
        panel="Upscaling",
        choices=VAE_LATENTS,
    )
    format: str | None = setting(
        None,
        help="File format.",
        panel="Output file",
        default_text="from the suffix of the output",
        choices=FORMATS,
        decides="file",
        commands=ALL_COMMANDS,
    )
    compression: str | None = setting(
        None,
        help="Compression of a TIFF.",
        panel="Output file",
        default_text="deflate",
        choices=COMPRESSIONS,
        decides="file",
        commands=ALL_COMMANDS,
    )
    bits: int = setting(
        8,
        help="Bits per channel; 16 for TIFF and PNG only.",
        panel="Output file",
        choices=BITS,
        decides="file",
        commands=ALL_COMMANDS,
        aliases=("bit_depth",),
    )
    dither: bool = setting(
        False,
        help="Dither when rounding to 8 bits: prevents bands in smooth areas.",
        panel="Output file",
        decides="file",
        commands=ALL_COMMANDS,
    )
    dpi: float = setting(
        300.0,
        help="Dots per inch in the metadata, for printing.",
        panel="Output file",
        limits=(1, 100_000),
        decides="file",
        commands=ALL_COMMANDS,
    )
    prompt_metadata: bool = setting(
        True,
        help="Store the prompts in the metadata of the file.",
        panel="Output file",
        decides="file",
        commands=ALL_COMMANDS,
    )
    execution: ExecutionOptions = nested(item=ExecutionOptions)

    def __post_init__(self) -> None:
        """Raise UsageError with all invalid settings."""
        check_request(self)
