"""The moments of faults: spread over the whole duration of a run, and the same in every session."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import wraps
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")
MAX_PARALLEL = 3  # moments that run at once


@dataclass(frozen=True)
class Moment:
    """Moment `index` of `count`; its random values depend only on these."""

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
        """A random number from the index-th of `count` equal parts of 0 to 1."""
        return (self.index + self.random.random()) / self.count

    def pick(self, choices: Sequence[T]) -> tuple[T, "Moment"]:
        """Return one of the choices, which alternate, and the moment among those with the same choice."""
        round_index, choice = divmod(self.index, len(choices))
        return choices[choice], Moment(round_index, -(-self.count // len(choices)), f"{self.seed}{choice}, ")

    def pick_number(self, last: int) -> int:
        """Return a number from 1 to `last`: each in turn if there are enough moments, else numbers spread evenly."""
        return 1 + (self.index % last if self.count >= last else (2 * self.index + 1) * last // (2 * self.count))


def run_in_parallel(test: Callable[..., None]) -> Callable[..., None]:
    """Decorate a test that takes a lab and a moment: the next moments run while it waits for the first."""
    started: dict[Moment, Future[None]] = {}

    @wraps(test)
    def run(lab: Any, moment: Moment, **fixtures: Any) -> None:
        for index in range(moment.index, min(moment.index + MAX_PARALLEL, moment.count)):
            upcoming = Moment(index, moment.count)
            if upcoming not in started:
                started[upcoming] = lab.pool.submit(test, lab=lab, moment=upcoming, **fixtures)
        started[moment].result()

    return run
