"""Never losing hours: what a run saves as it goes, and what it finds of an earlier one."""

from __future__ import annotations

import json
import textwrap
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from linfusion_cli import __version__
from linfusion_cli.checkpoint.store import SCHEMA, Checkpoint, CheckpointStore, DamagedCheckpoint
from linfusion_cli.core.atomic_file import resolve_target
from linfusion_cli.core.errors import (
    LinfusionError,
    NonFinite,
    OutOfMemory,
    Stopped,
    UsageError,
    WriteFailed,
    first_line,
)
from linfusion_cli.core.signals import critical_section, reraise_stop
from linfusion_cli.hardware.device import dtype_name, explained, free_memory, versions
from linfusion_cli.models.files.digest import WeightsFile, digested
from linfusion_cli.models.files.parts import PARTS
from linfusion_cli.run.checkpoint.dtype_history import NON_FINITE, add_dtype, find_used_dtypes
from linfusion_cli.run.inputs.provenance import DTYPES, name_weights
from linfusion_cli.settings.request import ImageRequest, flag

if TYPE_CHECKING:
    from linfusion_cli.planning.plan import Plan
    from linfusion_cli.run.checkpoint.state import RunState
    from linfusion_cli.run.inputs.resolve import ResolvedRequest

MAX_SHOWN = 60
CONFIGURED = ("scheduler", "tokenizer", "tokenizer_2")  # parts of a model that have no weights
CONFIG_SUFFIXES = (".json", ".txt", ".model")
MAX_SAVE_SHARE = 0.02  # of the time that saving may take: on a slow disk it is done more seldom
# Settings that decide neither a picture nor what is in its file.
NON_IDENTITY_FIELDS = {
    "output",
    "image",  # told by what is in it
    "overwrite",
    "preview",
    "download",
    "vram",
    "ram",
    "keep_latents",
    "checkpoint_every",
    "fresh",
}
# What may differ when a run goes on: those, and what changes the file and not the latents.
RESUME_COMPATIBLE_FIELDS = NON_IDENTITY_FIELDS | {
    "format",
    "compression",
    "bits",
    "dither",
    "dpi",
    "prompt_metadata",
    "strict_prompt",
}
ASIDE = "{} {}: it is now {}, and the run begins anew."
OTHER_VERSION = "was made by another version of linfusion ({})"
ELSEWHERE = "The run goes on with {}: its picture equals that of a run in one go up to rounding."
UNSAVED = "{} The run goes on, and tries again later."
REPAIRED = "{} changed since the model gave NaN or Inf: the run goes on with the new content."
OTHERWISE = ", also with another --dtype or repaired files of the same names"


@dataclass
class SaveStatistics:
    """How often the state was saved in this run, and what it cost."""

    count: int = 0
    seconds: float = 0.0
    bytes: int = 0


