"""`linfusion doctor`: what this machine has of what a run needs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import psutil
import typer

from linfusion_cli import __version__, device, presets
from linfusion_cli.cli import render
from linfusion_cli.models.locate import is_here
from linfusion_cli.units import format_bytes

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
        **{f"model {name}": model_state(name) for name in presets.preset_names()},
    }


def cuda() -> str:
    """The CUDA devices torch sees, with their memory, or why there are none."""
    import torch

    if torch.version.cuda is None:
        return "none: this build of torch has no CUDA"
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if not cards:
        return f"none: torch is built for CUDA {torch.version.cuda} but sees no device"
    return "; ".join(f"{card.name}, {format_bytes(card.total_memory)}" for card in cards)


def model_state(preset: str) -> str:
    """Whether the preset's model is here."""
    name = presets.preset_layer(preset).values["model"]
    return f"{name}, {'here' if is_here(name) else 'not on this machine'}"
