"""Which saved runs a request can resume: the metadata of a checkpoint, and their comparison with the current run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linfusion_cli.checkpoint.store import Checkpoint, CheckpointStore
from linfusion_cli.core.errors import UsageError
from linfusion_cli.hardware.device import dtype_name
from linfusion_cli.hardware.versions import collect_versions
from linfusion_cli.models.files.digest import WeightsFile, hash_files
from linfusion_cli.models.files.layout import PARTS
from linfusion_cli.run.checkpoint.known_keys import NON_FINITE_KEY
from linfusion_cli.run.inputs.provenance import DTYPES_KEY, weights_to_metadata
from linfusion_cli.settings.checks import flag
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.request_json import request_to_json, values_from_json
from linfusion_cli.settings.table import SETTINGS

if TYPE_CHECKING:
    from linfusion_cli.planning.plan import Plan
    from linfusion_cli.run.inputs.resolve import ResolvedRequest

MAX_VALUE_CHARS = 60
PARTS_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2")
CONFIG_SUFFIXES = (".json", ".txt", ".model")


def build_metadata(resolved: ResolvedRequest, weights: Sequence[WeightsFile], plan: Plan) -> dict[str, Any]:
    """Return the metadata of a checkpoint: the request, the files that the run reads, and its plan."""
    import torch

    last = plan.stages[-1]
    return to_json_values(
        {
            "versions": collect_versions(),
            "device": str(plan.machine.device),
            "dtype": dtype_name(plan.machine.dtype),
            "request": request_to_json(resolved.request),
            "weights": weights_to_metadata(weights),
            "configs": hash_configs(resolved),
            "last_phase": {"phase": last.phase, "size": str(last.size)},
            "threads": torch.get_num_threads(),
            "stages": stages_to_json(plan),
        }
    )


def hash_configs(resolved: ResolvedRequest) -> list[dict[str, str]]:
    """Return name and SHA-256 of the model's configs and tokenizers, which affect the image like weights do."""
    folders = [*(resolved.model.folder / name for name in (*PARTS, *PARTS_WITHOUT_WEIGHTS)), resolved.vae.folder]
    paths = [path for folder in dict.fromkeys(folders) if folder.is_dir() for path in sorted(folder.iterdir())]
    configs = [(f"{path.parent.name}/{path.name}", path) for path in paths if path.suffix in CONFIG_SUFFIXES]
    return [{"file": file.use, "sha256": file.sha256} for file in hash_files(configs)]


def stages_to_json(plan: Plan) -> list[dict[str, Any]]:
    """Return the strategy of each stage and the type of device that it was chosen for."""
    from linfusion_cli.planning.strategies import recorded_to_json

    return recorded_to_json(plan.strategies, plan.machine.device.type)


def to_json_values(value: Any) -> Any:
    """Return `value` as JSON would restore it: tuples become lists, for example."""
    return json.loads(json.dumps(value))


def find_request_changes(checkpoint: Checkpoint, request: Request) -> list[str]:
    """Describe the settings of `request` that differ from those of `checkpoint` and prevent resuming.

    The dtype can differ if NaN or Inf ended the earlier run. Unknown settings are ignored.
    """
    allowed = {"dtype"} if NON_FINITE_KEY in checkpoint.metadata else set()
    now = values_from_json(to_json_values(request_to_json(request)))
    try:
        before = values_from_json(checkpoint.metadata["request"])
    except (ValueError, UsageError) as error:  # a value or schema of a later version
        return [f"settings of this version instead of unknown ones ({error})"]
    return find_changes(before, now, allowed)


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """Describe the settings that differ and decide the latents, except for those in `allowed`."""
    deciding = [name for name, setting in SETTINGS.items() if setting.decides == "latents" and name not in allowed]
    names = [name for name in deciding if before.get(name) != now.get(name)]
    return [f"{flag(name)} {format_value(now.get(name))} instead of {format_value(before.get(name))}" for name in names]


def format_value(value: Any) -> str:
    """Return the value of a setting in at most MAX_VALUE_CHARS characters."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if isinstance(value, str):
        return repr(textwrap.shorten(text, MAX_VALUE_CHARS, placeholder=" …"))
    return text[:MAX_VALUE_CHARS]


def find_changed_files(before: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the names of the files that were added, removed, or have another SHA-256."""
    pairs_before, pairs_now = ({(file["file"], file["sha256"]) for file in files} for files in (before, now))
    return sorted({name for name, _ in pairs_before ^ pairs_now})


def find_environment_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Describe changes of libraries, device, dtype and plan, which can change the image by rounding."""
    for name, version in now["versions"].items():
        if name != "linfusion" and before["versions"].get(name) != version:
            yield f"{name} {version} instead of {before['versions'].get(name)}"
    if before["device"] != now["device"]:
        yield f"{now['device']} instead of {before['device']}"
    if before[DTYPES_KEY] and before[DTYPES_KEY][-1]["dtype"] != now["dtype"]:
        yield f"{now['dtype']} instead of {before[DTYPES_KEY][-1]['dtype']}"
    if have_strategies_changed(before["stages"], now["stages"]):
        yield "another plan, because the earlier one cannot be executed here"


def have_strategies_changed(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if a stage has another strategy or device than before. Unknown keys and stages do not matter."""
    from linfusion_cli.planning.strategies import recorded_from_json

    recorded = recorded_from_json(before)
    return any(recorded.get(key) != strategy for key, strategy in recorded_from_json(now).items())


def build_mismatch_error(store: CheckpointStore, changes: Sequence[str]) -> UsageError:
    """Return the error for a checkpoint that the current run cannot resume because of `changes`."""
    reason = f"{store.folder} holds the checkpoint of another run: now {'; '.join(changes)}."
    hint = "Use its settings and files to resume it, add --fresh to start over, or choose another file with -o."
    return UsageError(reason, hint)
