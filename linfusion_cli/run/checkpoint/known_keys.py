"""The keys of a checkpoint that this version knows. The store preserves all others, and the run does not see them.

A key that decides the latents must not be added without a higher SCHEMA or NUMERICS: earlier versions ignore it.
"""

from __future__ import annotations

import dataclasses

from linfusion_cli.checkpoint.extra_keys import Items, KnownKeys
from linfusion_cli.run.inputs.provenance import DTYPES_KEY
from linfusion_cli.settings.groups import ImageSource, Lora, TextualInversion
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.request_json import SCHEMA_KEY
from linfusion_cli.settings.table import GROUPS

NON_FINITE_KEY = "non_finite"  # in the metadata: the message of the NaN or Inf that ended the run
RUN_STATE_FIELDS = ("steps", "latents", "is_done", "scheduler_state", "noise_state")
LISTS = {"lora": Lora, "textual_inversion": TextualInversion, **GROUPS}  # of dataclasses, in a request


def list_fields(table: type) -> dict[str, None]:
    """Return the fields of a dataclass as known keys."""
    return dict.fromkeys(field.name for field in dataclasses.fields(table) if field.name != "execution")


REQUEST_KEYS: KnownKeys = {
    SCHEMA_KEY: None,
    **list_fields(Request),
    **{name: Items(list_fields(item)) for name, item in LISTS.items()},
    "source": list_fields(ImageSource),
}
# All fields of the strategies of `planning`, which imports torch.
STRATEGY_KEYS: KnownKeys = {
    **dict.fromkeys(("kind", "attention", "place", "batched", "start", "patches", "keys", "height")),
    "strips": dict.fromkeys(("rows", "tokens")),
}
FILES = Items(dict.fromkeys(("file", "sha256")), ("file",))

METADATA_KEYS: KnownKeys = {
    **dict.fromkeys(("versions", "device", "dtype", "threads", NON_FINITE_KEY)),
    "request": REQUEST_KEYS,
    "weights": FILES,
    "configs": FILES,
    "last_phase": dict.fromkeys(("phase", "size")),
    "stages": Items({**dict.fromkeys(("kind", "phase", "device")), "strategy": STRATEGY_KEYS}, ("kind", "phase")),
    DTYPES_KEY: Items(dict.fromkeys(("phase", "step", "dtype")), ("phase", "step")),
}
STATE_KEYS: dict[str, KnownKeys] = {
    "phase_state": {"phase": None, "start_latents": None, "base_statistics": dict.fromkeys(("mean", "deviation"))},
    "run_state": dict.fromkeys(RUN_STATE_FIELDS),
}
KNOWN_KEYS = METADATA_KEYS, STATE_KEYS
