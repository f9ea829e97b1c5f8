"""What is left of a bug of ours: a log with the traceback, and a sentence that names it."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

from linfusion_cli import __version__
from linfusion_cli.core.errors import first_line


def bug_sentence(error: Exception) -> str:
    """One line for a person, and the traceback in a file that stays; where no file can be written, its last line.

    With what is saved of the run that it ended.
    """
    kept = getattr(error, "kept", "")
    try:
        sentence = f"This is a bug in linfusion ({type(error).__name__}). Log: {write_log()}"
        return f"{sentence}. {kept}" if kept else sentence
    except OSError:
        return f"This is a bug in linfusion: {first_line(error)} ({type(error).__name__}). {kept}".strip()


def write_log() -> Path:
    """The traceback of the present exception, in a file."""
    options = {"encoding": "utf-8", "errors": "backslashreplace"}
    with tempfile.NamedTemporaryFile("w", prefix="linfusion-", suffix=".log", delete=False, **options) as file:
        file.write(f"linfusion {__version__}\n{' '.join(sys.argv)}\n\n{traceback.format_exc()}")
    return Path(file.name)