class CheckpointManager:
    """Saves how far a run has come: at borders, every so often between steps, and where the run is stopped.

    `found` is what an earlier run has left, `describe` says in words how far something has come.
    """

    def __init__(
        self,
        store: CheckpointStore,
        found: Checkpoint | None,
        request: ImageRequest,
        notice: Callable[[str], None] = lambda _: None,
    ):
        self.saves, self.head, self.found = SaveStatistics(), {}, found
        self.reached: RunState | None = None
        self.describe: Callable[[RunState], str] = str  # until the phases are known
        self._store, self._every_sec, self._notice = store, request.checkpoint_every, notice
        self._asked_dtype = request.dtype
        self._goes_on = ("without --fresh " if request.fresh else "") + "the same command goes on from there"
        self._saved: RunState | None = None
        self._saved_head: Mapping[str, Any] = {}
        self._saved_at, self._took_sec = time.monotonic(), 0.0

    @property
    def resumed_from(self) -> str | None:
        """In words, what this run goes on from; None where it begins."""
        return None if self.found is None else self.describe(self.initial_state())

    def initial_state(self) -> RunState:
        """What this run goes on from."""
        from linfusion_cli.run.checkpoint.state import RunState

        return RunState() if self.found is None else RunState.of(self.found.parts)

    @property
    def threads(self) -> int | None:
        """How many threads an earlier run computed with."""
        return None if self.found is None else self.found.head["threads"]

    @property
    def dtypes(self) -> list[dict[str, Any]]:
        """The history of this run and of those that it resumes; the list stays the same when it goes on."""
        return self.head[DTYPES]

    @property
    def least_dtype(self) -> str | None:
        """The dtype in which the run that this one goes on with has computed last, None where --dtype is another."""
        if self.found is None or self.found.head["request"]["dtype"] != self._asked_dtype:
            return None
        used = find_used_dtypes(self.found)
        return used[-1]["dtype"] if used else None

    @property
    def executed(self) -> list[dict[str, Any]]:
        """How the stages of an earlier run were run: kind, phase and mode of each."""
        return [] if self.found is None else self.found.head["stages"]

    @property
    def stages(self) -> list[dict[str, Any]]:
        """How the stages of this run are run, as `executed`."""
        return self.head["stages"]

    def begin(self, head: dict[str, Any]) -> None:
        """From now on `head` is saved with the state.

        Raises UsageError where files that are read are not those of the run that this one goes on with.
        """
        if self.found is not None:
            self._compare(self.found.head, head)
        self.head = head | {DTYPES: self._dtypes(head)}

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Say what differs; raises UsageError for files with other content, unless the model had given NaN or Inf."""
        changed = [name for kind in ("weights", "configs") for name in find_changed_files(before[kind], now[kind])]
        if changed and NON_FINITE not in before:
            raise request_differs(self._store, [f"{', '.join(changed)} with other content"])
        if changed:
            self._notice(REPAIRED.format(", ".join(changed)))
        for what in find_environment_changes({**before, DTYPES: find_used_dtypes(self.found)}, now):
            self._notice(ELSEWHERE.format(what))

    def _dtypes(self, head: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The dtypes of the run that this one goes on with, and its own, unless no step is left to it."""
        state, before = self.initial_state(), [] if self.found is None else find_used_dtypes(self.found)
        is_over = state.is_done and state.begun.phase == head["last"]["phase"]
        return list(before) if before and is_over else add_dtype(before, state, head["dtype"])

    def move(self, reached: RunState) -> None:
        """`reached` is where this run is, and lies somewhere else now."""
        if self.reached is not None:
            self.reached = reached

    def change_dtype(self, plan: Plan, reached: RunState) -> None:
        """After `reached` all goes on in the dtype of `plan`, and as it says; saved at once, if there is anything."""
        dtype = dtype_name(plan.machine.dtype)
        self.dtypes[:] = add_dtype(self.dtypes, reached, dtype)
        self.head = self.head | {"dtype": dtype, "stages": as_json(stages_json(plan))}
        if self.reached is not None or self.found is not None:
            self.save(reached)

    def record_strategy(self, kind: str, phase: int, mode: Any) -> None:
        """This stage runs in another way than was planned, from now on."""
        for stage in self.head["stages"]:
            if (stage["kind"], stage["phase"]) == (kind, phase):
                stage["mode"] = as_json(asdict(mode))

    def save(self, reached: RunState) -> None:
        """This is the state now, and worth saving at once."""
        self.reached = reached
        with critical_section():
            self._try()

    def step(self, reached: RunState) -> None:
        """This is the state now, which is saved if the last saving is long enough ago."""
        self.reached = reached
        least_sec = self._took_sec / MAX_SAVE_SHARE if self._every_sec else 0
        if time.monotonic() - self._saved_at >= max(self._every_sec, least_sec):
            self._try()

    @contextmanager
    def save_on_interrupt(self) -> Iterator[None]:
        """Save the state when a signal or an error leaves this block, and say so in its message.

        After NaN or Inf that is the last good state, with a mark that lets other dtypes and repaired files resume it.
        After a fault of the device, or a bug, it stays as it was saved last: what lies on the device may be unreadable.
        """
        try:
            with reraise_stop():
                yield
        except Stopped as stop:
            stop.kept = self._kept()
            raise
        except NonFinite as error:
            self.head = self.head | {NON_FINITE: str(error)}
            if self.reached is None and self.found is not None:
                self.reached = self.initial_state()  # to be saved again, with the mark
            error.hint = f"{error.hint} {self._kept(OTHERWISE)}".strip()
            raise
        except WriteFailed as error:
            error.hint = f"{error.hint} {self._kept()}".strip()
            raise
        except LinfusionError:
            raise
        except Exception as error:
            known = explained(error)
            if known is None:
                error.kept = self._kept(saves=False) if self._saved or self.found else ""
                raise
            has_run_out = isinstance(known, OutOfMemory)
            if has_run_out:
                self._make_room(error)
            known.hint = f"{known.hint} {self._kept(saves=has_run_out)}".strip()
            raise known from None

    def _make_room(self, error: Exception) -> None:
        """Free what was being computed when memory ran out: to read the state takes some too."""
        traceback.clear_frames(error.__traceback__)  # they hold on to it
        latents = None if self.reached is None else self.reached.latents
        with suppress(RuntimeError):  # of the device, which will say it again
            free_memory(None if latents is None else latents.device)

    def complete(self) -> None:
        """The file is there: the journal goes."""
        try:
            self._store.remove()
        except WriteFailed as error:
            self._notice(f"The picture is complete, but its journal stays: {error}")

    def _try(self) -> None:
        try:
            self._save()
        except WriteFailed as error:  # the picture may still come to be: only a stop would lose something
            self._notice(UNSAVED.format(error))

    def _save(self) -> None:
        if self.reached is None or (self.reached is self._saved and self.head is self._saved_head):
            return
        if not self.reached.is_finite:
            self.reached = self._saved
            raise NonFinite("The latents contain NaN or Inf after a step.", "Use another --scheduler, with --fresh.")
        began, bytes_before = time.monotonic(), self._store.saved_bytes
        self._saved_at = began  # also where it fails: it is not tried at every step
        self._store.save(self.head, self.reached.parts)
        self._saved, self._saved_head, self._took_sec = self.reached, self.head, time.monotonic() - began
        if self.found is not None:
            self.found = replace(self.found, parts={})  # which are of the past, and take memory
        self.saves.count += 1
        self.saves.seconds += self._took_sec
        self.saves.bytes += self._store.saved_bytes - bytes_before

    def _kept(self, also: str = "", saves: bool = True) -> str:
        """Save what would be lost, if it `saves` -> a sentence: what is saved, how it can be resumed, and `also`."""
        failed = ""
        try:
            if saves:
                self._save()
        except (WriteFailed, NonFinite) as error:
            failed = f"{error} "
        except (RuntimeError, MemoryError) as error:  # of the device: what is told of is another error
            failed = f"The last state could not be read ({first_line(error).rstrip('.')}). "
        if self._saved is not None:
            return f"{failed}Saved: {self.describe(self._saved)}; {self._goes_on}{also}."
        if self.found is not None:
            return f"{failed}What an earlier run has reached is still saved; {self._goes_on}."
        return f"{failed}Nothing was reached that could be saved."


