"""What a person asks for: frozen, validated on construction, ignorant of the command line and of torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linfusion_cli.errors import UsageError
from linfusion_cli.geometry import Size

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "linear", "original")
VAE_STATISTICS = ("auto", "exact", "sampled")
VAE_LATENTS = ("mean", "sample")
BITS = (8, 16)
COMPRESSIONS = ("deflate", "zstd", "lzw", "jpeg", "none")
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class GenerateRequest:
    """Everything that decides what one `generate` does; the same request gives the same picture.

    Sizes are pixels; `strength` is the share of the steps that the first phase after the base runs. `attention` is one
    kind, or one a phase with commas between, the last for all that follow. `vae_statistics` is what the VAE's
    normalisation goes by, `vae_latents` what phases begin with: the mean of the encoder's distribution, or a draw from
    it. `vram` and `ram` are bytes that may be used.
    """

    prompt: str
    size: Size
    output: Path
    model: str
    linfusion: str = "auto"
    vae: str = "auto"
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 30
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    strength: float = 0.32
    attention: str = "auto"
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
    download: bool = False
    prompt_metadata: bool = True

    def __post_init__(self) -> None:
        for setting, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            _check(_is_text(text), setting, text, "It is not valid UTF-8.")
        _check(bool(self.model.strip()), "model", self.model, "Name a folder, a hub id, or demo.")
        _check(bool(self.vae.strip()), "vae", self.vae, "Name a folder, a hub id, or auto.")
        _in_range("seed", self.seed, 0, LARGEST_SEED)
        _in_range("steps", self.steps, 1, 1000)
        _in_range("guidance_scale", self.guidance_scale, 0, 100)
        _in_range("guidance_rescale", self.guidance_rescale, 0, 1)
        _in_range("strength", self.strength, 0, 1)
        _in_range("dpi", self.dpi, 1, 100_000)
        for kind in self.attentions:
            _check(kind in ATTENTIONS, "attention", self.attention, f"Use {', '.join(ATTENTIONS)}, or one a phase.")
        for setting, value in (("vram", self.vram), ("ram", self.ram)):
            _check(value is None or value > 0, setting, value, "Use a size such as 12GiB.")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("vae_statistics", self.vae_statistics, VAE_STATISTICS)
        _one_of("vae_latents", self.vae_latents, VAE_LATENTS)
        _one_of("bits", self.bits, BITS)
        _one_of("compression", self.compression or COMPRESSIONS[0], COMPRESSIONS)

    @property
    def attentions(self) -> list[str]:
        """The kinds of attention in `attention`, from the base up."""
        return [kind.strip() for kind in self.attention.split(",")]

    def to_json(self) -> dict[str, Any]:
        """The request as JSON values: what metadata and reports carry."""
        values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        return values | {"size": str(self.size)}


def flag(setting: str) -> str:
    """How a setting is called on the command line: "guidance_scale" -> "--guidance-scale"."""
    return "The prompt" if setting == "prompt" else "--" + setting.replace("_", "-")


def _check(holds: bool, setting: str, value: object, way_out: str) -> None:
    if not holds:
        raise UsageError(f"{flag(setting)} {value!r} is not possible.", way_out, setting)


def _is_text(value: str) -> bool:
    """Whether `value` has no lone surrogates, which stand for bytes of an argument that are no UTF-8."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)


def _in_range(setting: str, value: float, low: float, high: float) -> None:
    _check(math.isfinite(value) and low <= value <= high, setting, value, f"Use {low} to {high}.")


def _one_of(setting: str, value: str | int, choices: tuple[str | int, ...]) -> None:
    _check(value in choices, setting, value, f"Use one of {', '.join(map(str, choices))}.")
