"""The program `linfusion`: its commands, and the conversion of errors to messages and exit codes."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from linfusion_cli import __version__
from linfusion_cli.cli.commands import batch, decode, doctor, generate, info, models, plan, presets, schema, upscale
from linfusion_cli.cli.output.crash_report import report_crash
from linfusion_cli.cli.output.log_file import close_log
from linfusion_cli.cli.output.streams import emit_result, log
from linfusion_cli.cli.parsing.completion import select_matches
from linfusion_cli.cli.parsing.help import HelpCommand, HelpGroup
from linfusion_cli.cli.parsing.usage_errors import translate_parser_error
from linfusion_cli.core import signals
from linfusion_cli.core.errors import EXIT_BUG, LinfusionError, Stopped, UsageError
from linfusion_cli.hardware.cuda import suppress_start_warnings
from linfusion_cli.hardware.torch_errors import translate_error

EXAMPLES = """
linfusion generate "a lake at dawn" --size 2048
linfusion plan --preset sdxl --size 16384 --device cuda --vram 24GiB
linfusion models pull sdxl
linfusion help generate
"""
SETTINGS = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="linfusion",
    cls=HelpGroup,
    epilog=EXAMPLES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would interpret [brackets] in help texts as markup
    context_settings=SETTINGS,
)
for module in (generate, upscale, batch, decode, plan):
    name = module.__name__.rpartition(".")[2]
    app.command(name, cls=HelpCommand, epilog=module.EXAMPLES, context_settings=SETTINGS)(module.command)
app.add_typer(presets.app, name="presets", cls=HelpGroup, context_settings=SETTINGS)
app.add_typer(models.app, name="models", cls=HelpGroup, context_settings=SETTINGS)
app.command("info", cls=HelpCommand, epilog=info.EXAMPLES)(info.command)
app.command("schema", cls=HelpCommand, epilog=schema.EXAMPLES)(schema.command)
app.command("doctor", cls=HelpCommand)(doctor.command)


@app.command("help", cls=HelpCommand)
def show_help(
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            help="A command, e.g. generate or models pull.",
            autocompletion=lambda incomplete: complete_command(incomplete),
        ),
    ] = None,
) -> None:
    """Show the help of a command."""
    emit_result(find_help(context, command or []))


def complete_command(incomplete: str) -> list[str]:
    """Return the commands that start with the text."""
    names = [command.name or "" for command in app.registered_commands]
    return select_matches([*names, *(group.name or "" for group in app.registered_groups)], incomplete)


def find_help(context: typer.Context, names: list[str]) -> str:
    """Return the help of the command with these names; raise UsageError if there is none."""
    current: Any = context.parent
    for name in names:
        found = getattr(current.command, "commands", {}).get(name)
        if found is None:
            raise UsageError(f"There is no command {' '.join(names)!r}.", "See `linfusion help`.")
        current = type(current)(found, info_name=name, parent=current)
    return current.get_help().rstrip("\n")


def _show_version(requested: bool) -> None:
    if requested:
        emit_result(f"linfusion {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Generate ultra-high-resolution images in bounded memory."""


def main() -> None:
    """Run the program and exit with a code of core.errors."""
    open_missing_streams()
    accept_any_characters()
    signals.install_handlers()
    exit_code = run_app()
    signals.ignore_further_signals()
    sys.exit(exit_code)


def open_missing_streams() -> None:
    """Open /dev/null for standard streams that are closed.

    Otherwise the next file that is opened gets the descriptor, and the output of libraries is written to that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in this order they get 0, 1 and 2
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def accept_any_characters() -> None:
    """Make stdout and stderr accept text that they cannot encode; UTF-8 streams write undecodable names unchanged."""
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)  # true until something replaces the interpreter's streams
        stream.reconfigure(errors="surrogateescape" if stream.encoding == "utf-8" else "backslashreplace")


def run_app() -> int:
    """Run the app, close the log file, and return the exit code."""
    exit_code = run_app_without_log()
    close_log(exit_code)
    return exit_code


def run_app_without_log() -> int:
    """Run the app and return the exit code; each error is reported as one line on stderr and in the log."""
    try:
        with signals.reraise_stop(), suppress_start_warnings():
            exit_code = app(prog_name="linfusion", standalone_mode=False)
            return exit_code if isinstance(exit_code, int) else 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except TyperException as error:
        error = translate_parser_error(error)
        return report_error(str(error), error.exit_code)
    except (LinfusionError, Stopped) as error:
        return report_error(str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001 - any other exception is a bug and gets a crash report
        known = translate_error(error)
        if known is None:
            return report_error(report_crash(error), EXIT_BUG)
        return report_error(str(known), known.exit_code)


def report_error(text: str, exit_code: int) -> int:
    """Log the message of an error and return `exit_code`."""
    log(f"linfusion: {text}")
    return exit_code
