"""Where a fault comes: places spread over the whole life of a run, the same in every session."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Moment:
    """Number `index` of `count`. What it draws depends on these and on nothing else."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index + 1}of{self.count}"

    @property
    def random(self) -> Random:
        return Random(f"moment {self.index} of {self.count}")

    @property
    def share(self) -> float:
        """0 to 1: a random place in the index-th of `count` equal parts."""
        return (self.index + self.random.random()) / self.count

    def one_of(self, choices: Sequence[T]) -> T:
        """Each in its turn."""
        return choices[self.index % len(choices)]

    def number(self, last: int) -> int:
        """1 to `last`, each of them met if there are as many moments."""
        return 1 + self.index * last // self.count if self.count < last else 1 + self.index % last
