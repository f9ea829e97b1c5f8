"""`linfusion doctor`: what this machine has of what a run needs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from linfusion_cli import __version__, settings
from linfusion_cli.cli.output import render
from linfusion_cli.core.errors import LinfusionError, first_line
from linfusion_cli.core.units import format_bytes
from linfusion_cli.hardware import allocator, device
from linfusion_cli.hardware.cuda import platform_name, quiet_start
from linfusion_cli.hardware.device import start
from linfusion_cli.hardware.diagnosis import why_no_device
from linfusion_cli.models.locate.model import is_here

if TYPE_CHECKING:
    import torch

CODECS = ("imagecodecs", "isal", "tifffile", "pillow")
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "huggingface-hub")


def command(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """What this machine has: torch, CUDA, memory, codecs, models."""
    found = findings()
    lines = "\n".join(f"{name}: {value}" for name, value in found.items())
    render.answer(json.dumps(found, indent=2) if as_json else lines)


def findings() -> dict[str, Any]:
    """One entry per thing, in words."""
    memory = psutil.virtual_memory()
    return {
        "linfusion": __version__,
        **{name: device.installed(name) or "not installed" for name in PACKAGES},
        "cuda": cuda(),
        "cpus": device.cpu_count(),
        "memory": f"{format_bytes(memory.total)}, {format_bytes(memory.available)} free",
        "memory limit": format_bytes(device.memory_limit_bytes()),
        **{f"codec {name}": device.installed(name) or "not installed" for name in CODECS},
        **{f"model {name}": model_state(name) for name in settings.preset_names()},
    }


def cuda() -> str:
    """The CUDA or ROCm devices torch sees, with their memory and whether they work, or why there are none."""
    try:
        import torch

        with quiet_start():
            if torch.cuda.is_available():
                devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
                return f"{platform_name()}, {allocator.segments()} segments: {'; '.join(map(card_state, devices))}"
            reason, hint = why_no_device()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with torch or a driver is what is to be told
        return f"none: torch cannot tell ({first_line(error)})"
    return f"none: {reason}. {hint}".rstrip(". ")


def card_state(device: torch.device) -> str:
    """A card's name and memory, or what is wrong with it."""
    import torch

    try:
        start(device)
        card = torch.cuda.get_device_properties(device)
        return f"{card.name}, {format_bytes(card.total_memory)}"
    except LinfusionError as error:
        return str(error).rstrip(".")


def model_state(preset: str) -> str:
    """Whether the preset's model is here."""
    name = settings.preset_layer(preset).values["model"]
    return f"{name}, {'here' if is_here(name) else 'not on this machine'}"
