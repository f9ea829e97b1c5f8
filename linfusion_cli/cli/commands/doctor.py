"""`linfusion doctor`: show versions, devices, memory and installed models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linfusion_cli import __version__, settings
from linfusion_cli.cli.output.streams import emit_result
from linfusion_cli.core.errors import LinfusionError, first_line
from linfusion_cli.core.units import format_bytes
from linfusion_cli.hardware import allocator
from linfusion_cli.hardware.cuda import platform_name, suppress_start_warnings
from linfusion_cli.hardware.device import start_device
from linfusion_cli.hardware.host_memory import memory_limit_bytes
from linfusion_cli.hardware.no_gpu import explain_no_gpu
from linfusion_cli.hardware.versions import cpu_count, find_version
from linfusion_cli.models.locate.model import is_local

if TYPE_CHECKING:
    import torch

SCHEMA = 1  # of the JSON
CODECS = ("imagecodecs", "isal", "tifffile", "pillow")
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "huggingface-hub")


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, memory and installed models."""
    values = collect_values()
    lines = "\n".join(f"{name}: {value}" for name, value in values.items())
    emit_result(json.dumps({"schema": SCHEMA} | values, indent=2) if as_json else lines)


def collect_values() -> dict[str, Any]:
    """Return the value of each line, by name."""
    import psutil  # slow to import, not needed for --help

    memory = psutil.virtual_memory()
    return {
        "linfusion": __version__,
        **{name: find_version(name) or "not installed" for name in PACKAGES},
        "cuda": describe_cuda(),
        "cpus": cpu_count(),
        "memory": f"{format_bytes(memory.total)}, {format_bytes(memory.available)} free",
        "memory limit": format_bytes(memory_limit_bytes()),
        **{f"codec {name}": find_version(name) or "not installed" for name in CODECS},
        **{f"model {name}": describe_model(name) for name in settings.list_preset_names()},
    }


def describe_cuda() -> str:
    """Return the CUDA or ROCm devices with their memory or their error, or the reason for having none."""
    try:
        import torch

        with suppress_start_warnings():
            if torch.cuda.is_available():
                devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
                described = "; ".join(map(describe_device, devices))
                return f"{platform_name()}, {allocator.detect_segments()} segments: {described}"
            reason, hint = explain_no_gpu()
    except Exception as error:  # noqa: BLE001 - any error of torch or the driver is the result
        return f"none: torch failed ({first_line(error)})"
    return f"none: {reason}. {hint}".rstrip(". ")


def describe_device(device: torch.device) -> str:
    """Return the name and memory of a GPU, or its error."""
    import torch

    try:
        start_device(device)
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {format_bytes(properties.total_memory)}"
    except LinfusionError as error:
        return str(error).rstrip(".")


def describe_model(preset: str) -> str:
    """Return the model of a preset, and whether it is installed."""
    try:
        name = settings.read_preset_layer(preset).values.get("model")
    except LinfusionError as error:
        return str(error).rstrip(".")
    if name is None:
        return "no model in this preset"
    return f"{name}, {'installed' if is_local(name) else 'not installed'}"
