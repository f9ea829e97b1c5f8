"""Where a fault comes: places spread over the whole life of a run, the same in every session."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import wraps
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")
AHEAD = 3  # how many moments are begun before the first of them is over


@dataclass(frozen=True)
class Moment:
    """Number `index` of `count`. What it draws depends on these and on nothing else."""

    index: int
    count: int
    seed: str = ""

    def __str__(self) -> str:
        return f"{self.index + 1}of{self.count}"

    @property
    def random(self) -> Random:
        return Random(f"{self.seed}moment {self.index} of {self.count}")

    @property
    def share(self) -> float:
        """0 to 1: a random place in the index-th of `count` equal parts."""
        return (self.index + self.random.random()) / self.count

    def dealt(self, choices: Sequence[T]) -> tuple[T, "Moment"]:
        """One of the choices, each in its turn, and which of the moments of this choice it is."""
        turn, choice = divmod(self.index, len(choices))
        return choices[choice], Moment(turn, -(-self.count // len(choices)), f"{self.seed}{choice}, ")

    def number(self, last: int) -> int:
        """1 to `last`: each of them, again and again, if there are as many moments; or some, spread evenly."""
        return 1 + (self.index % last if self.count >= last else (2 * self.index + 1) * last // (2 * self.count))


def side_by_side(test: Callable[..., None]) -> Callable[..., None]:
    """Decorates a test that takes a lab and a moment: while it waits for one, the next are under way."""
    begun: dict[Moment, Future[None]] = {}

    @wraps(test)
    def run(lab: Any, moment: Moment, **fixtures: Any) -> None:
        for index in range(moment.index, min(moment.index + AHEAD, moment.count)):
            soon = Moment(index, moment.count)
            if soon not in begun:
                begun[soon] = lab.pool.submit(test, lab=lab, moment=soon, **fixtures)
        begun[moment].result()

    return run
