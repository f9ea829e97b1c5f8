"""Report a bug in linfusion: write the traceback to a log file and build the message for the user."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

from linfusion_cli import __version__
from linfusion_cli.core.errors import first_line


def report_crash(error: Exception) -> str:
    """Write the traceback of the current exception to a file, and return a one-line message with its path.

    Without a writable temporary folder, the message contains the first line of the error instead. If a part of the run
    is saved, the message says so.
    """
    saved_state = getattr(error, "saved_state", "")
    try:
        message = f"This is a bug in linfusion ({type(error).__name__}). Log: {write_crash_log()}"
        return f"{message}. {saved_state}" if saved_state else message
    except OSError:
        return f"This is a bug in linfusion: {first_line(error)} ({type(error).__name__}). {saved_state}".strip()


def write_crash_log() -> Path:
    """Write version, command line and the current traceback to a temporary file that is not deleted."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="linfusion-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(f"linfusion {__version__}\n{' '.join(sys.argv)}\n\n{traceback.format_exc()}")
    return Path(file.name)
