"""The program `linfusion`: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from linfusion_cli import __version__
from linfusion_cli.cli.commands import batch, decode, doctor, generate, info, models, plan, presets, upscale
from linfusion_cli.cli.output import log_file
from linfusion_cli.cli.output.crash_report import bug_sentence
from linfusion_cli.cli.output.render import announce, answer
from linfusion_cli.core import signals
from linfusion_cli.core.errors import EXIT_BUG, LinfusionError, Stopped
from linfusion_cli.hardware.cuda import quiet_start
from linfusion_cli.hardware.failures import explained

app = typer.Typer(
    name="linfusion",
    help="Ultra-high-resolution pictures, in bounded memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would eat every [bracket] of the help
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.command)
app.command("upscale")(upscale.command)
app.command("batch")(batch.command)
app.command("decode")(decode.command)
app.command("plan")(plan.command)
app.add_typer(presets.app, name="presets")
app.add_typer(models.app, name="models")
app.command("info")(info.command)
app.command("doctor")(doctor.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        answer(f"linfusion {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Ultra-high-resolution pictures, in bounded memory."""


def main() -> None:
    """Run the command line and exit with the code that errors.py promises."""
    have_streams()
    show_anything()
    signals.install_handlers()
    exit_code = guarded()
    signals.ignore_further_signals()
    sys.exit(exit_code)


def have_streams() -> None:
    """What a script closed leads nowhere: or a file of ours takes its number, and what libraries print there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in this order they get 0, 1 and 2
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def show_anything() -> None:
    """A prompt or name that a stream cannot show must not end a run; in UTF-8, names pass as the bytes they are."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape" if stream.encoding == "utf-8" else "backslashreplace")


def guarded() -> int:
    """Run the app; every error becomes one clear line on stderr and its exit code, and the log's last line tells it."""
    exit_code = carried_out()
    log_file.end(exit_code)
    return exit_code


def carried_out() -> int:
    """The exit code of the app, with every error said."""
    try:
        with signals.reraise_stop(), quiet_start():
            app()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except (LinfusionError, Stopped) as error:
        return refuse(str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001 - the boundary: whatever is left is a bug, and is logged as one
        known = explained(error)
        return refuse(bug_sentence(error), EXIT_BUG) if known is None else refuse(str(known), known.exit_code)
    return 0


def refuse(text: str, exit_code: int) -> int:
    announce(f"linfusion: {text}")
    return exit_code
