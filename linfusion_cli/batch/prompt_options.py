"""Warn about prompts of a job list that contain options of other tools, such as `--steps`. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from linfusion_cli.batch.parsers.job_spec import JobSpec
from linfusion_cli.core.text import MAX_QUOTED, truncate
from linfusion_cli.models.text.prompt_syntax import find_option

OPTIONS = (
    "{name}: {count} options of other tools, first {word!r} in line {line}; they are read literally, not as settings. "
    'Put settings into JSONL fields, such as {{"prompt": "a hill", "steps": 20}}.'
)


@dataclass
class PromptOptionCounter:
    """Count the jobs of a list with words like `--steps` in their prompts, and keep the first line and word."""

    jobs: int = 0
    line: int = 0
    word: str = ""

    def count(self, specs: Iterable[JobSpec]) -> Iterator[JobSpec]:
        """Yield the same jobs while counting."""
        for spec in specs:
            texts = (spec.values.get(setting, "") for setting in ("prompt", "negative_prompt"))
            if word := next(filter(None, map(find_option, texts)), None):
                if not self.jobs:
                    self.line, self.word = spec.line, word
                self.jobs += 1
            yield spec

    def build_notice(self, name: str) -> str | None:
        """Return the warning for the list `name`; None if no prompt has such words."""
        if not self.jobs:
            return None
        count = "1 prompt has" if self.jobs == 1 else f"{self.jobs} prompts have"
        return OPTIONS.format(name=name, count=count, word=truncate(self.word, MAX_QUOTED), line=self.line)
