"""The keys of a checkpoint that this version knows. The store preserves all others, and the run does not see them."""

from __future__ import annotations

from linfusion_cli.checkpoint.extra_keys import KnownKeys
from linfusion_cli.run.checkpoint.dtype_history import NON_FINITE_KEY
from linfusion_cli.run.inputs.provenance import DTYPES_KEY

RUN_STATE_FIELDS = ("steps", "latents", "is_done", "scheduler_state", "noise_state")

METADATA_KEYS: KnownKeys = {
    **dict.fromkeys(("versions", "device", "dtype", "weights", "configs", "threads", "stages")),
    **dict.fromkeys((DTYPES_KEY, NON_FINITE_KEY)),
    "request": None,  # compared as a whole: a setting that only a later version knows can make another image
    "last_phase": dict.fromkeys(("phase", "size")),
}
STATE_KEYS: KnownKeys = {
    "phase_state": {"phase": None, "start_latents": None, "base_statistics": dict.fromkeys(("mean", "deviation"))},
    "run_state": dict.fromkeys(RUN_STATE_FIELDS),
}
KNOWN_KEYS: KnownKeys = {"metadata": METADATA_KEYS, "state": STATE_KEYS}