def find_store(request: ImageRequest) -> CheckpointStore:
    """The journal beside the output, or beside what it links to."""
    return CheckpointStore(resolve_target(request.output))


@contextmanager
def open_manager(request: ImageRequest, notice: Callable[[str], None]) -> Iterator[CheckpointManager]:
    """The keeper of a run, with what an earlier one has left; no other run has this output meanwhile.

    Raises UsageError where that was of another request, TryAgain. What cannot be used is set aside.
    """
    with find_store(request).held() as store:
        if request.fresh:
            store.remove()
        yield CheckpointManager(store, load_checkpoint(store, request, notice), request, notice)


def load_checkpoint(store: CheckpointStore, request: ImageRequest, notice: Callable[[str], None]) -> Checkpoint | None:
    """What is in the journal, if it can be gone on from."""
    try:
        entry = store.read()
    except DamagedCheckpoint as damage:
        notice(ASIDE.format(store.folder, f"is damaged ({damage})", store.quarantine()))
        return None
    if entry is not None and (entry.head.get("schema"), entry.head.get("linfusion")) != (SCHEMA, __version__):
        reason = OTHER_VERSION.format(entry.head.get("linfusion"))
        notice(ASIDE.format(store.folder, reason, store.quarantine()))
        return None
    from linfusion_cli.run.checkpoint.state import RunState

    if entry is not None and not RunState.of(entry.parts).is_finite:
        notice(ASIDE.format(store.folder, "holds latents with NaN or Inf", store.quarantine()))
        return None
    if entry is not None and (changed := find_request_changes(entry, request)):
        raise request_differs(store, changed)
    return entry


