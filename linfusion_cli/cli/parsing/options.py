"""Generate the options of the commands from the table of settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from linfusion_cli.cli.parsing import completion
from linfusion_cli.settings.setting import Command, Setting
from linfusion_cli.settings.table import select_options

MAX_CHOICES_CHARS = 32  # of the choices as a placeholder; more are listed in the help text
GIVEN = "given"  # the parameter of a command that receives its settings


def add_settings(command: Command) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the settings of `command` to a function, which gets them as the dict `given`.

    Values are the text of the options, or lists of it; None for those that are not given.
    """
    settings = select_options(command)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [parameter for name, parameter in inspect.signature(function).parameters.items() if name != GIVEN]
        own = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
        parameters = [build_parameter(setting, command) for setting in settings]

        def with_settings(**arguments: Any) -> None:
            given = {setting.name: arguments.pop(setting.name) for setting in settings}
            function(given, **arguments)

        keyword = inspect.Parameter.KEYWORD_ONLY  # allows parameters without a default after those with one
        signature = inspect.Signature([parameter.replace(kind=keyword) for parameter in [*own, *parameters]])
        with_settings.__doc__ = function.__doc__
        with_settings.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]  # Typer reads it
        with_settings.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
        return with_settings

    return decorate


def build_parameter(setting: Setting, command: Command) -> inspect.Parameter:
    """Return the option or argument of a setting, which is text until the settings are parsed."""
    text = bool if setting.is_switch else list[str] if setting.repeated else str
    facts: dict[str, Any] = {
        "help": build_help(setting, command),
        "metavar": build_metavar(setting),
        "show_default": False,
        "autocompletion": completion.find_completer(setting),
    }
    if command in setting.argument_of:
        facts["metavar"] = setting.name.upper()
        is_optional = setting.default_text is not None
        annotation = Annotated[(text | None) if is_optional else text, typer.Argument(**facts)]
        default = None if is_optional else inspect.Parameter.empty
    else:
        if setting.is_switch:
            facts.pop("metavar")
        annotation = Annotated[text | None, typer.Option(*list_flags(setting), rich_help_panel=setting.panel, **facts)]
        default = None
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def list_flags(setting: Setting) -> list[str]:
    """Return the spellings of an option; a switch that files can set has a negative form."""
    flags = [setting.flag]
    if setting.is_switch and len(setting.sources) > 1:
        flags = [f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"]
    return [*([setting.short] if setting.short else []), *flags]


def build_metavar(setting: Setting) -> str:
    """Return the placeholder of the value: the choices if they are short, else the name of what is expected."""
    choices = "|".join(map(str, setting.choices))
    if choices and len(choices) <= MAX_CHOICES_CHARS and not setting.per_phase:
        return choices
    name = setting.name.rpartition("_")[2].upper()
    return setting.metavar or (name if setting.choices or setting.names_file else setting.kind.metavar)


def build_help(setting: Setting, command: Command) -> str:
    """Return the help text with the choices that are not in the placeholder, and the default value.

    The defaults of `decode` are the values of the run that made the latents.
    """
    text = setting.help
    if setting.choices and build_metavar(setting).count("|") == 0 and not setting.per_phase:
        text = f"{text.removesuffix('.')}: {', '.join(map(str, setting.choices))}."
    default = "" if command == "decode" else describe_default(setting)
    return f"{text} [default: {default}]" if default else text


def describe_default(setting: Setting) -> str:
    """Return the default value in words; nothing if it is none, or off."""
    if setting.default_text is not None:
        return setting.default_text
    if setting.is_required or setting.default in (None, ()) or setting.default is False:
        return ""
    if setting.default is True:
        return "yes"
    if isinstance(setting.default, tuple):
        return ",".join(map(_format_number, setting.default))
    return _format_number(setting.default)


def _format_number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
