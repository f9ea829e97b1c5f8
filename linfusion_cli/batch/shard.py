"""Divide the jobs of a list among machines."""

from __future__ import annotations

import re
from dataclasses import dataclass

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.text import quote


@dataclass(frozen=True)
class Shard:
    """Shard `number` of `count`, counted from 1: every job is in exactly one shard."""

    number: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str) -> Shard:
        """Return the shard of "2/8"; raise UsageError."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text, re.ASCII)
        number, count = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= count:
            raise UsageError(f"--shard {quote(text)} is invalid.", "Use 1/8 to 8/8, for example.", "shard")
        return Shard(number, count)

    def contains(self, index: int) -> bool:
        """Return True if the shard contains the job at `index`, counted from 0: shards alternate."""
        return index % self.count == self.number - 1

    @property
    def results_name(self) -> str:
        """The name of the results file, which differs between shards because machines cannot share one."""
        return "results.jsonl" if self.count == 1 else f"results-{self.number}-of-{self.count}.jsonl"
