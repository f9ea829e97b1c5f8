"""Everything a person can cause or fix, and the exit code a script sees for it.

    LinfusionError
    ├── UsageError            2   a flag, a size or a value is wrong
    ├── DataError            65   a model, weights file or input picture is corrupt, unsafe or of the wrong kind
    │   └── NonFinite        65   a network gives NaN or Inf
    ├── InputMissing         66   an input file is not there
    ├── Unavailable          69   the model is not on this machine, or the device is not there
    │   └── DeviceFailed     69   the device cannot be used, or was lost
    ├── DoesNotFit           71   not enough memory, even at the smallest setting
    │   └── RanOutOfMemory   71   memory ran out in a run
    ├── CannotCreate         73   the output exists, or its folder refuses
    ├── WriteFailed          74   no space, or the disk failed
    ├── TryAgain             75   another run holds this output, or the time limit was reached
    └── ConfigError          78   a preset or config file is wrong

    Stopped            128 + N   by SIGHUP (129), SIGINT (130), SIGUSR1 (138), SIGUSR2 (140) or SIGTERM (143):
    │                            no error, and no Exception
    └── TimeIsUp             75   by --time-limit

Anything else that reaches the command line is a bug of ours and exits 70. The numbers are those of sysexits.h.
Each message is one sentence that names the thing and its value; `way_out` is a second one that says what to do.
"""

import signal

EXIT_BUG = 70


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: what goes into a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class LinfusionError(Exception):
    """Base of all errors a person can cause or fix."""

    exit_code = EXIT_BUG

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(LinfusionError):
    """`setting` is the field of the request that is wrong, where there is one: it may have come from a file."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "", setting: str | None = None):
        super().__init__(message, hint)
        self.setting = setting


class DataError(LinfusionError):
    exit_code = 65


class NonFinite(DataError):
    """A network gives NaN or Inf. The last good state is saved: another dtype or repaired weights can resume it."""


class InputNotFound(LinfusionError):
    exit_code = 66


class Unavailable(LinfusionError):
    exit_code = 69


class DeviceFailed(Unavailable):
    """The GPU cannot be used, or was lost in a run: what lies in its memory cannot be read any more."""


class OutOfMemoryBudget(LinfusionError):
    exit_code = 71


class OutOfMemory(OutOfMemoryBudget):
    """Memory ran out in a run, whatever was planned: somebody else may have taken it."""


class CannotCreateOutput(LinfusionError):
    exit_code = 73


class WriteFailed(LinfusionError):
    exit_code = 74


class TemporaryFailure(LinfusionError):
    exit_code = 75


class ConfigError(LinfusionError):
    exit_code = 78


class Stopped(BaseException):
    """A signal asked this run to end; shells know it as 128 + the signal's number.

    As KeyboardInterrupt it is no Exception: the imports of large libraries catch those, and would go on. `kept` is
    what of the run is saved, as a sentence.
    """

    kept = "No unfinished file is left."

    def __init__(self, signal_number: int):
        self.reason = f"Stopped by {signal.Signals(signal_number).name}"
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return f"{self.reason}. {self.kept}"


class TimeLimitReached(Stopped):
    """The time that the run was given is over."""

    def __init__(self):
        self.reason = "Stopped by --time-limit"
        self.exit_code = TemporaryFailure.exit_code
