"""The request of a user: frozen, validated on construction, independent of the command line and of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.units import parse_colour

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
BITS = (8, 16)
COMPRESSIONS = ("deflate", "zstd", "lzw", "jpeg", "none")
MAX_SEED = 2**63 - 1
MAX_PX = 1_000_000
CONTROL_PHASES = ("base", "all")


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Everything that determines an image: the same request gives the same image.

    Per phase, the last value holding for all later phases: `steps`, `guidance_scale`, `attention`, and `strength`, the
    share of the steps that a phase above the base runs (a single one is the first of a linear decrease).

    - Model: `linfusion_merge` selects how the model's own self-attention is merged into the LinFusion weights,
      `linfusion_base` is the model these were trained for. `clip_skip` is the hidden layer of the text encoders,
      counted from the end.
    - Adapters: each `ip_adapter` has an `ip_image` and an `ip_scale`, each `controlnet` a `control_image` and a
      `control_scale`, matched by position; the last scale holds for the rest. `control_type` has one entry per union
      model. `control_phases` are base, all, or indices of phases.
    - Upscaling: `cosine` are DemoFusion's exponents for skip residual, dilated pass and blur. `guidance_interval` is a
      range of noise levels.
    - VAE: `vae_statistics` selects how GroupNorm statistics are computed; `vae_latents` whether encoding gives the mean
      of the distribution or a sample.
    - Execution: `vram` and `ram` are budgets in bytes. The run state is saved every `checkpoint_every` seconds (0:
      after each step); `fresh` ignores a saved one. `keep_latents` is a file for the final latents.
    - `strict_prompt` rejects prompts that other tools would not read literally. Sizes are in pixels.
    """

    prompt: str
    size: Size
    output: Path
    model: str
    linfusion: str = "auto"
    linfusion_merge: str = "auto"
    linfusion_base: str = "auto"
    vae: str = "auto"
    lora: tuple[str, ...] = ()
    textual_inversion: tuple[str, ...] = ()
    clip_skip: int | None = None
    ip_adapter: tuple[str, ...] = ()
    ip_image: tuple[str, ...] = ()
    ip_scale: tuple[float, ...] = (1.0,)
    ip_image_encoder: str = "auto"
    controlnet: tuple[str, ...] = ()
    control_image: tuple[str, ...] = ()
    control_scale: tuple[float, ...] = (1.0,)
    control_type: tuple[str, ...] = ()
    control_phases: tuple[str, ...] = ("base",)
    negative_prompt: str = ""
    strict_prompt: bool = False
    seed: int = 0
    prediction_type: str = "auto"
    scheduler: str = "euler"
    timestep_spacing: str = "auto"
    steps: tuple[int, ...] = (30,)
    guidance_scale: tuple[float, ...] = (5.0,)
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, ...] = ()
    upscaler: str = "sdedit"
    upscale_space: str = "pixel"
    base_size: Size | None = None
    strength: tuple[float, ...] = (0.32,)
    cosine: tuple[float, ...] = (3.0, 1.0, 1.0)
    blur_sigma: float = 0.8
    dilated_min: float = 0.01
    original_size: Size | None = None
    target_size: Size | None = None
    crop_top_left: tuple[int, ...] = (0, 0)
    attention: tuple[str, ...] = ("auto",)
    vae_statistics: str = "auto"
    vae_latents: str = "mean"
    vram: int | None = None
    ram: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    format: str | None = None
    compression: str | None = None
    bits: int = 8
    dither: bool = False
    dpi: float = 300.0
    overwrite: bool = False
    preview: Path | None = None
    save_phases: bool = False
    download: bool = False
    prompt_metadata: bool = True
    keep_latents: Path | None = None
    checkpoint_every: float = 60.0
    fresh: bool = False

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_numbers()
        self._check_growth()
        self._check_adapters()
        for setting, value in (("vram", self.vram), ("ram", self.ram)):
            _check(value is None or value > 0, setting, value, "Use a size such as 12GiB.")
        for setting, choices in CHOICES.items():
            _one_of(setting, getattr(self, setting), choices)
        _one_of("compression", self.compression or COMPRESSIONS[0], COMPRESSIONS)

    def _check_texts(self) -> None:
        for setting, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            _check(_is_text(text), setting, text, "It is not valid UTF-8.")
        _check(bool(self.model.strip()), "model", self.model, "Name a folder, a file, a hub id, or demo.")
        _check(bool(self.vae.strip()), "vae", self.vae, "Name a folder, a file, a hub id, or auto.")
        base = self.linfusion_base
        _check(bool(base.strip()), "linfusion_base", base, "Name a folder, a hub id, or auto.")
        for setting in ("lora", "textual_inversion"):
            for name in getattr(self, setting):
                _check(bool(name.strip()), setting, name, "Name a file, a folder, or a hub id.")

    def _check_numbers(self) -> None:
        _in_range("seed", self.seed, 0, MAX_SEED)
        _in_range("clip_skip", 1 if self.clip_skip is None else self.clip_skip, 1, 100)
        _in_range("guidance_rescale", self.guidance_rescale, 0, 1)
        _in_range("dpi", self.dpi, 1, 100_000)
        _in_range("checkpoint_every", self.checkpoint_every, 0, 86_400)
        for setting, low, high in (("steps", 1, 1000), ("guidance_scale", 0, 100), ("strength", 0, 1)):
            _check(len(getattr(self, setting)) > 0, setting, "", "Give at least one value.")
            for value in getattr(self, setting):
                _in_range(setting, value, low, high)
        for kind in self.attention or ("",):
            _check(kind in ATTENTIONS, "attention", kind, f"Use {', '.join(ATTENTIONS)}, or one per phase.")

    def _check_growth(self) -> None:
        _check(len(self.cosine) == 3, "cosine", self.cosine, "Give three exponents, such as 3,1,1.")
        for exponent in self.cosine:
            _in_range("cosine", exponent, 0, 100)
        _in_range("blur_sigma", self.blur_sigma, 0.01, 100)
        _in_range("dilated_min", self.dilated_min, 0, 1)
        interval = self.guidance_interval
        is_rising = not interval or (len(interval) == 2 and 0 <= interval[0] < interval[1])  # False for NaN
        _check(is_rising, "guidance_interval", interval, "Give two noise levels, such as 0.28,5.42 or 0.28,inf.")
        corner = self.crop_top_left
        _check(
            len(corner) == 2 and all(0 <= side <= MAX_PX for side in corner), "crop_top_left", corner, "Use TOP,LEFT."
        )

    def _check_adapters(self) -> None:
        self._check_images("ip_adapter", "ip_image", "ip_scale", -10)
        _check(bool(self.ip_image_encoder.strip()), "ip_image_encoder", "", "Name a folder, or auto.")
        self._check_images("controlnet", "control_image", "control_scale", 0)
        hint = f"Use {', '.join(CONTROL_PHASES)}, or numbers of phases: 0 is the first."
        for phase in self.control_phases or ("",):
            _check(phase in CONTROL_PHASES or phase.isdecimal(), "control_phases", phase, hint)

    def _check_images(self, adapter: str, image: str, scale: str, lowest: float) -> None:
        """Check adapters, each of which has an image, and a scale unless the previous one holds."""
        names, images, scales = (getattr(self, setting) for setting in (adapter, image, scale))
        for setting, named in ((adapter, names), (image, images)):
            for name in named:
                _check(bool(name.strip()), setting, name, "Name a file.")
        if len(images) != len(names):
            reason = f"{flag(image)} is given {len(images)} times, and {flag(adapter)} {len(names)} times."
            raise UsageError(reason, "Give one image for each, in the same order.", image)
        fits = 1 <= len(scales) <= max(1, len(names))
        _check(fits, scale, scales, f"Give one number for each {flag(adapter)}, or fewer: the last holds for the rest.")
        for value in scales:
            _in_range(scale, value, lowest, 10)

    def to_json(self) -> dict[str, Any]:
        """Return the request as JSON values, for metadata and reports."""
        return {key: _json_value(value) for key, value in self._values().items()}

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


