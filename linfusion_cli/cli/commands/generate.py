"""`linfusion generate`: generate an image from a prompt."""

from __future__ import annotations

from typing import Any

from linfusion_cli.cli.commands.run_command import RunOptions, run_request
from linfusion_cli.cli.parsing import option_groups, options
from linfusion_cli.settings.request import GenerateRequest


@option_groups.collect_options(option_groups.generate_options, *option_groups.REQUEST_GROUPS)
def command(
    given: dict[str, Any],
    report: options.Report = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
    time_limit: options.TimeLimit = None,
) -> None:
    """Generate an image from a prompt and write it to a file."""
    from linfusion_cli.run.pipeline import generate  # numpy and more: slow to import, not needed for --help

    run_request(given, GenerateRequest, generate, RunOptions(report, as_json, quiet, log_file, time_limit))
