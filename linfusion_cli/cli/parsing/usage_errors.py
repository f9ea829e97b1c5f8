"""Turn errors of the command-line parser into errors with a hint: the option that the user may have meant."""

from __future__ import annotations

import difflib
from typing import Any

from linfusion_cli.core.errors import UsageError
from linfusion_cli.settings.setting import Setting
from linfusion_cli.settings.sources.values import OTHER_NAMES, SIZE_NAMES, find_setting, normalize_key
from linfusion_cli.settings.table import ALL_SETTINGS


def translate_parser_error(error: Any) -> UsageError:
    """Return the UsageError for an exception of Typer."""
    option = getattr(error, "option_name", None)
    context = getattr(error, "ctx", None)
    if option is None or getattr(error, "possibilities", None) is None and "such option" not in str(error):
        message = error.format_message().rstrip(".")
        return UsageError(message if message.endswith("?") else f"{message}.", build_help_hint(context))
    return UsageError(f"There is no option {option}.", suggest_option(option, context) or build_help_hint(context))


def build_help_hint(context: Any) -> str:
    """Return the hint that names the help of the command."""
    return "" if context is None else f"See `{context.command_path} --help`."


def suggest_option(option: str, context: Any) -> str:
    """Return the hint for an unknown option: the name of this setting here, or the nearest option of the command."""
    name = normalize_key(option.lstrip("-"))
    if name in SIZE_NAMES:
        return "Use --size WIDTHxHEIGHT, e.g. --size 1024x768."
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    options = [] if context is None else [flag for one in context.command.get_params(context) for flag in one.opts]
    setting = find_setting(name, ALL_SETTINGS)
    if setting is not None:
        return f"Use {setting.flag}." if setting.flag in options else explain_missing(setting)
    nearest = difflib.get_close_matches(f"--{name.replace('_', '-')}", options, 1, cutoff=0.7) if len(name) > 1 else ()
    return f"Did you mean {nearest[0]}?" if nearest else ""


def explain_missing(setting: Setting) -> str:
    """Return the hint about a setting that the command does not have as an option."""
    commands = [command for command in setting.commands if command not in setting.argument_of]
    options = f"an option of {', '.join(commands)}" if commands else ""
    arguments = f"the argument of {', '.join(setting.argument_of)}" if setting.argument_of else ""
    return f"It is {' and '.join(filter(None, (options, arguments)))}."


def build_extra_argument_error(command: Any, given: dict[str, Any], extra: list[str]) -> UsageError:
    """Return the error for arguments that the command does not take: usually the words of a prompt without quotes."""
    reason = f"Unexpected argument{'s' if len(extra) > 1 else ''}: {' '.join(extra)}."
    prompt = given.get("prompt")
    if not prompt or not any(one.name == "prompt" and one.param_type_name == "argument" for one in command.params):
        return UsageError(reason, "Quote values that contain spaces.")
    return UsageError(reason, f'Quote the prompt: "{" ".join([prompt, *extra])}".')
