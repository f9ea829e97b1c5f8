"""`timeout` signals its child and then the process group: two signals in quick succession are one request."""

import subprocess
import sys

import pytest

CODE = """
import os, signal, sys
from linfusion_cli.core import signals
from linfusion_cli.core.errors import Stopped

signals.install_handlers()
try:
    with signals.critical_section():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        print("finished")
    print("continued")
except Stopped as stop:
    print("stopped", stop.exit_code)
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_an_echo_of_a_signal_does_not_end_what_the_signal_lets_come_to_its_end(number):
    """The process sends the signals itself, because the kernel can merge two signals from outside."""
    done = subprocess.run([sys.executable, "-c", CODE, number], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["finished", "stopped 143"]
