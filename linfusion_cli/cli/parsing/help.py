"""Print the help of the commands as plain text: panels of options, laid out for the width of the terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import typer.core

from linfusion_cli.cli.parsing.usage_errors import build_extra_argument_error
from linfusion_cli.settings.setting import PANELS

MAX_COLUMNS, MIN_COLUMNS = 100, 30
TWO_COLUMNS_FROM = 70  # below, the text of an option is on the lines after it
NAME_COLUMNS = 28
OTHER_PANEL = "Options"


class HelpCommand(typer.core.TyperCommand):
    """A command whose help shows its options by panel, and its examples."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; raise UsageError for more than the command takes."""
        ctx.allow_extra_args = True
        extra = super().parse_args(ctx, args)
        if extra and not ctx.resilient_parsing:
            raise build_extra_argument_error(self, ctx.params, extra)
        return extra

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        formatter.write(format_command_help(self, ctx))


class HelpGroup(typer.core.TyperGroup):
    """A group of commands whose help lists them, and which prints it without a command."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        formatter.write(format_command_help(self, ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Print the help and exit with 0 if there is no command."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit
        return super().parse_args(ctx, args)


def format_command_help(command: Any, ctx: Any) -> str:
    """Return the help of a command or a group: usage, description, arguments, options by panel, and examples."""
    columns = choose_columns()
    sections = [
        wrap_usage(f"Usage: {ctx.command_path} {format_usage(command, ctx)}", columns),
        *[textwrap.fill(paragraph, columns) for paragraph in list_paragraphs(command.help or "")],
    ]
    if isinstance(command, typer.core.TyperGroup):
        rows = [(name, one.get_short_help_str(limit=200)) for name, one in command.commands.items() if not one.hidden]
        sections.append(format_section("Commands", rows, columns))
    sections += [format_section(title, rows, columns) for title, rows in list_panels(command, ctx)]
    if command.epilog:
        sections.append(f"{style_heading('Examples')}\n{textwrap.indent(command.epilog.strip(), '  ')}")
    return "\n\n".join(sections) + "\n"


def format_usage(command: Any, ctx: Any) -> str:
    """Return what follows the name of the command: "[OPTIONS] [PROMPT]"."""
    if isinstance(command, typer.core.TyperGroup):
        return "[OPTIONS] COMMAND ..."
    arguments = [parameter for parameter in command.get_params(ctx) if parameter.param_type_name == "argument"]
    names = [name_value(one) + (" ..." if one.nargs == -1 else "") for one in arguments]
    pairs = zip(names, arguments, strict=True)
    return " ".join(["[OPTIONS]", *(name if one.required else f"[{name}]" for name, one in pairs)])


def choose_columns() -> int:
    """Return the width of the help: that of the terminal, within limits."""
    return max(MIN_COLUMNS, min(MAX_COLUMNS, shutil.get_terminal_size().columns))


def list_paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a docstring, each as one line."""
    for paragraph in textwrap.dedent(text).strip().split("\n\n"):
        if paragraph.strip():
            yield " ".join(paragraph.split())


def list_panels(command: Any, ctx: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the title and the options of each panel, with names and help: arguments, then the panels in their order."""
    records: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        if parameter.param_type_name == "argument":
            records.setdefault("Arguments", []).append((name_value(parameter), parameter.help or ""))
        elif not parameter.hidden:
            panel = getattr(parameter, "rich_help_panel", None) or OTHER_PANEL
            text = f"{parameter.help or ''}{' [required]' if parameter.required else ''}"
            records.setdefault(panel, []).append((format_names(parameter), text))
    own = [title for title in records if title not in (OTHER_PANEL, *PANELS)]  # of this command
    for title in (*own, *PANELS, OTHER_PANEL):
        if title in records:
            yield title, records[title]


def name_value(parameter: Any) -> str:
    """Return the placeholder of an argument or of an option's value."""
    return parameter.metavar or parameter.name.upper()


def format_names(parameter: Any) -> str:
    """Return the spellings of an option and its placeholder: "-o, --output FILE"."""
    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.secondary_opts:
        names += f" / {', '.join(parameter.secondary_opts)}"
    return names if parameter.is_flag else f"{names} {name_value(parameter)}"


def format_section(title: str, rows: Iterable[tuple[str, str]], columns: int) -> str:
    """Return a heading and the rows below it."""
    return "\n".join([style_heading(title), *(format_row(name, text, columns) for name, text in rows)])


def format_row(name: str, text: str, columns: int) -> str:
    """Return the name and its text: beside it if there is room, otherwise on the next lines."""
    if columns < TWO_COLUMNS_FROM:
        body = textwrap.fill(text, columns, initial_indent=" " * 6, subsequent_indent=" " * 6)
        return f"{wrap_name(name, columns)}\n{body}" if text else wrap_name(name, columns)
    indent = " " * (NAME_COLUMNS + 2)
    body = textwrap.fill(text, columns, initial_indent=indent, subsequent_indent=indent)
    if len(name) + 2 < NAME_COLUMNS:
        return f"  {name:{NAME_COLUMNS}}{body[len(indent) :]}".rstrip()
    return f"{wrap_name(name, columns)}\n{body}" if text else wrap_name(name, columns)


def wrap_name(name: str, columns: int) -> str:
    """Return the names of an option, wrapped if they are wider than the terminal."""
    return textwrap.fill(name, columns, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def wrap_usage(text: str, columns: int) -> str:
    """Return the usage, wrapped."""
    return textwrap.fill(text, columns, subsequent_indent="  ", break_on_hyphens=False)


def style_heading(title: str) -> str:
    """Return the heading of a section, in bold on a terminal unless NO_COLOR or a dumb terminal forbid it."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb" or not sys.stdout.isatty()
    return f"{title}:" if plain else f"\x1b[1m{title}:\x1b[0m"
