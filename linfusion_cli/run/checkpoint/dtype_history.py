"""The dtypes in which a run computed its steps, as a list of {phase, step, dtype}. Needs no torch.

An entry applies after `step` steps of `phase`, until the next entry. Checkpoints, metadata, reports and saved latents
hold this history, because --dtype can be auto and a run changes its dtype after NaN or Inf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linfusion_cli.checkpoint.store import Checkpoint
from linfusion_cli.run.checkpoint.known_keys import NON_FINITE_KEY
from linfusion_cli.run.inputs.provenance import DTYPES_KEY

if TYPE_CHECKING:
    from linfusion_cli.run.checkpoint.state import RunState

# From narrow to wide: each dtype has a larger range or a higher precision than the one before.
DTYPES_BY_WIDTH = ("float16", "bfloat16", "float32")


def add_dtype(history: Sequence[Mapping[str, Any]], state: RunState, dtype: str) -> list[dict[str, Any]]:
    """Return `history` with `dtype` for all steps after `state`."""
    used = drop_unused(history, state)
    return used if used and used[-1]["dtype"] == dtype else [*used, get_position(state) | {"dtype": dtype}]


def find_used_dtypes(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the history of an earlier run; if NaN or Inf ended it, without the dtype of the failed step."""
    from linfusion_cli.run.checkpoint.state import RunState

    history = checkpoint.metadata.get(DTYPES_KEY, [])
    if NON_FINITE_KEY in checkpoint.metadata:
        return drop_unused(history, RunState.from_state_dict(checkpoint.state))
    return list(history)


def drop_unused(history: Sequence[Mapping[str, Any]], state: RunState) -> list[dict[str, Any]]:
    """Return `history` without entries that apply only to steps after `state`, the last state of the run."""
    position = get_position(state)
    return [dict(entry) for entry in history if not position.items() <= entry.items()]


def get_position(state: RunState) -> dict[str, Any]:
    """Return the phase and the number of its steps that `state` has reached."""
    return {"phase": state.phase_state.phase, "step": state.steps}
