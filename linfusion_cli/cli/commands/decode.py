"""`linfusion decode`: decode saved latents to an image."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from linfusion_cli.cli.commands.run_command import PreparedRun, RunOptions, run_command
from linfusion_cli.cli.parsing import option_groups, options
from linfusion_cli.cli.parsing.build_request import parse_option
from linfusion_cli.core.events import Observer


@option_groups.collect_options(option_groups.decode_options)
def command(
    given: dict[str, Any],
    latents: options.Latents,
    report: options.Report = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
    time_limit: options.TimeLimit = None,
) -> None:
    """Decode saved latents to an image. Options that are not given keep the values of the run."""
    given |= {name: parse_option(name, given[name]) for name in ("vram", "ram") if given[name] is not None}
    prepare = partial(prepare_decode, latents, given)
    run_command(prepare, bool(given["download"]), RunOptions(report, as_json, quiet, log_file, time_limit))


def prepare_decode(latents: Path, given: dict[str, Any], observer: Observer) -> PreparedRun:
    """Build the request from the one stored with the latents; `given` options replace its settings."""
    from linfusion_cli.run.checkpoint.latents_file import open_latents  # numpy and more: not needed for --help
    from linfusion_cli.run.decode_latents import build_decode_request, decode

    saved_latents = open_latents(latents)
    return PreparedRun(*build_decode_request(saved_latents, given), partial(decode, saved_latents))
