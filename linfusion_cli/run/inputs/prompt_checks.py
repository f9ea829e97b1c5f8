"""Detect prompt syntax of other tools, which is rejected or reported. Needs no torch."""

from __future__ import annotations

from linfusion_cli.core.errors import UsageError
from linfusion_cli.models.text.prompt_syntax import find_commands, find_plain_brackets
from linfusion_cli.settings.checks import flag
from linfusion_cli.settings.request import Request

MAX_QUOTED_COMMANDS = 4
LITERAL = (
    "Prompts are read literally, including weights, options and commands of other tools: {}. --strict-prompt "
    "rejects such prompts."
)


def check_prompts(request: Request) -> None:
    """With --strict-prompt, raise UsageError for text that other tools interpret, including ambiguous brackets."""
    for setting in ("prompt", "negative_prompt") if request.execution.strict_prompt else ():
        text = getattr(request, setting)
        if commands := find_commands(text) + find_plain_brackets(text):
            reason = f"{flag(setting)} contains {quote_commands(commands)}, which would be read literally."
            raise UsageError(reason, "Remove it, or use --no-strict-prompt.", setting)


def build_literal_notice(request: Request) -> str | None:
    """Return a notice about commands of other tools in the prompts; None for plain text."""
    commands = find_commands(request.prompt) + find_commands(request.negative_prompt)
    return LITERAL.format(quote_commands(list(dict.fromkeys(commands)))) if commands else None


def quote_commands(commands: list[str]) -> str:
    """Return the first commands in quotes, separated by commas."""
    more = ["..."] if len(commands) > MAX_QUOTED_COMMANDS else []
    return ", ".join([*map(repr, commands[:MAX_QUOTED_COMMANDS]), *more])
