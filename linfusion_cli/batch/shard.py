"""How a list of jobs is multiplied by seeds and divided among machines."""

from __future__ import annotations

import re
from dataclasses import dataclass

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.text import quote
from linfusion_cli.settings.request import MAX_SEED

MAX_SEEDS = 10_000


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds that "1-20" or "1,5,9-12" mean, each once; raises UsageError."""
    found: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})\s*(?:-\s*(\d{1,19})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_SEED:
            raise UsageError(f"--seeds {quote(text)} is not possible.", "Write 1-20, or 1,5,9-12.", "seeds")
        if last - first >= MAX_SEEDS or len(found) + last - first >= MAX_SEEDS:
            raise UsageError(f"--seeds {quote(text)} are more than {MAX_SEEDS} seeds.", "Use several runs.", "seeds")
        found |= dict.fromkeys(range(first, last + 1))
    return tuple(found)


@dataclass(frozen=True)
class Shard:
    """The part `number` of `count` of a list, counted from 1: every job is in exactly one."""

    number: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str) -> Shard:
        """What "2/8" means; raises UsageError."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text, re.ASCII)
        number, count = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= count:
            raise UsageError(f"--shard {quote(text)} is not possible.", "Write 1/8 to 8/8.", "shard")
        return Shard(number, count)

    def has(self, place: int) -> bool:
        """Whether the job at this place, counted from 0, is in it: machines take turns."""
        return place % self.count == self.number - 1

    @property
    def record(self) -> str:
        """The name of the file that tells what came of its jobs: machines do not write the same one."""
        return "results.jsonl" if self.count == 1 else f"results-{self.number}-of-{self.count}.jsonl"
