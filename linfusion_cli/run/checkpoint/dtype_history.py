"""The history of a run's number formats: {phase, step, dtype} holds after so many steps of the phase, until the next.

It stands in journals, metadata, reports and kept latents: the dtype of the request may be auto, and a run may change
its own after NaN or Inf. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linfusion_cli.checkpoint.store import Checkpoint
from linfusion_cli.run.inputs.provenance import DTYPES

if TYPE_CHECKING:
    from linfusion_cli.run.checkpoint.state import RunState

WIDTHS = ("float16", "bfloat16", "float32")  # each takes numbers at which the one before overflows, or rounds less
NON_FINITE = "non_finite"  # in a journal's head: the message of the NaN or Inf that ended the run


def add_dtype(before: Sequence[Mapping[str, Any]], reached: RunState, dtype: str) -> list[dict[str, Any]]:
    """The history `before`, and that all steps after `reached` have this `dtype`."""
    used = drop_later(before, reached)
    return used if used and used[-1]["dtype"] == dtype else [*used, place_of(reached) | {"dtype": dtype}]


def find_used_dtypes(entry: Checkpoint) -> list[dict[str, Any]]:
    """The history of an earlier run, without the dtypes of a step that gave NaN or Inf in them and so ended it."""
    from linfusion_cli.run.checkpoint.state import RunState

    found = entry.head.get(DTYPES, [])
    return drop_later(found, RunState.of(entry.parts)) if NON_FINITE in entry.head else list(found)


def drop_later(history: Sequence[Mapping[str, Any]], reached: RunState) -> list[dict[str, Any]]:
    """`history` without what holds only after `reached`, the last step there is."""
    place = place_of(reached)
    return [dict(entry) for entry in history if not place.items() <= entry.items()]


def place_of(reached: RunState) -> dict[str, Any]:
    return {"phase": reached.begun.phase, "step": reached.steps}
