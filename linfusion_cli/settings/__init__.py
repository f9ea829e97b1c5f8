"""Settings from everywhere -> a request: flag > environment (LINFUSION_*) > user config file > preset > default.

This is the only place where settings are merged. A preset is a TOML file of request fields and nothing else.
"""

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
from linfusion_cli.settings.presets import preset_names, preset_path

SDXL, DEMO = "sdxl", "demo"  # what runs when no preset is named: the first if it is here, else the second

__all__ = [
    "DEMO",
    "JOB",
    "PARSERS",
    "SDXL",
    "Layer",
    "Settings",
    "build_request",
    "config_layer",
    "environment_layer",
    "flag_layer",
    "merge",
    "preset_layer",
    "preset_names",
    "preset_path",
]
