"""Options of commands that are not part of a request: the preset, reports, logs and the time limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.settings.setting import ALL_COMMANDS, RUNS, setting


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """The options of a run that are not part of its request."""

    preset: str | None = setting(
        None,
        help="A name from `linfusion presets list`, or a .toml file.",
        panel="Most used",
        rank=3,
        metavar="PRESET",
        default_text="sdxl if installed, else demo",
        commands=RUNS,
        sources=("flag", "environment", "config", "job"),
        completion="presets",
    )
    time_limit: str | None = setting(
        None,
        help="Stop after 50m, 1h30m or 90s, save a checkpoint, and exit with 75. The same command resumes the run.",
        panel="Most used",
        rank=12,
        metavar="TIME",
        commands=("generate", "upscale", "batch", "decode"),
        sources=("flag",),
    )
    gpu: str | None = setting(
        None,
        help="Plan for this GPU, by its data sheet, instead of a GPU of this machine: rtx4090, rtx3060, a100, h100, …",
        panel="Memory and device",
        metavar="GPU",
        default_text="the GPU of this machine",
        completion="gpus",
        commands=("plan",),
        sources=("flag",),
    )
    report: Path | None = setting(
        None,
        help="Write the report to this file, as JSON.",
        panel="Running and scripting",
        metavar="FILE",
        commands=("generate", "upscale", "decode"),
        sources=("flag",),
        completion="files",
    )
    json: bool = setting(
        False,
        help="Print JSON to stdout: the report of a run, the plan, or the summary of a batch.",
        panel="Running and scripting",
        commands=ALL_COMMANDS,
        sources=("flag",),
    )
    quiet: bool = setting(
        False,
        help="Show no progress and no table, only warnings and errors.",
        panel="Running and scripting",
        short="-q",
        commands=("generate", "upscale", "batch", "decode"),
        sources=("flag",),
    )
    log_file: Path | None = setting(
        None,
        help="Append all messages to this file, with timestamps. Several runs can share it, and it can be rotated.",
        panel="Running and scripting",
        metavar="FILE",
        commands=("generate", "upscale", "batch", "decode"),
        sources=("flag",),
        completion="files",
    )
