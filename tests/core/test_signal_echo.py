"""`timeout` signals its child and then the group: two signals in a moment are one wish."""

import subprocess
import sys

import pytest

CODE = """
import os, signal, sys
from linfusion_cli.core import signals as stopping
from linfusion_cli.core.errors import Stopped

stopping.listen()
try:
    with stopping.finishing():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        print("finished")
    print("went on")
except Stopped as stop:
    print("stopped", stop.exit_code)
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_an_echo_of_a_signal_does_not_end_what_the_signal_lets_come_to_its_end(number):
    """Sent from within: two from outside may be merged by the kernel, and then there is no second."""
    done = subprocess.run([sys.executable, "-c", CODE, number], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["finished", "stopped 143"]
