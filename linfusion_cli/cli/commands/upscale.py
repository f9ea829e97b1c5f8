"""`linfusion upscale`: a picture and options -> request, run, report."""

from __future__ import annotations

from functools import partial
from typing import Any

from linfusion_cli.cli.commands.generate import asked, run
from linfusion_cli.cli.parsing import options
from linfusion_cli.settings.request import UpscaleRequest


@options.takes_a_request(options.of_upscale)
def command(
    given: dict[str, Any],
    report: options.Report = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
    time_limit: options.TimeLimit = None,
) -> None:
    """Grow a picture that you have, and write the larger one to a file."""
    from linfusion_cli.run.pipeline import upscale  # numpy and more: not for --help to wait for

    run(partial(asked, given, UpscaleRequest, upscale), given, report, as_json, quiet, log_file, time_limit)
