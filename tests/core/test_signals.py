"""Signals and the time limit, in child processes, because they belong to a process."""

import signal
import subprocess
import sys
import time

import pytest

WORK = """
import sys, time
from linfusion_cli.core import signals
from linfusion_cli.core.errors import Stopped

calls = []

def work(sec):
    if not calls:
        print("ready", flush=True)
    calls.append(sec)
    end = time.monotonic() + sec
    while time.monotonic() < end:
        time.sleep(0.01)

signals.install_handlers()
try:
{body}
except Stopped as stop:
    print(f"stopped {{stop.exit_code}}", flush=True)
"""


def start(body: str, **more) -> subprocess.Popen:
    code = WORK.format(body="\n".join("    " + line for line in body.splitlines()))
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **more)
    assert run.stdout.readline() == "ready\n"
    return run


def wait_for_output(run: subprocess.Popen) -> tuple[list[str], float]:
    started_at = time.monotonic()
    out, _ = run.communicate(timeout=30)
    return out.split("\n")[:-1], time.monotonic() - started_at


CRITICAL_SECTION = """
with signals.critical_section():
    work(SEC)
    print("finished", flush=True)
print("continued", flush=True)
"""


STOPS = [
    (signal.SIGINT, 130),
    (signal.SIGTERM, 143),
    (signal.SIGHUP, 129),
    (signal.SIGUSR1, 138),
    (signal.SIGUSR2, 140),
]


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_stretch_comes_to_its_end(number, code):
    run = start(CRITICAL_SECTION.replace("SEC", "0.7"))
    run.send_signal(number)
    assert wait_for_output(run)[0] == ["finished", f"stopped {code}"]


def test_one_that_takes_too_long_does_not():
    run = start(CRITICAL_SECTION.replace("SEC", "20"))
    run.send_signal(signal.SIGTERM)
    lines, seconds = wait_for_output(run)
    assert lines == ["stopped 143"] and 1.5 < seconds < 5


def test_elsewhere_it_stops_at_once():
    run = start("work(20)")
    run.send_signal(signal.SIGTERM)
    lines, seconds = wait_for_output(run)
    assert lines == ["stopped 143"] and seconds < 1.5


def test_a_second_signal_is_not_asked_to_wait_but_an_echo_is():
    run = start(CRITICAL_SECTION.replace("SEC", "1.2"))
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGTERM)  # as `timeout` does
    assert wait_for_output(run)[0] == ["finished", "stopped 143"]
    run = start(CRITICAL_SECTION.replace("SEC", "20"))
    run.send_signal(signal.SIGTERM)
    time.sleep(0.8)
    run.send_signal(signal.SIGINT)
    lines, seconds = wait_for_output(run)
    assert lines == ["stopped 143"] and seconds < 1


def test_stretches_within_a_stretch_are_one():
    body = """
with signals.critical_section():
    with signals.critical_section():
        work(0.5)
    print("inner", flush=True)
    work(0.2)
print("outer", flush=True)
"""
    run = start(body)
    run.send_signal(signal.SIGTERM)
    assert wait_for_output(run)[0] == ["inner", "stopped 143"]


def test_after_a_stretch_that_was_over_it_stops_at_once():
    run = start("with signals.critical_section():\n    pass\nwork(20)")
    run.send_signal(signal.SIGINT)
    lines, seconds = wait_for_output(run)
    assert lines == ["stopped 130"] and seconds < 1.5


def test_the_time_limit_is_a_stop_with_75():
    lines, seconds = wait_for_output(start("signals.start_time_limit(0.5)\n" + CRITICAL_SECTION.replace("SEC", "1")))
    assert lines == ["finished", "stopped 75"] and seconds < 3
    lines, seconds = wait_for_output(start("signals.start_time_limit(0.5)\n" + CRITICAL_SECTION.replace("SEC", "30")))
    assert lines == ["stopped 75"] and 2 < seconds < 5


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_stays_ignored(number):
    """As with nohup, or in a background job of a script."""
    run = start("work(0.8)\nprint('done', flush=True)", preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    run.send_signal(number)
    assert wait_for_output(run)[0] == ["done"]
