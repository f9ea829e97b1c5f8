"""Settings and requests: fields, presets, and the order flag > environment > config file > preset > default."""

from linfusion_cli.settings.fields import PARSERS
from linfusion_cli.settings.layers import (
    JOB,
    Layer,
    Settings,
    build_request,
    config_layer,
    environment_layer,
    flag_layer,
    merge,
    preset_layer,
)
from linfusion_cli.settings.presets import Preset, find_presets, preset_names, preset_path

SDXL, DEMO = "sdxl", "demo"  # the default presets: SDXL if it is installed, else the embedded demo model

__all__ = [
    "DEMO",
    "JOB",
    "PARSERS",
    "SDXL",
    "Layer",
    "Preset",
    "Settings",
    "build_request",
    "config_layer",
    "environment_layer",
    "find_presets",
    "flag_layer",
    "merge",
    "preset_layer",
    "preset_names",
    "preset_path",
]
