"""What prompts say that would be commands elsewhere: refused, or told of. Needs no torch."""

from __future__ import annotations

from linfusion_cli.core.errors import UsageError
from linfusion_cli.models.text.prompt_syntax import commands_in, plain_brackets_in
from linfusion_cli.settings.request import ImageRequest, flag

MAX_NAMED = 4
LITERAL = (
    "Prompts are read literally, also what would be a weight, an option or a command elsewhere: {}. "
    "--strict-prompt refuses it."
)


def check_prompts(request: ImageRequest) -> None:
    """With --strict-prompt, raise UsageError for what other tools would not read as plain text, doubtful or not."""
    for setting in ("prompt", "negative_prompt") if request.strict_prompt else ():
        text = getattr(request, setting)
        if found := commands_in(text) + plain_brackets_in(text):
            reason = f"{flag(setting)} has {named(found)}, which would be read literally, not as a weight or command."
            raise UsageError(reason, "Leave it out, or use --no-strict-prompt.", setting)


def literal_notice(request: ImageRequest) -> str | None:
    """What to say of commands that are read literally; None where there are none."""
    found = commands_in(request.prompt) + commands_in(request.negative_prompt)
    return LITERAL.format(named(list(dict.fromkeys(found)))) if found else None


def named(found: list[str]) -> str:
    """The first of them, in quotes."""
    more = ["..."] if len(found) > MAX_NAMED else []
    return ", ".join([*map(repr, found[:MAX_NAMED]), *more])