def find_request_changes(entry: Checkpoint, request: ImageRequest) -> list[str]:
    """The settings of `request` that differ from a journal's `entry` and prevent a resume, each in words.

    After NaN or Inf the dtype may differ.
    """
    allowed = RESUME_COMPATIBLE_FIELDS | ({"dtype"} if NON_FINITE in entry.head else set())
    return find_changes(entry.head["request"], as_json(request.to_json()), allowed)


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """The settings that have changed, each in words, without those that are `allowed` to change."""
    names = [name for name in {**now, **before} if name not in allowed and before.get(name) != now.get(name)]
    return [f"{flag(name)} {format_value(now.get(name))} instead of {format_value(before.get(name))}" for name in names]


def format_value(value: Any) -> str:
    """A setting's value in few characters."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return repr(textwrap.shorten(text, MAX_SHOWN, placeholder=" …")) if isinstance(value, str) else text[:MAX_SHOWN]


def find_changed_files(before: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of the files that are read now and were not before, or the other way round, or are other files."""
    return sorted(
        {file["file"] for files, others in ((before, now), (now, before)) for file in files if file not in others}
    )


def find_environment_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What of machine, versions and plan is not as it was, in words."""
    for name, version in now["versions"].items():
        if before["versions"].get(name) != version:
            yield f"{name} {version} instead of {before['versions'].get(name)}"
    if before["device"] != now["device"]:
        yield f"{now['device']} instead of {before['device']}"
    if before[DTYPES] and before[DTYPES][-1]["dtype"] != now["dtype"]:
        yield f"{now['dtype']} instead of {before[DTYPES][-1]['dtype']}"
    if before["stages"] != now["stages"]:
        yield "another plan, as the executed one does not fit here"


def request_differs(store: CheckpointStore, names: Sequence[str]) -> UsageError:
    reason = f"{store.folder} holds a run that began otherwise: now {'; '.join(names)}."
    return UsageError(reason, "Give it what it had, add --fresh to begin anew, or name another file with -o.")


def build_metadata(resolved: ResolvedRequest, weights: Sequence[WeightsFile], plan: Plan) -> dict[str, Any]:
    """What a journal says of the run: the request, what it reads, and the plan that is executed."""
    import torch

    return as_json(
        {
            "schema": SCHEMA,
            "linfusion": __version__,
            "versions": versions(),
            "device": str(plan.machine.device),
            "dtype": dtype_name(plan.machine.dtype),
            "request": resolved.request.to_json(),
            "weights": name_weights(weights),
            "configs": hash_configs(resolved),
            "last": {"phase": plan.stages[-1].phase, "size": str(plan.stages[-1].size)},
            "threads": torch.get_num_threads(),
            "stages": stages_json(plan),
        }
    )


def hash_configs(resolved: ResolvedRequest) -> list[dict[str, str]]:
    """The model's configs and tokenizers, as metadata have weights: they decide as much."""
    folders = [*(resolved.model.folder / name for name in (*PARTS, *CONFIGURED)), resolved.vae.folder]
    paths = [path for folder in dict.fromkeys(folders) if folder.is_dir() for path in sorted(folder.iterdir())]
    texts = [(f"{path.parent.name}/{path.name}", path) for path in paths if path.suffix in CONFIG_SUFFIXES]
    return [{"file": file.use, "sha256": file.sha256} for file in digested(texts)]


def stages_json(plan: Plan) -> list[dict[str, Any]]:
    """How each stage is run, on which kind of device."""
    where = {"device": plan.machine.device.type}
    return [{"kind": stage.kind, "phase": stage.phase, **where, "mode": asdict(stage.mode)} for stage in plan.stages]


def as_json(values: Any) -> Any:
    """As it will be when it is read back."""
    return json.loads(json.dumps(values))
