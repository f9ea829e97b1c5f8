"""What prompts say that would be commands elsewhere: refused, or told of. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from linfusion_cli.batch.parsers.parsers import Entry
from linfusion_cli.batch.parsers.schema import MOST_QUOTED, cut
from linfusion_cli.core.errors import UsageError
from linfusion_cli.models.text.prompt_syntax import commands_in, option_in, plain_brackets_in
from linfusion_cli.settings.request import PictureRequest, flag

MOST_NAMED = 4
LITERAL = (
    "Prompts are read literally, also what would be a weight, an option or a command elsewhere: {}. "
    "--strict-prompt refuses it."
)
OPTIONS = (
    "{name}: {count} options of other tools, first {word!r} in line {line}; they are read literally, not as settings. "
    'Put settings into JSONL fields, such as {{"prompt": "a hill", "steps": 20}}.'
)


def check_prompts(request: PictureRequest) -> None:
    """With --strict-prompt, raise UsageError for what other tools would not read as plain text, doubtful or not."""
    for setting in ("prompt", "negative_prompt") if request.strict_prompt else ():
        text = getattr(request, setting)
        if found := commands_in(text) + plain_brackets_in(text):
            reason = f"{flag(setting)} has {named(found)}, which would be read literally, not as a weight or command."
            raise UsageError(reason, "Leave it out, or use --no-strict-prompt.", setting)


def literal_notice(request: PictureRequest) -> str | None:
    """What to say of commands that are read literally; None where there are none."""
    found = commands_in(request.prompt) + commands_in(request.negative_prompt)
    return LITERAL.format(named(list(dict.fromkeys(found)))) if found else None


@dataclass
class OptionsInList:
    """Counts the jobs of a list whose prompts contain words like `--steps`, and keeps the first line and word."""

    jobs: int = 0
    line: int = 0
    word: str = ""

    def count(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield the same entries, counting on the way."""
        for entry in entries:
            texts = (entry.values.get(setting, "") for setting in ("prompt", "negative_prompt"))
            if word := next(filter(None, map(option_in, texts)), None):
                if not self.jobs:
                    self.line, self.word = entry.line, word
                self.jobs += 1
            yield entry

    def notice(self, name: str) -> str | None:
        """The warning for the list called `name`; None if there is nothing to warn about."""
        if not self.jobs:
            return None
        count = "1 prompt has" if self.jobs == 1 else f"{self.jobs} prompts have"
        return OPTIONS.format(name=name, count=count, word=cut(self.word, MOST_QUOTED), line=self.line)


def named(found: list[str]) -> str:
    """The first of them, in quotes."""
    more = ["..."] if len(found) > MOST_NAMED else []
    return ", ".join([*map(repr, found[:MOST_NAMED]), *more])
