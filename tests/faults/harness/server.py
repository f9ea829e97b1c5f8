"""A fork server with all imports done: a run starts in milliseconds and is a separate process.

It reads one JSON object per line from standard input and answers with one line each:

    {"run": {...}}        ->  the pid of a new process that runs the program (see child.py)
    {"wait": pid}         ->  the wait status of that process, once it has ended
    {"preload": [names]}  ->  the number of imported modules

It computes nothing itself: a process with several threads must not be forked.
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

HEAVY_MODULES = ("torch", "diffusers", "transformers", "linfusion_cli.cli.app", "linfusion_cli.run.pipeline")


def main() -> None:
    """Serve until the input ends; a forked process runs the program instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries must not print into the answers
    preload(HEAVY_MODULES)
    run = serve(sys.stdin.buffer, answers)
    if run:
        answers.close()
        run()


def serve(requests: IO[bytes], answers: IO[str]) -> Callable[[], None] | None:
    """Answer requests. Return the function that a forked process has to call, or None in the server at the end."""
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
        raise RuntimeError(f"{threads} threads: a fork would have only one of them")
    return os.fork()


def preload(names: Any) -> int:
    """Import modules and return the number of those that could be imported."""
    count = 0
    for name in names:
        try:
            importlib.import_module(name)
            count += 1
        except Exception:  # noqa: BLE001 - some entries of sys.modules cannot be imported by name
            continue
    gc.collect()
    gc.freeze()  # garbage collections must not copy the memory shared by all processes
    return count


if __name__ == "__main__":
    main()
