"""Warn about prompts of a job list that contain options of other tools, such as `--steps`. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from linfusion_cli.batch.parsers.parsers import JobSpec
from linfusion_cli.core.text import MAX_QUOTED, truncate
from linfusion_cli.models.text.prompt_syntax import option_in

OPTIONS = (
    "{name}: {count} options of other tools, first {word!r} in line {line}; they are read literally, not as settings. "
    'Put settings into JSONL fields, such as {{"prompt": "a hill", "steps": 20}}.'
)


@dataclass
class OptionsInList:
    """Counts the jobs of a list whose prompts contain words like `--steps`, and keeps the first line and word."""

    jobs: int = 0
    line: int = 0
    word: str = ""

    def count(self, entries: Iterable[JobSpec]) -> Iterator[JobSpec]:
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
        return OPTIONS.format(name=name, count=count, word=truncate(self.word, MAX_QUOTED), line=self.line)
