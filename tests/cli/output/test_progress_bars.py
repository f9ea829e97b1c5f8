"""Bars on real terminals: narrow, without colours, without cursor movement, and after Ctrl-Z and `bg`."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest
from rich.cells import cell_len

from linfusion_cli.cli.output.progress_bars import arrange_line

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
RUN = """
import sys, time
from linfusion_cli.cli.output.progress import observe_run
from linfusion_cli.core import signals
from linfusion_cli.core.events import Notice, StageAdvanced, StageFinished, StageStarted
from linfusion_cli.core.geometry import Size
signals.install_handlers()
with observe_run(quiet=False) as observer:
    observer(Notice("[red]a lake[/red] :fire:"))
    observer(StageStarted("denoise", "a phase with a long name", Size(131072, 131072), 16384, "steps"))
    for done in range(4):
        observer(StageAdvanced(done * 4096))
        time.sleep(0.3)
    observer(StageFinished(1.2))
"""
# Runs a program in the background of the terminal, as a shell does after `stty tostop`, and reports whether it stopped.
BACKGROUND = f"""
import os, subprocess, sys, termios
mode = termios.tcgetattr(2)
mode[3] |= termios.TOSTOP
termios.tcsetattr(2, termios.TCSANOW, mode)
child = subprocess.Popen([sys.executable, "-c", {RUN!r}], process_group=0)
status = os.waitpid(child.pid, os.WUNTRACED)[1]
if os.WIFSTOPPED(status):
    child.kill()
print("stopped" if os.WIFSTOPPED(status) else f"exit code {{os.waitstatus_to_exitcode(status)}}")
"""


def run_on_terminal(code: str, columns: int, **environment: str) -> str:
    """Run Python code in a session with a terminal of its own -> what it wrote."""
    variables = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execve(sys.executable, [sys.executable, "-c", code], variables | {"TERM": "xterm-256color"} | environment)
    data = b""
    try:
        while piece := os.read(terminal, 1 << 16):
            data += piece
    except OSError:  # the last writer has closed the terminal
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, data
    return data.decode()


def find_lines(text: str) -> list[str]:
    """Return what was drawn from the start of each line, without escape sequences."""
    return [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", text)) if line]


@pytest.mark.parametrize("columns", [30, 50, 80, 200])
def test_a_bar_is_one_line_that_is_drawn_again(columns):
    text = run_on_terminal(RUN, columns)
    bars = [line for line in find_lines(text) if line.startswith("denoise")]
    assert all(cell_len(line) < columns for line in bars) and len(bars) > 3
    assert any("left" in line for line in bars[:-1])
    if columns >= 50:
        assert "16384/16384 steps" in bars[-1] and "left" not in bars[-1]
    assert "\x1b[1A" not in text  # never moves over other lines
    assert text.count("\n") <= 4


def test_texts_are_literal():
    assert "[red]a lake[/red] :fire:" in run_on_terminal(RUN, 80)


def test_the_cursor_stays_visible():
    text = run_on_terminal(RUN, 80)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert text.index("\x1b[?25h") < text.index("denoise")


def test_no_color_has_no_colours():
    assert re.search(r"\x1b\[[0-9;]*m", run_on_terminal(RUN, 80))
    assert not re.search(r"\x1b\[[0-9;]*m", run_on_terminal(RUN, 80, NO_COLOR="1"))


def test_a_dumb_terminal_gets_lines():
    text = run_on_terminal(RUN, 80, TERM="dumb")
    assert "\x1b" not in text and "\r" not in text.replace("\r\n", "\n")
    assert "denoise a phase with a long name 131072x131072: 1.2 s" in text.splitlines()


def test_a_run_in_the_background_continues_and_draws_no_bars():
    text = run_on_terminal(BACKGROUND, 80)
    assert text.splitlines()[-1] == "exit code 0"
    bars = [line for line in find_lines(text) if line.startswith("denoise")]
    assert len(bars) == 1 and "16384/16384 steps" in bars[0]


@pytest.mark.parametrize("width", [1, 11, 29, 49, 79, 109, 199])
def test_parts_fit_into_a_line(width):
    name_width, bar_width, details = arrange_line(["16384/16384 tensors", "1 day, 3:00:00", "left 1:00:00"], width)
    parts = [name_width, *([bar_width] if bar_width else []), *map(len, details)]
    assert sum(parts) + 2 * (len(parts) - 1) <= width
    assert not bar_width or bar_width >= 10
