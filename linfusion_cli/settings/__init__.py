"""Settings: the table of all settings, requests, presets, and the order flag > environment > config file > preset."""

from linfusion_cli.settings.request import Request
from linfusion_cli.settings.sources.layers import (
    JOB,
    Layer,
    Settings,
    build_request,
    merge,
    raise_errors,
    read_config_layer,
    read_environment_layer,
    read_flag_layer,
    read_preset_layer,
)
from linfusion_cli.settings.sources.presets import Preset, find_preset_file, find_presets, list_preset_names
from linfusion_cli.settings.table import ALL_SETTINGS, SETTINGS, assemble_request

SDXL, DEMO = "sdxl", "demo"  # the default presets: SDXL if it is installed, else the embedded demo model

__all__ = [
    "ALL_SETTINGS",
    "DEMO",
    "JOB",
    "SDXL",
    "SETTINGS",
    "Layer",
    "Preset",
    "Request",
    "Settings",
    "assemble_request",
    "build_request",
    "find_preset_file",
    "find_presets",
    "list_preset_names",
    "merge",
    "raise_errors",
    "read_config_layer",
    "read_environment_layer",
    "read_flag_layer",
    "read_preset_layer",
]
