"""Save the progress of a run, and resume an earlier run of the same request."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from linfusion_cli import __version__
from linfusion_cli.checkpoint.store import Checkpoint, CheckpointStore, DamagedCheckpoint
from linfusion_cli.core.atomic_file import resolve_target
from linfusion_cli.core.errors import (
    LinfusionError,
    NonFinite,
    OutOfMemory,
    Stopped,
    TimeLimitReached,
    WriteFailed,
    first_line,
)
from linfusion_cli.core.events import StageKey
from linfusion_cli.core.signals import critical_section, reraise_stop
from linfusion_cli.hardware.device import dtype_name
from linfusion_cli.hardware.peak import release_memory
from linfusion_cli.hardware.torch_errors import translate_error
from linfusion_cli.run.checkpoint.compatibility import (
    build_mismatch_error,
    find_changed_files,
    find_environment_changes,
    find_request_changes,
    stages_to_json,
    to_json_values,
)
from linfusion_cli.run.checkpoint.dtype_history import add_dtype, find_used_dtypes
from linfusion_cli.run.checkpoint.known_keys import KNOWN_KEYS, NON_FINITE_KEY
from linfusion_cli.run.inputs.provenance import DTYPES_KEY
from linfusion_cli.settings.request import Request

if TYPE_CHECKING:
    from linfusion_cli.planning.plan import Plan
    from linfusion_cli.planning.strategies import Strategy
    from linfusion_cli.run.checkpoint.state import RunState

MAX_SAVE_SHARE = 0.02  # of the run time that saving can take: on a slow disk, saves become less frequent
QUARANTINED = "The checkpoint {} {}: moved to {}; the run starts over."
VERSION_CHANGED = "Resuming the checkpoint of linfusion {} with linfusion {}: both compute the same latents."
ENVIRONMENT_CHANGED = "Resuming with {}: the image equals that of an uninterrupted run except for rounding."
SAVE_FAILED = "{} The run continues, and saving is tried again later."
FILES_CHANGED = "{} changed after the model gave NaN or Inf: the run resumes with the new content."
ALSO_WITH_CHANGES = ", also with another --dtype or repaired files of the same names"


@dataclass
class SaveStatistics:
    """Number of saves in this run, their total duration, and the bytes of tensors written."""

    count: int = 0
    seconds: float = 0.0
    bytes: int = 0


class CheckpointManager:
    """Save the state of a run: at phase boundaries, at intervals between steps, and when the run is interrupted.

    previous: the checkpoint of an earlier run to resume; None if the run starts from the beginning.
    describe_state: turn a state into words for messages. It is set when the phases are known.
    last_state: the latest state of this run; None before the first.
    metadata: the values saved with each state, see `build_metadata`. It is set by `start`.
    """

    def __init__(
        self,
        store: CheckpointStore,
        previous: Checkpoint | None,
        request: Request,
        notify: Callable[[str], None] = lambda _: None,
    ):
        self.statistics, self.previous = SaveStatistics(), previous
        self.metadata: dict[str, Any] = {}
        self.last_state: RunState | None = None
        self.describe_state: Callable[[RunState], str] = str
        self._store, self._interval_sec, self._notify = store, request.execution.checkpoint_every, notify
        self._requested_dtype = request.dtype
        self._resume_hint = "the same command without --fresh" if request.execution.fresh else "the same command"
        self._saved_state: RunState | None = None
        self._saved_metadata: Mapping[str, Any] = {}
        self._save_started, self._save_sec = time.monotonic(), 0.0  # of the last save

    @property
    def resumed_from(self) -> str | None:
        """A description of the state that this run resumes; None if it starts from the beginning."""
        return None if self.previous is None else self.describe_state(self.initial_state())

    def initial_state(self) -> RunState:
        """Return the state that this run starts from."""
        from linfusion_cli.run.checkpoint.state import RunState

        return RunState() if self.previous is None else RunState.from_state_dict(self.previous.state)

    @property
    def threads(self) -> int | None:
        """The number of CPU threads of the earlier run."""
        return None if self.previous is None else self.previous.metadata["threads"]

    @property
    def dtypes(self) -> list[dict[str, Any]]:
        """The dtype history of this run and the runs that it resumes. `change_dtype` updates this list in place."""
        return self.metadata[DTYPES_KEY]

    @property
    def min_dtype(self) -> str | None:
        """The last dtype of the earlier run; None if this run has another --dtype."""
        if self.previous is None or self.previous.metadata["request"]["dtype"] != self._requested_dtype:
            return None
        used = find_used_dtypes(self.previous)
        return used[-1]["dtype"] if used else None

    @property
    def previous_stages(self) -> list[dict[str, Any]]:
        """The strategies of the earlier run: kind, phase, device and strategy of each stage."""
        return [] if self.previous is None else self.previous.metadata["stages"]

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The strategies of this run, in the same format as `previous_stages`."""
        return self.metadata["stages"]

    def start(self, metadata: dict[str, Any]) -> None:
        """Set the metadata to save with each state. Call this once, before the first save.

        Notifies about another version of linfusion, and about changes that affect the image by rounding only. Raises
        UsageError if weights or configs differ from those of the earlier run, unless NaN or Inf ended that run.
        """
        if self.previous is not None:
            self._check_files(self.previous, metadata)
            if self.previous.linfusion != __version__:
                self._notify(VERSION_CHANGED.format(self.previous.linfusion, __version__))
            before = {**self.previous.metadata, DTYPES_KEY: find_used_dtypes(self.previous)}
            for change in find_environment_changes(before, metadata):
                self._notify(ENVIRONMENT_CHANGED.format(change))
        self.metadata = metadata | {DTYPES_KEY: self._build_dtype_history(metadata)}

    def _check_files(self, previous: Checkpoint, metadata: Mapping[str, Any]) -> None:
        before = previous.metadata
        changed = [name for key in ("weights", "configs") for name in find_changed_files(before[key], metadata[key])]
        if changed and NON_FINITE_KEY not in before:
            raise build_mismatch_error(self._store, [f"{', '.join(changed)} with other content"])
        if changed:
            self._notify(FILES_CHANGED.format(", ".join(changed)))

    def _build_dtype_history(self, metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the history of the earlier run, with this run's dtype added if any steps remain."""
        state, history = self.initial_state(), [] if self.previous is None else find_used_dtypes(self.previous)
        is_finished = state.is_done and state.phase_state.phase == metadata["last_phase"]["phase"]
        return list(history) if history and is_finished else add_dtype(history, state, metadata["dtype"])

    def replace_state(self, state: RunState) -> None:
        """Replace the latest state by the same state on another device, to free the memory of the first one.

        Does nothing before the first state of this run.
        """
        if self.last_state is not None:
            self.last_state = state

    def change_dtype(self, plan: Plan, state: RunState) -> None:
        """Record that the steps after `state` use the dtype and the strategies of `plan`.

        Saves immediately if this run or the earlier one has a state.
        """
        dtype = dtype_name(plan.machine.dtype)
        self.dtypes[:] = add_dtype(self.dtypes, state, dtype)
        self.metadata = self.metadata | {"dtype": dtype, "stages": to_json_values(stages_to_json(plan))}
        if self.last_state is not None or self.previous is not None:
            self.save(state)

    def record_strategy(self, key: StageKey, strategy: Strategy) -> None:
        """Record that a stage uses `strategy` from now on instead of the planned one; the next save stores it."""
        from linfusion_cli.planning.strategies import strategy_to_json

        for stage in self.metadata["stages"]:
            if (stage["kind"], stage["phase"]) == key:
                stage["strategy"] = to_json_values(strategy_to_json(strategy))

    def save(self, state: RunState) -> None:
        """Save `state` immediately, delaying signals until it is written.

        A failed write is only a notice. Raises NonFinite if the latents contain NaN or Inf.
        """
        self.last_state = state
        with critical_section():
            self._try_to_save()

    def maybe_save(self, state: RunState) -> None:
        """Save `state` if the interval since the last save is over; keep it in memory for the next save otherwise.

        The interval is --checkpoint-every, or longer if saving would take more than MAX_SAVE_SHARE of the time; 0 saves
        every state. A failed write is only a notice. Raises NonFinite if the latents to save contain NaN or Inf.
        """
        self.last_state = state
        min_interval_sec = self._save_sec / MAX_SAVE_SHARE if self._interval_sec else 0
        if time.monotonic() - self._save_started >= max(self._interval_sec, min_interval_sec):
            self._try_to_save()

    @contextmanager
    def save_on_interrupt(self) -> Iterator[None]:
        """Save the latest state when a signal or an error leaves this block, and describe the save in the message.

        After NaN or Inf, save the last finite state, marked as resumable with another dtype or repaired files.
        After a device fault or a bug, keep the last save: the memory of the device may be unreadable.
        """
        try:
            with reraise_stop():
                yield
        except Stopped as stop:
            stop.saved_state = self._save_and_describe()
            if isinstance(stop, TimeLimitReached):
                stop.has_progress = self.last_state is not None
            raise
        except NonFinite as error:
            self.metadata = self.metadata | {NON_FINITE_KEY: str(error)}
            if self.last_state is None and self.previous is not None:
                self.last_state = self.initial_state()  # save it again, with the mark
            error.hint = f"{error.hint} {self._save_and_describe(ALSO_WITH_CHANGES)}".strip()
            raise
        except WriteFailed as error:
            error.hint = f"{error.hint} {self._save_and_describe()}".strip()
            raise
        except LinfusionError:
            raise
        except Exception as error:
            known = translate_error(error)
            if known is None:
                saved = self._describe_saved() if self._saved_state or self.previous else ""
                error.saved_state = saved  # pyright: ignore[reportAttributeAccessIssue]  # for the crash report
                raise
            if isinstance(known, OutOfMemory):
                self._free_computation_memory(error)
                saved = self._save_and_describe()
            else:
                saved = self._describe_saved()
            known.hint = f"{known.hint} {saved}".strip()
            raise known from None

    def _free_computation_memory(self, error: Exception) -> None:
        """Free the tensors of the computation that ran out of memory: reading the state needs memory too."""
        traceback.clear_frames(error.__traceback__)  # they hold references to the tensors
        latents = None if self.last_state is None else self.last_state.latents
        with suppress(RuntimeError):  # a device error, which reading the state raises again
            release_memory(None if latents is None else latents.device)

    def finish(self) -> None:
        """Delete the checkpoint after the output files are complete. A failure is only a notice."""
        try:
            self._store.remove()
        except WriteFailed as error:
            self._notify(f"The image is complete, but its checkpoint could not be removed: {error}")

    def _try_to_save(self) -> None:
        try:
            self._save()
        except WriteFailed as error:  # the run can still succeed: only an interruption would lose progress
            self._notify(SAVE_FAILED.format(error))

    def _save(self) -> None:
        state = self.last_state
        if state is None or (state is self._saved_state and self.metadata is self._saved_metadata):
            return
        if not state.is_finite:
            self.last_state = self._saved_state
            raise NonFinite("The latents contain NaN or Inf after a step.", "Use another --scheduler, with --fresh.")
        started, bytes_before = time.monotonic(), self._store.saved_bytes
        self._save_started = started  # also if the save fails: otherwise every step would try again
        self._store.save(self.metadata, state.state_dict())
        self._saved_state, self._saved_metadata, self._save_sec = state, self.metadata, time.monotonic() - started
        if self.previous is not None:
            self.previous = replace(self.previous, state={})  # no longer needed: free its memory
        self.statistics.count += 1
        self.statistics.seconds += self._save_sec
        self.statistics.bytes += self._store.saved_bytes - bytes_before

    def _save_and_describe(self, also: str = "") -> str:
        """Save the latest state and describe it; if saving fails, describe the failure and the last save."""
        failure = ""
        try:
            self._save()
        except (WriteFailed, NonFinite) as error:
            failure = f"{error} "
        except (RuntimeError, MemoryError) as error:  # of the device: the caller reports another error
            failure = f"The last state could not be read ({first_line(error).rstrip('.')}). "
        return failure + self._describe_saved(also)

    def _describe_saved(self, also: str = "") -> str:
        """Return a sentence on the last save and the command that resumes it; `also` extends the command."""
        if self._saved_state is not None:
            return f"Saved: {self.describe_state(self._saved_state)}; {self._resume_hint} resumes it{also}."
        if self.previous is not None:
            return f"The state of an earlier run is still saved; {self._resume_hint} resumes it."
        return "No progress was saved."


def find_store(request: Request) -> CheckpointStore:
    """Return the checkpoint next to the output; if the output is a link, next to its target."""
    return CheckpointStore(resolve_target(request.execution.output), known=KNOWN_KEYS)


@contextmanager
def open_manager(request: Request, notify: Callable[[str], None]) -> Iterator[CheckpointManager]:
    """Lock the checkpoint and return its manager, with the checkpoint of an earlier run if it can be resumed.

    With --fresh, delete that checkpoint. Raises UsageError if it belongs to another request or is incompatible,
    TemporaryFailure if another run holds the lock.
    """
    with find_store(request).lock() as store:
        if request.execution.fresh:
            store.remove()
        yield CheckpointManager(store, load_checkpoint(store, request, notify), request, notify)


def load_checkpoint(store: CheckpointStore, request: Request, notify: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint to resume; None without one. A damaged one is quarantined with a notice.

    Raises UsageError if it belongs to another request, or has another schema or numerics.
    """
    try:
        checkpoint = store.read()
    except DamagedCheckpoint as damage:
        notify(QUARANTINED.format(store.folder, f"is damaged ({damage})", store.quarantine()))
        return None
    if checkpoint is None:
        return None
    from linfusion_cli.run.checkpoint.state import RunState

    if not RunState.from_state_dict(checkpoint.state).is_finite:
        notify(QUARANTINED.format(store.folder, "contains NaN or Inf", store.quarantine()))
        return None
    if changes := find_request_changes(checkpoint, request):
        raise build_mismatch_error(store, changes)
    return checkpoint
