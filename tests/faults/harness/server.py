"""A program that has imported what a run needs, and forks: a run then begins in milliseconds, and is a real process.

It reads one JSON object a line from its standard input and answers each with one line:

    {"run": {...}}        ->  the number of a new process that runs the program (see child.py)
    {"wait": pid}         ->  the wait status of that process, once it has ended
    {"preload": [names]}  ->  the number of modules that could be imported

It computes nothing itself: a process with threads of its own must not be forked.
"""

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tests.faults.harness import child

HEAVY = ("torch", "diffusers", "transformers", "linfusion_cli.cli.app", "linfusion_cli.run.pipeline")


def main() -> None:
    """Serve until the input ends; a forked process leaves by running the program instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    preload(HEAVY)
    run = serve(sys.stdin.buffer, answers)
    if run:
        answers.close()
        run()


def serve(requests: IO[bytes], answers: IO[str]) -> Callable[[], None] | None:
    """Answer requests; what it returns is for a forked process to do, and None to the server itself."""
    while line := requests.readline():
        (kind, value), *_ = json.loads(line).items()
        if kind == "run":
            answer = fork()
            if not answer:
                return lambda: child.run(value)
        else:
            answer = os.waitpid(value, 0)[1] if kind == "wait" else preload(value)
        answers.write(f"{answer}\n")
        answers.flush()
    return None


def fork() -> int:
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"{threads} threads: a fork would have one of them only")
    return os.fork()


def preload(names: Any) -> int:
    """Import modules; what only a run can make of them is left to it."""
    found = 0
    for name in names:
        try:
            importlib.import_module(name)
            found += 1
        except Exception:  # noqa: BLE001 - the names are those that were in sys.modules, not all of which are files
            continue
    gc.collect()
    gc.freeze()  # what all processes share is not touched by their collections
    return found


if __name__ == "__main__":
    main()
