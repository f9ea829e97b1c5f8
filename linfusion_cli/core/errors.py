"""The errors that a user can cause or fix, and the exit codes of the program.

    LinfusionError
    ├── UsageError                    2   a flag, a size or a value is invalid
    ├── DataError                    65   a model, weights file or input image is corrupt, unsafe or of the wrong type
    │   └── NonFinite                65   a network returns NaN or Inf
    │       └── WiderDtypeDoesNotFit 71   …and a wider dtype needs more memory than the budget
    ├── InputNotFound                66   an input file does not exist
    ├── Unavailable                  69   the model or the device is not available on this machine
    │   ├── NotInstalled             69   a model or file of the hub is not on this machine
    │   └── DeviceFailed             69   the device is unusable or was lost
    ├── OutOfMemoryBudget            71   not enough memory, even with the smallest strips
    │   └── OutOfMemory              71   an allocation failed during the run
    ├── CannotCreateOutput           73   the output exists, or its folder does not accept new files
    ├── WriteFailed                  74   the disk is full or failed
    ├── TemporaryFailure             75   another run is writing this output, or the time limit is reached
    └── ConfigError                  78   a preset or config file is invalid

    Stopped                     128 + N   by SIGHUP (129), SIGINT (130), SIGUSR1 (138), SIGUSR2 (140) or SIGTERM (143):
    │                                     a BaseException, not an error
    └── TimeLimitReached             75   by --time-limit

Any other exception that reaches the command line is a bug in linfusion and exits with 70. The codes follow sysexits.h.
`message` is one sentence that states the problem and the value; `hint` says how to fix it.
"""

import signal

EXIT_BUG = 70


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class if the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class LinfusionError(Exception):
    """Base class of all errors that a user can cause or fix."""

    exit_code = EXIT_BUG

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(LinfusionError):
    """A flag, a size or a value is invalid.

    `setting` is the field of the request, if there is one: its value can come from a config file or a preset, too.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "", setting: str | None = None):
        super().__init__(message, hint)
        self.setting = setting


class DataError(LinfusionError):
    """A model, weights file or input image is corrupt, unsafe or of the wrong type."""

    exit_code = 65


class NonFinite(DataError):
    """A network returns NaN or Inf.

    The last finite state is saved; a run with another dtype or repaired weights can resume it.
    """


class InputNotFound(LinfusionError):
    """An input file does not exist."""

    exit_code = 66


class Unavailable(LinfusionError):
    """The model or the device is not available on this machine."""

    exit_code = 69


class NotInstalled(Unavailable):
    """A model or file of the hub is not on this machine, and was not to be downloaded."""


class DeviceFailed(Unavailable):
    """The GPU is unusable, or was lost during a run: its memory is no longer readable."""


class OutOfMemoryBudget(LinfusionError):
    """The memory budget is too small, even with the smallest strips."""

    exit_code = 71


class OutOfMemory(OutOfMemoryBudget):
    """An allocation failed during the run although the plan fits: another program may have taken the memory."""


class WiderDtypeDoesNotFit(NonFinite):
    """A network returns NaN or Inf in half precision, and a wider dtype needs more memory than the budget.

    The last finite state is saved: the same command with more memory resumes it.
    """

    exit_code = OutOfMemoryBudget.exit_code


class CannotCreateOutput(LinfusionError):
    """The output exists, or its folder does not accept new files."""

    exit_code = 73


class WriteFailed(LinfusionError):
    """Writing failed: the disk is full or faulty."""

    exit_code = 74


class TemporaryFailure(LinfusionError):
    """A condition that a later attempt may not meet, such as another run writing the same output."""

    exit_code = 75


class ConfigError(LinfusionError):
    """A preset or config file is invalid."""

    exit_code = 78


class Stopped(BaseException):
    """A signal stops this run; the exit code is 128 + the number of the signal.

    A BaseException like KeyboardInterrupt: large libraries catch Exception while they import modules, and would
    continue. `saved_state` is a sentence about the part of the run that is saved.
    """

    saved_state = "No unfinished file is left."

    def __init__(self, signal_number: int):
        self.reason = f"Stopped by {signal.Signals(signal_number).name}"
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return f"{self.reason}. {self.saved_state}"


class TimeLimitReached(Stopped):
    """The time limit of the run, `limit_sec`, is reached.

    has_progress: True if the same command continues from a later state than this run did. Otherwise repeating it is
    useless: `shortfall` says what the run needs, and the exit code is that of a usage error.
    """

    has_progress = False
    shortfall = ""

    def __init__(self, limit_sec: float):
        self.reason = "Stopped by --time-limit"
        self.limit_sec = limit_sec

    @property
    def exit_code(self) -> int:
        """75, or 2 if the time limit is too short for any progress."""
        return UsageError.exit_code if self.shortfall else TemporaryFailure.exit_code

    def __str__(self) -> str:
        return self.shortfall or super().__str__()
