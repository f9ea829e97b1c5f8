"""Settings and requests: fields, presets, and the order flag > environment > config file > preset > default."""

from linfusion_cli.settings.fields import PARSERS
from linfusion_cli.settings.layers import (
    JOB,
    Layer,
    Settings,
    build_flag_layer,
    build_request,
    merge,
    read_config_layer,
    read_environment_layer,
    read_preset_layer,
)
from linfusion_cli.settings.presets import Preset, find_preset_file, find_presets, list_preset_names

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
    "read_config_layer",
    "read_environment_layer",
    "find_presets",
    "build_flag_layer",
    "merge",
    "read_preset_layer",
    "list_preset_names",
    "find_preset_file",
]