CHOICES: dict[str, tuple[str | int, ...]] = {
    "linfusion_merge": LINFUSION_MERGES,
    "dtype": DTYPES,
    "prediction_type": PREDICTION_TYPES,
    "scheduler": SCHEDULERS,
    "timestep_spacing": TIMESTEP_SPACINGS,
    "upscaler": UPSCALERS,
    "upscale_space": UPSCALE_SPACES,
    "vae_statistics": VAE_STATISTICS,
    "vae_latents": VAE_LATENTS,
    "bits": BITS,
}


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(ImageRequest):
    """An image from a prompt."""


@dataclass(frozen=True, kw_only=True)
class UpscaleRequest(ImageRequest):
    """A larger version of `image`; its transparent parts get the colour `background`."""

    image: Path
    prompt: str = ""
    background: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.upscaler != "none", "upscaler", self.upscaler, "Use demofusion or sdedit to upscale an image.")
        self.background_rgb()

    def background_rgb(self) -> tuple[int, int, int] | None:
        """Return red, green and blue, 0 to 255, of the background, or None; raises UsageError for an unknown colour."""
        return None if self.background is None else parse_colour(self.background)


ARGUMENTS = {"prompt": "The prompt", "image": "The image"}


def flag(setting: str) -> str:
    """Return the name of a setting on the command line: "guidance_scale" -> "--guidance-scale"."""
    return ARGUMENTS.get(setting) or "--" + setting.replace("_", "-")


def _json_value(value: Any) -> Any:
    """Return `value` as JSON, which has no Infinity: an infinite number becomes text that parses as a number."""
    if isinstance(value, tuple):
        return tuple(map(_json_value, value))
    is_infinite = isinstance(value, float) and math.isinf(value)
    return str(value) if is_infinite or isinstance(value, Path | Size) else value


def _check(holds: bool, setting: str, value: object, hint: str) -> None:
    if not holds:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
        raise UsageError(f"{flag(setting)} {text} is not possible.", hint, setting)


def _is_text(value: str) -> bool:
    """Return whether `value` has no lone surrogates: Python decodes bytes that are not UTF-8 to these."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)


def _in_range(setting: str, value: float, low: float, high: float) -> None:
    _check(math.isfinite(value) and low <= value <= high, setting, value, f"Use {low} to {high}.")


def _one_of(setting: str, value: str | int, choices: tuple[str | int, ...]) -> None:
    _check(value in choices, setting, value, f"Use one of {', '.join(map(str, choices))}.")
