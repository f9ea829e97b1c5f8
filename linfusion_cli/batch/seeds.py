"""Parse the seeds of --seeds."""

from __future__ import annotations

import re

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.text import quote
from linfusion_cli.settings.request import MAX_SEED

MAX_SEEDS = 10_000


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of "1-20" or "1,5,9-12" without duplicates; raise UsageError."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})\s*(?:-\s*(\d{1,19})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_SEED:
            raise UsageError(f"--seeds {quote(text)} is invalid.", "Use 1-20, or 1,5,9-12.", "seeds")
        if last - first >= MAX_SEEDS or len(seeds) + last - first >= MAX_SEEDS:
            reason = f"--seeds {quote(text)} has too many seeds; the limit is {MAX_SEEDS}."
            raise UsageError(reason, "Use several runs.", "seeds")
        seeds |= dict.fromkeys(range(first, last + 1))
    return tuple(seeds)
